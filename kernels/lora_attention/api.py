"""Attention over a shared base cache and a low-rank cache: what callers call, and the checks on what they pass."""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from lragent_jax.kernels.lora_attention.arguments import LoraB, LowRank, PageTable
from lragent_jax.kernels.lora_attention.dispatch import dispatch

DTYPES = ("float32", "bfloat16", "float16")


def lora_attention(
    q: Array,
    base: Array,
    low_rank: LowRank | None,
    lora_b: LoraB | None,
    page_table: PageTable,
    adapter_ids: Array | None,
    *,
    rope_inv_freq: Array | None = None,
    sm_scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Array | tuple[Array, Array]:
    """Causal attention of T new queries per row over paged keys and values, part of them in low-rank form.

    With letters as matrices, the keys and values of a row are

        V = V_base + L_v B_v        K = K_base + RoPE(L_k B_k)

    where L is read from the row's low-rank pages and B belongs to the row's adapter. Few queries take values as they
    are: softmax(Q Kᵀ) V = P V_base + (P L_v) B_v; keys are expanded block by block, because RoPE stands between B and
    the score. For many queries an implementation may expand either once, into memory of the call's own: the adapter
    then costs every key instead of every query. Idea: LRAgent (arXiv 2602.01053).

    Query t of row b sits at position q_starts[b] + t and sees keys 0 .. that position. A query at a position
    ≥ kv_lens[b] (or < 0) is padding: its output is 0, its lse −inf. Nothing else may be finite, or anything at all:
    table entries from ceil(kv_len / p) on, slots from kv_len on, pages that no row refers to, padding queries, B of
    adapters that no row names, B's row 0, and the low-rank pages and table of rows without an adapter.

    Args:
      q: [B, T, N, H], after RoPE; float32, bfloat16 or float16, and every pool and B has the same dtype.
      base: [P, K, p, 2H], K in the first H lanes of a slot and V in the last; K divides N, 8 divides p.
      low_rank: pools v [P_lr, r_v, p] and k [P_lr, r_k, p] (k: before RoPE). Each of them may be None. None at all
        where adapters are merged into base: then this is plain attention and costs no more.
      lora_b: v [A, r_v, K, H] and k [A, r_k, K, H], for exactly the pools that `low_rank` has.
      page_table: base and low_rank i32[B, W], q_starts and kv_lens i32[B]; kv_lens ≤ W p.
      adapter_ids: i32[B], row b's row of `lora_b`; 0 means no adapter. Required with `low_rank`.
      rope_inv_freq: f32[H/2], radians per position. Required with `low_rank.k`.
      sm_scale: what scores are multiplied with before the softmax; 1/sqrt(H) by default.
      return_lse: whether to return, too, the natural logarithm of the sum of exp(scaled score) of every query.
      implementation: "xla" or "reference"; None takes the first that fits.

    Returns:
      [B, T, N, H] in q's dtype; with `return_lse` also f32[B, T, N].

    Raises:
      ValueError: arguments that contradict each other or these rules. The values of adapter_ids and kv_lens are
        checked where they are known. Under `jit` they are not: there a row whose adapter does not exist comes out
        as NaN, and kv_lens that exceed the table are cut to it.
      NotImplementedError: no implementation fits (all reasons), or the named one does not (its reason).
    """
    if low_rank is not None and low_rank.v is None and low_rank.k is None:
        low_rank = None
    if lora_b is not None and lora_b.v is None and lora_b.k is None:
        lora_b = None
    check_queries(q, base)
    check_page_table(q, base, low_rank, page_table)
    if low_rank is None and lora_b is None:
        adapter_ids, page_table = None, page_table._replace(low_rank=None)
    elif low_rank is None or lora_b is None:
        given, missing = ("lora_b", "low_rank") if low_rank is None else ("low_rank", "lora_b")
        raise ValueError(f"{given} is given and {missing} is not; pass both, or neither where adapters are merged")
    else:
        check_low_rank(q, base, low_rank, lora_b)
        check_adapter_ids(q, lora_b, adapter_ids)
        check_rope(q, low_rank, rope_inv_freq)
    if known_values(page_table.kv_lens) is None:
        most = page_table.base.shape[1] * base.shape[2]
        page_table = page_table._replace(kv_lens=jnp.minimum(page_table.kv_lens, most))
    return dispatch(
        implementation,
        *(q, base, low_rank, lora_b, page_table, adapter_ids),
        rope_inv_freq=None if low_rank is None or low_rank.k is None else rope_inv_freq,
        sm_scale=q.shape[-1] ** -0.5 if sm_scale is None else float(sm_scale),
        return_lse=return_lse,
    )


def check_queries(q: Array, base: Array) -> None:
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q has shape {q.shape}; it must be [B, T, N, H], none of them 0")
    if q.dtype not in DTYPES:
        raise ValueError(f"q has dtype {q.dtype}; it must be one of {', '.join(DTYPES)}")
    N, H = q.shape[2:]
    if H % 2:
        raise ValueError(f"q has shape {q.shape}; its head dim {H} must be even")
    check("base", base, q.dtype, "P K p 2H", (None, None, None, 2 * H), beside=("q", q))
    P, K, p, _ = base.shape
    if not P or not K or N % K:
        raise ValueError(
            f"base has shape {base.shape}; with q of shape {q.shape} its K = {K} must divide N = {N}, P > 0"
        )
    if not p or p % 8:
        raise ValueError(f"base has shape {base.shape}; its page size {p} must be a positive multiple of 8")


def check_page_table(q: Array, base: Array, low_rank: LowRank | None, page_table: PageTable) -> None:
    B, (table, low_rank_table, q_starts, kv_lens) = q.shape[0], page_table
    check("page_table.base", table, jnp.int32, "B W", (B, None), beside=("q", q))
    if not table.shape[1]:
        raise ValueError("page_table.base has no columns; give every row at least one entry")
    if low_rank is not None:
        if low_rank_table is None:
            raise ValueError("low_rank is given and page_table.low_rank is None; say where the low-rank pages lie")
        beside = ("page_table.base", table)
        check("page_table.low_rank", low_rank_table, jnp.int32, "B W", table.shape, beside)
    check("page_table.q_starts", q_starts, jnp.int32, "B", (B,), beside=("q", q))
    check("page_table.kv_lens", kv_lens, jnp.int32, "B", (B,), beside=("q", q))
    lens, most = known_values(kv_lens), table.shape[1] * base.shape[2]
    if lens is not None and (lens.min() < 0 or lens.max() > most):
        raise ValueError(
            f"page_table.kv_lens is {lens.tolist()}; page_table.base of shape {table.shape} with pages of "
            f"{base.shape[2]} slots holds 0 to {most} keys"
        )


def check_low_rank(q: Array, base: Array, low_rank: LowRank, lora_b: LoraB) -> None:
    (K, p), H = base.shape[1:3], q.shape[3]
    for target, pool, b in zip(LowRank._fields, low_rank, lora_b, strict=True):
        if (pool is None) != (b is None):
            given, missing = ("lora_b", "low_rank") if pool is None else ("low_rank", "lora_b")
            raise ValueError(f"{given}.{target} is given and {missing}.{target} is None; pass both or neither")
        if pool is None or b is None:
            continue
        pool_name = f"low_rank.{target}"
        check(pool_name, pool, q.dtype, f"P_lr r_{target} p", (None, None, p), beside=("base", base))
        if 0 in pool.shape:
            raise ValueError(f"{pool_name} has shape {pool.shape}; it must hold at least one page of rank 1")
        shape = (None, pool.shape[1], K, H)
        check(f"lora_b.{target}", b, q.dtype, f"A r_{target} K H", shape, beside=(pool_name, pool))
    if lora_b.v is not None and lora_b.k is not None and lora_b.v.shape[0] != lora_b.k.shape[0]:
        raise ValueError(f"lora_b.v has {lora_b.v.shape[0]} adapters and lora_b.k {lora_b.k.shape[0]}; they must agree")


def check_adapter_ids(q: Array, lora_b: LoraB, adapter_ids: Array | None) -> None:
    if adapter_ids is None:
        raise ValueError("low_rank is given and adapter_ids is None; pass i32[B], 0 for rows without an adapter")
    check("adapter_ids", adapter_ids, jnp.int32, "B", (q.shape[0],), beside=("q", q))
    ids, num_adapters = known_values(adapter_ids), min(b.shape[0] for b in lora_b if b is not None)
    if ids is not None and (ids.min() < 0 or ids.max() >= num_adapters):
        raise ValueError(f"adapter_ids is {ids.tolist()}; lora_b holds adapters 0 to {num_adapters - 1}")


def check_rope(q: Array, low_rank: LowRank, rope_inv_freq: Array | None) -> None:
    if low_rank.k is None:
        return
    if rope_inv_freq is None:
        raise ValueError("low_rank.k is given and rope_inv_freq is None; its keys are stored before RoPE")
    check("rope_inv_freq", rope_inv_freq, jnp.float32, "H/2", (q.shape[3] // 2,), beside=("q", q))


def check(
    name: str, array: Array, dtype, letters: str, sizes: tuple[int | None, ...], beside: tuple[str, Array]
) -> None:
    """Raises ValueError unless `array` has the given dtype and sizes (None: any), which follow from `beside`."""
    other, other_array = beside
    if array.ndim != len(sizes) or any(s not in (None, got) for s, got in zip(sizes, array.shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ValueError(
            f"{name} has shape {array.shape}; beside {other} of shape {other_array.shape} "
            f"it must be [{', '.join(letters.split())}] = [{wanted}]"
        )
    if array.dtype != dtype:
        raise ValueError(f"{name} has dtype {array.dtype}; beside {other} it must be {jnp.dtype(dtype).name}")


def known_values(array: Array) -> np.ndarray | None:
    """The values, or None where they are not known here: under a transformation, or partly on other hosts."""
    if isinstance(array, Tracer) or not getattr(array, "is_fully_addressable", True):
        return None
    return np.asarray(array)
