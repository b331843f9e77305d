"""The implementation that runs everywhere: the reference's equation in a loop over blocks of pages.

The loop's trip count is data (the longest context of the batch), so cost follows the context and not the width of the
page table. Online softmax after Flash Attention (arXiv 2205.14135), with a second accumulator `o_lr` = P L under the
same maximum and sum: by linearity P (V + L B) = P V + (P L) B, and B is applied once, after the loop.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from lragent_jax.kernels.lora_attention.arguments import LoraB, LowRank, PageTable
from lragent_jax.kernels.lora_attention.rope import rotate

# Scores of keys that a query does not see. Finite, so that a query that sees none of a block needs no care for
# inf − inf; far below any score, so that exp() of it is zero once a seen key has set the maximum.
UNSEEN = -1e30

# Elements that a block's largest array may have (256 MiB in f32): its scores, or the K and V read for it.
MAX_BLOCK_ELEMENTS = 2**26


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """block_kv: keys per turn of the loop, a positive multiple of 8; at run time cut to whole pages, at least one."""

    block_kv: int

    def __post_init__(self):
        if self.block_kv <= 0 or self.block_kv % 8:
            raise ValueError(f"block_kv is {self.block_kv}; it must be a positive multiple of 8")


def heuristic(elements_per_key: int, platform: str) -> BlockSizes:
    """Block sizes for "cpu", "gpu" or "tpu", where a key takes that many elements of the block's largest array.

    On CPU 256 keys: few enough that the last, partly filled block wastes little, many enough to pay for the loop. On
    accelerators a turn costs launches, so blocks are as large as `MAX_BLOCK_ELEMENTS` lets them be, 256 to 4096 keys.
    """
    if platform == "cpu":
        return BlockSizes(256)
    fitting = max(1, MAX_BLOCK_ELEMENTS // elements_per_key)
    return BlockSizes(min(4096, max(256, 2 ** (fitting.bit_length() - 1))))


class Softmax(NamedTuple):
    """The state of an online softmax: sums under the weights exp(score − m), and the sum of the weights, all f32."""

    o: Float[Array, "B K T G H"]
    o_lr: Float[Array, "B K T G r_v"] | None
    m: Float[Array, "B K T G"]
    l: Float[Array, "B K T G"]  # noqa: E741 (the name that the flash attention papers give it)

    def add(self, scores, v, low_rank_v, einsum) -> "Softmax":
        """The state after a block of keys: scores [B, K, T, G, S], v [B, K, S, H], low_rank_v [B, r_v, S] or None."""
        m = jnp.maximum(self.m, scores.max(-1))
        rescale, probs = jnp.exp(self.m - m), jnp.exp(scores - m[..., None])
        sums = self.l * rescale + probs.sum(-1)
        probs = probs.astype(v.dtype)
        o = self.o * rescale[..., None] + einsum("bktgs,bksh->bktgh", probs, v)
        if self.o_lr is None:
            return Softmax(o, None, m, sums)
        return Softmax(o, self.o_lr * rescale[..., None] + einsum("bktgs,brs->bktgr", probs, low_rank_v), m, sums)

    def result(self, lora_b_v, live) -> tuple[Array, Array]:
        """o [B, K, T, G, H] and lse [B, K, T, G]; 0 and −inf for queries that are not `live` [B, 1, T, 1]."""
        o, sums = self.o, jnp.where(live, self.l, 1)
        if self.o_lr is not None:
            o += jnp.einsum("bktgr,brkh->bktgh", self.o_lr, lora_b_v, precision="highest")
        return jnp.where(live[..., None], o / sums[..., None], 0), jnp.where(live, self.m + jnp.log(sums), -jnp.inf)


def read_pages(pool: Array, pages: Int32[Array, "B n"], start: int = 0, size: int | None = None) -> Array:
    """Lanes [start, start + size) of the pages' S = n p slots: [B, K, S, size]; or all of them, [B, r, S].

    Ids of pages that do not exist are clipped: what a table holds past its row's keys is masked later. One gather
    takes what is needed to where it is needed: slicing the pool first would copy the pool, slicing or transposing the
    gathered pages would copy them once more.
    """
    dims = lax.GatherDimensionNumbers(
        offset_dims=(1, *range(3, pool.ndim + 1)), collapsed_slice_dims=(0,), start_index_map=(0, pool.ndim - 1)
    )
    starts = jnp.stack([pages, jnp.full_like(pages, start)], axis=-1)
    window = (1, *pool.shape[1:-1], pool.shape[-1] if size is None else size)
    tiles = lax.gather(pool, starts, dims, window, mode=lax.GatherScatterMode.CLIP)
    return tiles.reshape(*tiles.shape[:2], -1, *tiles.shape[4:])


def score(q: Float[Array, "B K T G H"], k: Float[Array, "B K S H"], einsum) -> Float[Array, "B K T G S"]:
    """q Kᵀ. For one query token as (K qᵀ)ᵀ: XLA on CPU packs the right operand anew, so it should be the small one."""
    if q.shape[2] == 1:
        return jnp.einsum("bkstg->bktgs", einsum("bksh,bktgh->bkstg", k, q))
    return einsum("bktgh,bksh->bktgs", q, k)


def read_low_rank(
    low_rank: LowRank, lora_b: LoraB, rope_inv_freq, pages_of_block, adapted, turn, keys, held
) -> tuple[Array | None, Array | None]:
    """A block's low-rank values as they are, [B, r_v, S], and its low-rank keys expanded and rotated, f32 [B, K, S, H].

    Both are zero where nothing is `held` [B, S] and in rows not `adapted` [B]. `lora_b` holds each row's own B.
    """
    pages, held = pages_of_block(turn), held & adapted[:, None]
    v, k = (None if pool is None else jnp.where(held[:, None], read_pages(pool, pages), 0) for pool in low_rank)
    if k is None:
        return v, None
    expanded = jnp.einsum("brs,brkh->bskh", k.astype(jnp.float32), lora_b.k, precision="highest")
    return v, jnp.einsum("bskh->bksh", rotate(expanded, keys, rope_inv_freq))


@functools.partial(jax.jit, static_argnames=("sm_scale", "return_lse", "block_sizes"))
def lora_attention(
    q: Float[Array, "B T N H"],
    base: Float[Array, "P K p 2*H"],
    low_rank: LowRank | None,
    lora_b: LoraB | None,
    page_table: PageTable,
    adapter_ids: Int32[Array, " B"] | None,
    *,
    rope_inv_freq: Float[Array, " H//2"] | None,
    sm_scale: float,
    return_lse: bool,
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """See `api.lora_attention`; `block_sizes=None` asks the heuristic."""
    B, T, N, H = q.shape
    K, p = base.shape[1:3]
    W = page_table.base.shape[1]
    block_sizes = block_sizes or heuristic(B * max(T * N, 2 * K * H), jax.default_backend())
    n = min(W, max(1, block_sizes.block_kv // p))  # pages per block
    # HIGHEST, or GPUs and TPUs would round f32 operands to TF32 or bf16. Narrower operands are exact as they are.
    exact = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT
    einsum = functools.partial(jnp.einsum, precision=exact, preferred_element_type=jnp.float32)

    grouped = jnp.einsum("btkgh->bktgh", q.reshape(B, T, K, N // K, H))
    positions = page_table.q_starts[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    ends = jnp.minimum(page_table.kv_lens, page_table.q_starts + T)  # nobody sees keys behind the last query

    def pages_of(table):
        """turn -> the table's entries for that block. Padded, because dynamic_slice would shift the last block."""
        whole_blocks = jnp.pad(table, ((0, 0), (0, -W % n)))
        return lambda turn: lax.dynamic_slice(whole_blocks, (jnp.zeros_like(turn), turn * n), (B, n))

    base_pages, own_b, low_rank_block = pages_of(page_table.base), LoraB(None), None
    if low_rank and lora_b and adapter_ids is not None and page_table.low_rank is not None:  # all or none: see api
        own_b, pages = lora_b.select(adapter_ids), pages_of(page_table.low_rank)
        low_rank_block = functools.partial(read_low_rank, low_rank, own_b, rope_inv_freq, pages, adapter_ids > 0)

    def attend_block(turn, state):
        keys = turn * (n * p) + jnp.arange(n * p, dtype=jnp.int32)
        held = keys[None] < ends[:, None]
        k = read_pages(base, base_pages(turn), 0, H)
        v = jnp.where(held[:, None, :, None], read_pages(base, base_pages(turn), H, H), 0)
        low_rank_v = None
        if low_rank_block is not None:
            low_rank_v, low_rank_k = low_rank_block(turn, keys, held)
            if low_rank_k is not None:
                k = (k.astype(jnp.float32) + low_rank_k).astype(k.dtype)
        seen = held[:, None] & (keys[None, None] <= positions[:, :, None])
        scores = jnp.where(seen[:, None, :, None], score(grouped, k, einsum) * sm_scale, UNSEEN)
        return state.add(scores, v, low_rank_v, einsum)

    def full(fill, *width):
        return jnp.full((B, K, T, N // K, *width), fill, jnp.float32)

    o_lr = None if own_b.v is None else full(0, own_b.v.shape[1])
    num_blocks = (jnp.max(ends) + n * p - 1) // (n * p)
    state = lax.fori_loop(0, num_blocks, attend_block, Softmax(full(0, H), o_lr, full(UNSEEN), full(0)))

    live = ((positions >= 0) & (positions < page_table.kv_lens[:, None]))[:, None, :, None]
    o, lse = state.result(own_b.v, live)
    o = jnp.einsum("bktgh->btkgh", o).reshape(q.shape).astype(q.dtype)
    return (o, jnp.einsum("bktg->btkg", lse).reshape(B, T, N)) if return_lse else o
