"""What every implementation of `lora_attention` must do: cases, a float64 oracle, and the tests over both.

A test module subclasses `AttentionContract` once per implementation. The oracle is numpy in plain loops and shares
nothing with the kernels; `test_lora_attention.py` shows that it tells broken implementations from right ones.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import assert_close

from lragent_jax.kernels.lora_attention import LoraB, LowRank, PageTable, lora_attention


@dataclasses.dataclass(frozen=True)
class Case:
    """rows: (position of the first query, keys, adapter id) of every row. Rank 0: no such cache."""

    name: str
    rows: tuple[tuple[int, int, int], ...]
    T: int = 1
    K: int = 2
    G: int = 1
    H: int = 16
    p: int = 8
    r_v: int = 8
    r_k: int = 0
    dtype: str = "float32"
    shared_pages: int = 0  # this many first pages are the same ones for all rows
    own_low_rank: bool = False  # but low-rank pages are every row's own
    q_scale: float = 1.0
    sm_scale: float | None = None


RAGGED = ((0, 5, 1), (11, 16, 2), (30, 33, 0), (0, 0, 1), (0, 1, 2))
CASES = (
    Case("decode", rows=((36, 37, 1), (32, 33, 2)), K=3, G=3, H=64, p=16),
    Case(
        "decode, agents on one prefix", rows=((40, 41, 1), (40, 41, 2), (23, 24, 3), (31, 32, 0)), G=4, shared_pages=2
    ),
    Case(
        "decode, A-groups on one prefix",  # more than one product of the GPU's holds, and the last of them not full
        rows=((66, 67, 3), (70, 71, 1), (70, 71, 2), (64, 65, 5), (69, 70, 4), (65, 66, 0)),
        K=1,
        G=4,
        r_v=32,
        shared_pages=2,
        own_low_rank=True,
    ),
    Case("prefill, ragged", rows=RAGGED, T=5),
    Case("large scores", rows=RAGGED, T=5, q_scale=40.0),
    Case("prefill over a page border", rows=((60, 69, 1), (64, 65, 2)), T=9, G=7, H=64, p=64),
    Case("queries in the middle, rank 1, own sm_scale", rows=((3, 30, 1), (8, 20, 2)), T=4, G=3, r_v=1, sm_scale=0.4),
    Case("queries before the start", rows=((-2, 3, 1), (-9, 4, 2)), T=5),
    Case("more queries than a tile, and not in eights", rows=((60, 135, 1), (-3, 70, 2)), T=75, p=16),
    Case("nothing to read", rows=((0, 0, 1), (0, 0, 2)), T=5),
    Case("rank 64, head dim 128", rows=((70, 72, 1), (20, 22, 2)), T=2, G=4, H=128, p=64, r_v=64),
    Case("low-rank keys", rows=((20, 25, 1), (33, 38, 2), (9, 12, 0)), T=5, K=3, G=3, H=64, p=16, r_k=16),
    Case("low-rank keys only", rows=((20, 21, 2), (33, 34, 1)), K=1, G=4, r_v=0, r_k=1),
    Case("many blocks", rows=((697, 700, 1), (86, 88, 2), (511, 514, 0)), T=3, G=3, p=16, r_k=8),
    Case("merged", rows=((20, 25, 1), (33, 38, 2)), T=5, G=3, r_v=0),
    Case("bfloat16", rows=((20, 25, 1), (33, 38, 2)), T=5, G=4, H=128, p=16, r_v=16, r_k=8, dtype="bfloat16"),
    Case("float16", rows=((20, 25, 1), (33, 38, 2)), T=5, G=3, H=64, r_k=8, dtype="float16"),
)
BY_NAME = {case.name: case for case in CASES}


class Inputs(NamedTuple):
    """The operation's arguments as numpy arrays."""

    q: np.ndarray
    base: np.ndarray
    low_rank_v: np.ndarray | None
    low_rank_k: np.ndarray | None
    b_v: np.ndarray | None
    b_k: np.ndarray | None
    base_table: np.ndarray
    low_rank_table: np.ndarray
    q_starts: np.ndarray
    kv_lens: np.ndarray
    adapter_ids: np.ndarray
    inv_freq: np.ndarray
    sm_scale: float | None


def make_inputs(case: Case, garbage: float = np.nan) -> Inputs:
    """Random arguments. Everything that may not be read is `garbage`; what is read does not depend on it.

    Table entries that may not be read are ids that exist nowhere where garbage is NaN, and pages elsewhere.
    """
    rng = np.random.default_rng(0)
    q_starts, kv_lens, adapter_ids = np.array(case.rows, np.int32).T
    B, (T, K, G, H, p) = len(case.rows), (case.T, case.K, case.G, case.H, case.p)
    W = int(kv_lens.max()) // p + 2
    P = B * W + 3

    def normal(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    def make_table(reads, shared_pages):
        table = rng.permutation(P)[: B * W].reshape(B, W).astype(np.int32)
        table[:, :shared_pages] = table[0, :shared_pages]
        held = np.arange(W)[None] * p < np.where(reads, kv_lens, 0)[:, None]
        nowhere = np.array([-1, P, 2**31 - 1, -(2**31)], np.int32)
        unread = nowhere[np.arange(B * W).reshape(B, W) % 4] if np.isnan(garbage) else table[:, ::-1]
        return np.where(held, table, unread)

    def make_pool(table, reads, *shape):
        """A pool [P, shape[0], p, …] in which only the slots that some row holds have a value; None at rank 0."""
        if not shape[0]:
            return None
        held = np.zeros((P, p), bool)
        for b in range(B):
            for s in range(kv_lens[b] if reads[b] else 0):
                held[table[b, s // p], s % p] = True
        held = held.reshape(P, 1, p, *(1 for _ in shape[1:]))
        values = normal(P, shape[0], p, *shape[1:])
        return np.where(held, values, garbage).astype(case.dtype)

    def make_b(rank):
        if not rank:
            return None
        used = np.isin(np.arange(max(adapter_ids) + 2), adapter_ids[adapter_ids > 0])
        values = normal(len(used), rank, K, H, scale=rank**-0.5)
        return np.where(used[:, None, None, None], values, garbage).astype(case.dtype)

    everywhere, adapted = np.ones(B, bool), adapter_ids > 0
    base_table = make_table(everywhere, case.shared_pages)
    low_rank_table = make_table(adapted, 0 if case.own_low_rank else case.shared_pages)
    base = make_pool(base_table, everywhere, K, 2 * H)
    assert base is not None
    positions = q_starts[:, None] + np.arange(T)
    live = (positions >= 0) & (positions < kv_lens[:, None])
    q = np.where(live[..., None, None], normal(B, T, K * G, H, scale=case.q_scale), garbage).astype(case.dtype)
    return Inputs(
        q=q,
        base=base,
        low_rank_v=make_pool(low_rank_table, adapted, case.r_v),
        low_rank_k=make_pool(low_rank_table, adapted, case.r_k),
        b_v=make_b(case.r_v),
        b_k=make_b(case.r_k),
        base_table=base_table,
        low_rank_table=low_rank_table,
        q_starts=q_starts,
        kv_lens=kv_lens,
        adapter_ids=adapter_ids,
        inv_freq=(10.0 ** -np.linspace(0, 3, H // 2)).astype(np.float32),
        sm_scale=case.sm_scale,
    )


def rotate_half(x, positions, inv_freq):
    """RoPE of x [S, K, H] as in Hugging Face's Llama: x cos + rotate_half(x) sin."""
    angles = np.tile(positions[:, None] * inv_freq.astype(np.float64), 2)[:, None]
    half = x.shape[-1] // 2
    return x * np.cos(angles) + np.concatenate([-x[..., half:], x[..., :half]], -1) * np.sin(angles)


def softmax_average(scores, v, low_rank_v, b):
    """(softmax(scores) (v + low_rank_v b), log-sum-exp of the scores) of one query head."""
    weights = np.exp(scores - scores.max())
    return (weights @ v + weights @ low_rank_v @ b) / weights.sum(), scores.max() + np.log(weights.sum())


def oracle(x: Inputs, average=softmax_average, rope=rotate_half, kv_head=lambda n, N, K: n // (N // K)):
    """o f64 [B, T, N, H] and lse f64 [B, T, N], one query head at a time. Mutants replace its parts."""
    B, T, N, H = x.q.shape
    K, p = x.base.shape[1:3]
    sm_scale = H**-0.5 if x.sm_scale is None else x.sm_scale
    o, lse = np.zeros(x.q.shape), np.full((B, T, N), -np.inf)
    for b in range(B):
        length, adapter = x.kv_lens[b], x.adapter_ids[b]

        def read(pool, table, length=length, b=b):
            slots = [pool[table[b, s // p], :, s % p] for s in range(length)]
            return np.array(slots, np.float64).reshape(length, pool.shape[1], *pool.shape[3:])

        k, v = np.split(read(x.base, x.base_table), 2, axis=-1)
        low_rank_v, b_v = np.zeros((length, 0)), np.zeros((0, K, H))
        if adapter and x.low_rank_v is not None and x.b_v is not None:
            low_rank_v, b_v = read(x.low_rank_v, x.low_rank_table), x.b_v[adapter].astype(np.float64)
        if adapter and x.low_rank_k is not None and x.b_k is not None:
            expanded = np.einsum("sr,rkh->skh", read(x.low_rank_k, x.low_rank_table), x.b_k[adapter].astype(np.float64))
            k = k + rope(expanded, np.arange(length), x.inv_freq)
        for t in range(T):
            seen = x.q_starts[b] + t + 1
            for n in range(N) if 0 < seen <= length else ():
                head = kv_head(n, N, K)
                scores = k[:seen, head] @ x.q[b, t, n].astype(np.float64) * sm_scale
                o[b, t, n], lse[b, t, n] = average(scores, v[:seen, head], low_rank_v[:seen], b_v[:, head])
    return o, lse


def check(case: Case, got, want) -> None:
    """Fails where (o, lse) is not what the oracle says: within tolerance, and exactly 0 and −inf for padding."""
    (o, lse), (want_o, want_lse) = (np.asarray(x, np.float64) for x in got), want
    padding = np.isneginf(want_lse)
    assert np.array_equal(np.isneginf(lse), padding), "lse is -inf for other queries than those that are padding"
    assert not o[padding].any(), "a padding query has an output"
    assert_close(o, want_o, "attention", case.dtype)
    assert_close(lse[~padding], want_lse[~padding], "attention", case.dtype)


def arguments(x: Inputs) -> tuple[tuple, dict]:
    """`x` as positional and keyword arguments of `lora_attention`, on the device."""
    q, base, low_rank_v, low_rank_k, b_v, b_k, *table, adapter_ids, inv_freq = jax.tree.map(jnp.asarray, x[:-1])
    page_table = PageTable(*table)
    if low_rank_v is None and low_rank_k is None:
        return (q, base, None, None, page_table, None), {"sm_scale": x.sm_scale}
    low_rank, lora_b = LowRank(low_rank_v, low_rank_k), LoraB(b_v, b_k)
    return (q, base, low_rank, lora_b, page_table, adapter_ids), {"rope_inv_freq": inv_freq, "sm_scale": x.sm_scale}


class AttentionContract:
    """Subclass it, name the implementation, and say which cases it may refuse."""

    implementation: str

    def refuses(self, case: Case) -> str | None:
        """A part of the reason with which it must raise NotImplementedError; None where it must run."""
        return None

    def adapt(self, case: Case) -> Case:
        """The case as this implementation can take it: another dtype, head dim or page size."""
        return case

    def case(self, name: str) -> Case:
        return self.adapt(BY_NAME[name])

    def run(self, x: Inputs, **kwargs):
        args, keywords = arguments(x)
        return lora_attention(*args, **keywords, **kwargs, implementation=self.implementation)

    def run_case(self, name: str, garbage: float = np.nan):
        reason = self.refuses(self.case(name))
        x = make_inputs(self.case(name), garbage)
        if reason is None:
            return self.run(x, return_lse=True)
        with pytest.raises(NotImplementedError, match=reason):
            self.run(x, return_lse=True)
        pytest.skip(reason)

    @pytest.mark.parametrize("name", BY_NAME)
    def test_equals_the_oracle_amid_nan(self, name):
        o, lse = self.run_case(name)
        x = make_inputs(self.case(name))
        assert (o.dtype, lse.dtype) == (x.q.dtype, jnp.float32)
        check(self.case(name), (o, lse), oracle(x))

    @pytest.mark.parametrize("name", ["decode, agents on one prefix", "prefill, ragged", "low-rank keys", "float16"])
    def test_what_may_not_be_read_changes_no_bit(self, name):
        for one, other in zip(self.run_case(name, np.nan), self.run_case(name, 3.0), strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))

    def test_lse_is_returned_on_request_only(self):
        o, _ = self.run_case("decode")
        np.testing.assert_array_equal(np.asarray(self.run(make_inputs(self.case("decode")))), np.asarray(o))

    def test_prefill_equals_decode_steps(self):
        case = self.case("low-rank keys")
        x = make_inputs(case)
        together, _ = self.run_case(case.name)
        for t in range(case.T):
            step = x._replace(q=x.q[:, t : t + 1], q_starts=x.q_starts + np.int32(t))
            assert_close(self.run(step), together[:, t : t + 1], "attention", case.dtype)

    def test_data_does_not_recompile(self):
        x = make_inputs(self.case("prefill, ragged"))
        traces = []

        @jax.jit
        def attend(args, rope_inv_freq):
            traces.append(None)
            return lora_attention(
                *args, rope_inv_freq=rope_inv_freq, return_lse=True, implementation=self.implementation
            )

        for rows in (slice(None), slice(None, None, -1)):
            per_row = {name: getattr(x, name)[rows] for name in ("q", "base_table", "low_rank_table", "q_starts")}
            x = x._replace(**per_row, kv_lens=x.kv_lens[rows], adapter_ids=x.adapter_ids[rows])
            args, keywords = arguments(x)
            check(self.case("prefill, ragged"), attend(args, keywords["rope_inv_freq"]), oracle(x))
        assert len(traces) == 1

    def test_an_adapter_that_does_not_exist_is_nan_under_jit(self):
        x = make_inputs(self.case("prefill, ragged"), garbage=0.0)
        args, keywords = arguments(x)
        attend = jax.jit(lambda *args: lora_attention(*args, **keywords, implementation=self.implementation))
        for unknown in (-1, max(x.adapter_ids) + 2, 2**31 - 1):
            o = np.asarray(attend(*args[:-1], jnp.array([1, unknown, 0, 1, 2], jnp.int32)))
            assert np.isnan(o[1]).all()
            assert not np.isnan(np.delete(o, 1, axis=0)).any()

    def test_the_program_names_it(self):
        args, keywords = arguments(make_inputs(self.case("decode")))
        attend = jax.jit(lambda *args: lora_attention(*args, **keywords, implementation=self.implementation))
        assert f"lora_attention_{self.implementation}/" in attend.lower(*args).as_text(debug_info=True)
