"""Flash-LoRA-Attention through Pallas' Triton backend: NVIDIA Ampere and newer.

Two ways through one loop (`attend`), which streams blocks of keys under one online softmax (Flash Attention 2, arXiv
2307.08691) with a second accumulator o_lr = P L for the low-rank values; B is applied once, after the loop:

* prefill: one program per (row, query tile, query head);
* decode and short prefill: programs and their rows come from a `DecodePlan`, and a second kernel merges what they leave.

Upstream deprecates this backend (from JAX 0.11), so nothing depends on this file.
"""

import dataclasses
import functools
import math
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from lragent_jax.kernels.interpret import is_interpreted
from lragent_jax.kernels.lora_attention.arguments import LoraB, LowRank, PageTable
from lragent_jax.kernels.lora_attention.decode_plan import DecodePlan, PlanSizes, plan_decode

# JAX warns whenever a kernel of this backend is lowered, which a caller's `jit` may do long after our return.
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)

# Scores of keys that a query does not see: finite, or a row that sees none of a block would compute inf − inf.
UNSEEN = -1e30

MAX_PLANNED_ROWS = 64  # (row, query) pairs up to which a plan is made; from there on tiles of queries fill a device
MAX_TILE_ROWS = 64  # query heads that share a decode program: the rows of one Hopper matrix instruction
MAX_READER_LANES = 256  # ranks of all low-rank caches that a decode program reads side by side
MERGE_ELEMENTS = 8192  # elements of partial results that a merging program holds at once
MERGE_WARPS, MERGE_STAGES = 4, 2


def padded(size: int) -> int:
    """Triton's arrays have sizes that are powers of two, and its matrix products none below 16."""
    return max(16, pl.next_power_of_2(size))


@dataclasses.dataclass(frozen=True)
class PrefillBlockSizes:
    """block_q: queries per program. block_kv: keys per turn of its loop. Both are powers of two, at least 16."""

    block_q: int = 128
    block_kv: int = 64
    num_warps: int = 8
    num_stages: int = 3

    def __post_init__(self):
        validate(self, "block_q", "block_kv")


@dataclasses.dataclass(frozen=True)
class DecodeBlockSizes:
    """block_kv: keys per turn of a program's loop, a power of two, at least 16. rows_per_item: rows that share it.

    programs: how many of them the plan supposes to run at once.
    """

    block_kv: int = 64
    rows_per_item: int = 1
    num_warps: int = 4
    num_stages: int = 4
    programs: int = 264

    def __post_init__(self):
        validate(self, "block_kv")


BlockSizes = PrefillBlockSizes | DecodeBlockSizes


def validate(sizes: BlockSizes, *blocks: str) -> None:
    for field in dataclasses.fields(sizes):
        value = getattr(sizes, field.name)
        if field.name in blocks and (value < 16 or value & (value - 1)):
            raise ValueError(f"{field.name} is {value}; it must be a power of two, at least 16")
        if value < 1 or (field.name == "num_warps" and value & (value - 1)):
            raise ValueError(f"{field.name} is {value}; it must be positive, num_warps a power of two")


def heuristic(B: int, T: int, G: int, H: int, p: int, r_v: int, r_k: int, itemsize: int) -> BlockSizes:
    """Which way to go, and in what blocks. r_v, r_k: 0 where there is no such cache."""
    narrow = itemsize == 4 or H > 128
    if B * T > MAX_PLANNED_ROWS:
        block_q = min(32 if itemsize == 4 else 64 if narrow else 128, padded(T))
        block_kv = min(32 if itemsize == 4 else 64 if narrow or r_k else 128, 8 * p)
        return PrefillBlockSizes(block_q, block_kv, num_warps=8 if block_q == 128 else 4, num_stages=2 if narrow else 3)
    rows = min(pl.next_power_of_2(B * T), max(1, MAX_TILE_ROWS // G))
    if r_v:
        rows = min(rows, max(1, MAX_READER_LANES // padded(r_v)))
    rows = 2 ** (rows.bit_length() - 1)
    wide = rows * max(G, padded(r_v) // 4 if r_v else 0) > 32
    block_kv = min(32 if itemsize == 4 else 64, 8 * p)
    return DecodeBlockSizes(block_kv, rows, num_warps=8 if wide else 4, num_stages=2 if narrow else 3 if wide else 4)


class Operands(NamedTuple):
    """What the kernels read, whole: as arrays outside of them and as refs inside."""

    q: Float[Array, "B T N H"]
    base: Float[Array, "P K p 2*H"]
    low_rank: LowRank | None
    lora_b: LoraB | None
    page_table: PageTable
    adapter_ids: Int32[Array, " B"] | None
    inv_freq: Float[Array, " H//2"] | None


class Statics(NamedTuple):
    """H, p, r_v, r_k as in the arrays; scale: what scores are multiplied with to be base-2 logarithms, and its sign."""

    H: int
    p: int
    G: int
    r_v: int
    r_k: int
    scale: float
    negative: bool
    exact: bool  # f32: multiply as f32
    block_kv: int

    @property
    def lanes(self) -> tuple[tuple[int, int], ...]:
        """(first, size) of the pieces in which q and K are held: halves where RoPE has to turn them."""
        half = self.H // 2
        return ((0, half), (half, half)) if self.r_k else ((0, self.H),)

    def dot(self, a, b, **transposed):
        return plgpu.dot(a, b, **transposed, precision=lax.Precision.HIGHEST if self.exact else None)


class Reader(NamedTuple):
    """Whose low-rank pages are read, as scalars: the row of the page table, its adapter, how many keys, if at all."""

    row: Array
    adapter: Array
    end: Array
    on: Array


class Span(NamedTuple):
    """Keys [start, end) of a row of the page table; every query of the program sees those before `full`."""

    row: Array
    start: Array
    full: Array
    end: Array


class Softmax(NamedTuple):
    """The state of an online softmax in base 2, all f32. o_lr holds every reader's P L side by side."""

    o: Array  # [M, H]
    o_lr: Array | None  # [M, readers · r_v]
    m: Array  # [M]
    l: Array  # [M]  # noqa: E741 (the name that the flash attention papers give it)

    def add(self, scores, seen, v, low_rank_v, s: Statics) -> "Softmax":
        """The state after a block: scores [M, S] before scaling, seen [M, S] or None for all, v [S, H], L [r, S]."""
        if seen is not None:
            scores = jnp.where(seen, scores, UNSEEN)
        m = jnp.maximum(self.m, jnp.max(scores, axis=1) * s.scale)
        rescale = jnp.exp2(self.m - m)
        probs = jnp.exp2(scores * s.scale - m[:, None])
        if seen is not None:
            probs = jnp.where(seen, probs, 0.0)
        sums = self.l * rescale + jnp.sum(probs, axis=1)
        probs = probs.astype(v.dtype)
        o_lr = self.o_lr
        if o_lr is not None:
            o_lr = o_lr * rescale[:, None] + s.dot(probs, low_rank_v, trans_b=True)
        # Last, since Triton spreads warps over all products as suits the last one: over lanes, not over few rows.
        o = self.o * rescale[:, None] + s.dot(probs, v)
        return Softmax(o, o_lr, m, sums)


def iota(size: int):
    return lax.iota(jnp.int32, size)


def page_ids(table_ref, row, start, end, s: Statics) -> list:
    """Ids of the pages of the block at `start`, as scalars; 0 for pages that begin at or behind `end`."""
    first, ids = lax.div(start, s.p), []
    for i in range(max(1, s.block_kv // s.p)):
        column = jnp.minimum(first + i, table_ref.shape[1] - 1)
        ids.append(jnp.where((first + i) * s.p < end, table_ref[row, column], 0))
    return ids


def by_key(ids: list, s: Statics):
    """[S]: the page of every key of the block. Selected from scalars, which costs less than a gather."""
    pages = jnp.full((s.block_kv,), ids[0])
    for i, page in enumerate(ids[1:], 1):
        pages = jnp.where(iota(s.block_kv) >= i * s.p, page, pages)
    return pages


def slots(start, s: Statics):
    """[S]: where in its page every key of the block lies."""
    if s.block_kv >= s.p:
        return lax.rem(iota(s.block_kv), jnp.int32(s.p))
    return lax.rem(start, s.p) + iota(s.block_kv)


def masked_load(ref, *masks):
    """`ref`, 0 where one of the masks (None: everywhere true) is false; an unmasked load where there is none."""
    mask = conjunction(masks, ref.shape)
    return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))


def conjunction(masks, shape):
    masks = [mask for mask in masks if mask is not None]
    return jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), shape) if masks else None


def below(index, size: int):
    """index < size, or None where that needs no asking."""
    return None if index.size == size else index < size


def load_base(x: Operands, head, pages, at, lanes: tuple[int, int], mask):
    """[S, size]: lanes [first, first + size) of the keys' slots."""
    first, size = lanes
    lane = iota(padded(size))[None]
    ref = x.base.at[pages[:, None], head, at[:, None], first + lane]
    return masked_load(ref, below(lane, size), None if mask is None else mask[:, None])


def load_low_rank(pool_ref, ids: list[list], readers: list[Reader], start, masked: bool, s: Statics):
    """[readers · r, S]: the readers' low-rank slots one below the other, ranks padded; 0 where a reader has none.

    ids: of the block's pages, per reader.
    """
    rank = pool_ref.shape[1]
    row = iota(len(readers) * padded(rank))[:, None]
    own, keys = lax.div(row, padded(rank)), (start + iota(s.block_kv))[None]

    def own_value(values):
        return functools.reduce(lambda a, b: jnp.where(own == b[0], b[1], a), enumerate(values[1:], 1), values[0])

    pages = [by_key(own_ids, s)[None] for own_ids in ids]
    ref = pool_ref.at[own_value(pages), lax.rem(row, padded(rank)), slots(start, s)[None]]
    fits = None if padded(rank) == rank else lax.rem(row, padded(rank)) < rank
    tile = masked_load(ref, jnp.broadcast_to(own_value([u.on for u in readers]), row.shape), fits)
    # Masking the load instead would split it into single lanes.
    return jnp.where(keys < own_value([u.end for u in readers]), tile, 0) if masked else tile


def load_b(b_ref, adapter, head, lanes: tuple[int, int], on):
    """[r, size] f32: lanes [first, first + size) of an adapter's B, ranks padded; 0 where not `on`, a scalar."""
    first, size = lanes
    rank, lane = iota(padded(b_ref.shape[1]))[:, None], iota(padded(size))[None]
    b = masked_load(
        b_ref.at[adapter, rank, head, first + lane],
        *(jnp.broadcast_to(on, rank.shape), below(rank, b_ref.shape[1]), below(lane, size)),
    )
    return b.astype(jnp.float32)


def turn(low, high, cos, sin):
    return low * cos - high * sin, high * cos + low * sin


def expanded_keys(x: Operands, head, reader: Reader, ids: list, keys, start, masked: bool, s: Statics):
    """The block's keys, K + RoPE(L B), in two halves of their lanes. ids: of the reader's low-rank pages.

    A rotation by start + i is one by start, which turns the few rows of B, and then one by i, the same in every block.
    """
    assert x.low_rank is not None and x.lora_b is not None and x.inv_freq is not None
    low_rank = load_low_rank(x.low_rank.k, [ids], [reader], start, masked, s)
    lane = iota(padded(s.H // 2))
    inv_freq = masked_load(x.inv_freq.at[lane], below(lane, s.H // 2))
    b = (load_b(x.lora_b.k, reader.adapter, head, lanes, reader.on) for lanes in s.lanes)
    angle = start.astype(jnp.float32) * inv_freq
    b = turn(*b, jnp.cos(angle)[None], jnp.sin(angle)[None])
    low, high = (s.dot(low_rank, half_b.astype(low_rank.dtype), trans_a=True) for half_b in b)
    angles = iota(s.block_kv).astype(jnp.float32)[:, None] * inv_freq[None]
    turned = turn(low, high, jnp.cos(angles), jnp.sin(angles))
    return [(k.astype(jnp.float32) + t).astype(k.dtype) for k, t in zip(keys, turned, strict=True)]


def score(q: list, keys: list, s: Statics):
    return functools.reduce(jnp.add, (s.dot(*pair, trans_b=True) for pair in zip(q, keys, strict=True)))


def attend(
    x: Operands, head, q: list, limits, span: Span, readers: list[Reader], expand, s: Statics, *, split: bool
) -> Softmax:
    """Streams `span` past the queries q (pieces of [M, H]); row i of them sees keys at positions < limits[i].

    readers: whose low-rank pages are read; their values are accumulated side by side. expand: (keys, ids of the first
    reader's pages, start, masked) -> scores. split: whether blocks that all queries see get a loop without masks.
    """

    def ids_at(start):
        tables = [(x.page_table.base, span.row, span.end)]
        tables += [(x.page_table.low_rank, reader.row, reader.end) for reader in readers]
        return [page_ids(*table, start, end, s) for *table, end in tables]

    def block(masked, turn_of_loop, carry):
        state, (ids, *low_rank_ids) = carry
        start = span.start + turn_of_loop * s.block_kv
        keys, pages, at = start + iota(s.block_kv), by_key(ids, s), slots(start, s)
        held = keys < span.end if masked else None
        k = [load_base(x, head, pages, at, lanes, held) for lanes in s.lanes]
        v = load_base(x, head, pages, at, (s.H, s.H), held)
        low_rank_v = load_low_rank(x.low_rank.v, low_rank_ids, readers, start, masked, s) if s.r_v else None
        scores = expand(k, low_rank_ids and low_rank_ids[0], start, masked) if s.r_k else score(q, k, s)
        seen = keys[None] < limits[:, None] if masked else None
        # The next block's ids are read here: were they read where they are needed, Triton would take the table for one
        # more level of loads to pipeline.
        return state.add(scores, seen, v, low_rank_v, s), ids_at(start + s.block_kv)

    M = limits.shape[0]
    o_lr = jnp.zeros((M, len(readers) * padded(s.r_v)), jnp.float32) if s.r_v else None
    zeros = jnp.zeros((M, padded(s.H)), jnp.float32)
    carry = Softmax(zeros, o_lr, jnp.full((M,), UNSEEN), jnp.zeros((M,), jnp.float32)), ids_at(span.start)
    num_full = lax.div(jnp.maximum(span.full - span.start, 0), s.block_kv) if split else jnp.int32(0)
    num_blocks = lax.div(jnp.maximum(span.end - span.start, 0) + s.block_kv - 1, s.block_kv)
    if split:
        carry = lax.fori_loop(0, num_full, functools.partial(block, False), carry)
    return lax.fori_loop(num_full, num_blocks, functools.partial(block, True), carry)[0]


def prefill_kernel(x: Operands, o_ref, lse_ref, *, s: Statics, block_q: int):
    """One tile of queries of one head. o_ref [B, T, N, H]; lse_ref [B, T, N] or None."""
    T = x.q.shape[1]
    n, b = pl.program_id(0), pl.program_id(1)
    first = (pl.cdiv(T, block_q) - 1 - pl.program_id(2)) * block_q  # the longest tiles first: the short ones fill up
    head, t = lax.div(n, s.G), first + iota(block_q)
    q_start, kv_len = x.page_table.q_starts[b], x.page_table.kv_lens[b]
    positions = q_start + t
    live = (t < T) & (positions >= 0) & (positions < kv_len)
    end = jnp.minimum(jnp.minimum(first + block_q, T) + q_start, kv_len)
    span = Span(b, jnp.int32(0), jnp.minimum(q_start + first + 1, kv_len), end)

    q = [load_queries(x.q, b, t[:, None], n, (t < T)[:, None], lanes, s) for lanes in s.lanes]
    readers, expand = [], None
    if x.adapter_ids is not None:
        adapter = x.adapter_ids[b]
        reader = Reader(b, adapter, end, (adapter > 0) & (adapter < num_adapters(x)))
        readers = [reader]
        expand = lambda k, ids, start, masked: score(q, expanded_keys(x, head, reader, ids, k, start, masked, s), s)
    state = attend(x, head, q, jnp.minimum(positions + 1, kv_len), span, readers, expand, s, split=True)

    o, lane = state.o, iota(padded(s.H))[None]
    if s.r_v:
        o += s.dot(state.o_lr, load_b(x.lora_b.v, adapter, head, (0, s.H), reader.on))  # bf16 and f16 fit into TF32
    o = o / jnp.where(live, state.l, 1.0)[:, None]
    if x.adapter_ids is not None:
        o = jnp.where((adapter >= 0) & (adapter < num_adapters(x)), o, jnp.nan)
    o = jnp.where(live[:, None], o, 0.0)
    row = jnp.where(t < T, t, T)  # outside of the array: interpreted, a store that is masked off would write there
    store(o_ref.at[b, row[:, None], n, lane], o, (t < T)[:, None], below(lane, s.H))
    if lse_ref is not None:
        store(lse_ref.at[b, row, n], jnp.where(live, natural_lse(state.m, state.l), -jnp.inf), t < T)


def load_queries(q_ref, b, t, n, there, lanes: tuple[int, int], s: Statics):
    """[M, size]: lanes [first, first + size) of queries (b, t, n), each a scalar or [M, 1]; 0 where not `there`."""
    first, size = lanes
    lane = iota(padded(size))[None]
    q = masked_load(q_ref.at[b, t, n, first + lane], there, below(lane, size))
    return -q if s.negative else q


def store(ref, value, *masks):
    plgpu.store(ref, value.astype(ref.dtype), mask=conjunction(masks, ref.shape))


def natural_lse(m, sums):
    return (m + jnp.log2(sums)) * math.log(2)


def num_adapters(x: Operands) -> int:
    assert x.lora_b is not None
    return next(b for b in x.lora_b if b is not None).shape[0]


def decode_kernel(x: Operands, plan: DecodePlan, o_ref, o_lr_ref, m_ref, l_ref, *, s: Statics):
    """One item of the plan for one kv head.

    Writes unnormalised partial results: o_ref [rows, C, K, G, H], o_lr_ref [rows, C, K, G, r_v] or None, m_ref and
    l_ref [rows, C, K, G].
    """
    head, item = pl.program_id(0), pl.program_id(1)
    first, end = plan.pages[item, 0], plan.pages[item, 1]

    @pl.when(first < end)
    def _():
        decode_item(x, plan, (o_ref, o_lr_ref, m_ref, l_ref), head, item, first * s.p, end * s.p, s)


def decode_item(x: Operands, plan: DecodePlan, partial_refs, head, item, start, end, s: Statics):
    T, R = x.q.shape[1], plan.rows.shape[1]
    M = padded(R * s.G)
    slot, group = jnp.minimum(lax.div(iota(M), s.G), R - 1), lax.rem(iota(M), jnp.int32(s.G))
    rows = plan.rows.at[item, slot][...]
    there = (iota(M) < R * s.G) & (rows >= 0)
    row, limits = jnp.maximum(rows, 0), jnp.where(there, jnp.minimum(plan.limits.at[item, slot][...], end), 0)
    q_at = [index[:, None] for index in (lax.div(row, T), lax.rem(row, jnp.int32(T)), head * s.G + group, there)]
    q = [load_queries(x.q, *q_at, lanes, s) for lanes in s.lanes]
    end = jnp.max(limits)
    full = jnp.min(jnp.where(there, limits, end))
    span = Span(lax.div(plan.rows[item, 0], T), start, full, end)
    reader_of, expander_of = (
        jnp.where(there, slots_ref.at[item, slot][...], -1) for slots_ref in (plan.readers, plan.expanders)
    )

    def reader(u, classes, on):
        b = lax.div(jnp.maximum(plan.rows[item, u], 0), T)
        return Reader(b, x.adapter_ids[b], jnp.max(jnp.where(classes == u, limits, 0)), on)

    def one_reader():
        readers, expand = [], None
        if s.r_v or s.r_k:
            classes = expander_of if s.r_k else reader_of
            readers = [reader(jnp.maximum(jnp.max(classes), 0), classes, jnp.max(classes) >= 0)]
            expand = lambda k, ids, at, masked: score(q, expanded_keys(x, head, *readers, ids, k, at, masked, s), s)
        return attend(x, head, q, limits, span, readers, expand, s, split=False)

    def many_readers():
        readers = [reader(u, reader_of, plan.readers[item, u] == u) for u in range(R)] if s.r_v else []

        def expand(k, _, at, masked):
            def add(u, scores):
                def own():
                    mine = reader(u, expander_of, True)
                    ids = page_ids(x.page_table.low_rank, mine.row, at, mine.end, s)
                    keys = expanded_keys(x, head, mine, ids, k, at, masked, s)
                    return jnp.where((expander_of == u)[:, None], score(q, keys, s), scores)

                return lax.cond(plan.expanders[item, u] == u, own, lambda: scores)

            return lax.fori_loop(0, R, add, score(q, k, s))

        state = attend(x, head, q, limits, span, readers, expand, s, split=False)
        if not s.r_v:
            return state
        o_lr = state.o_lr.reshape(M, R, padded(s.r_v))
        mine = reader_of[:, None, None] == iota(R)[None, :, None]
        return state._replace(o_lr=jnp.sum(jnp.where(mine, o_lr, 0.0), axis=1))

    if R == 1 or not (s.r_v or s.r_k):
        state = one_reader()
    else:
        others = jnp.zeros((M,), bool)
        if s.r_v:
            others |= (reader_of >= 0) & (reader_of != jnp.max(reader_of))
        if s.r_k:
            others |= there & (expander_of != jnp.max(expander_of))
        state = lax.cond(jnp.max(others.astype(jnp.int32)) == 0, one_reader, many_readers)

    parts = plan.parts.at[item, slot][...]
    # Rows that are not there get an index outside: interpreted, a store that is masked off would write to it.
    at = jnp.where(there, row, x.q.shape[0] * T)
    for ref, value in zip(partial_refs, state, strict=True):
        if value is None:
            continue
        if value.ndim == 1:
            store(ref.at[at, parts, head, group], value, there)
        else:
            lane = iota(value.shape[1])[None]
            index = [i[:, None] for i in (at, parts)] + [head, group[:, None], lane]
            store(ref.at[tuple(index)], value, there[:, None], below(lane, ref.shape[-1]))


def merge_kernel(partials: Softmax, num_parts_ref, lora_b_ref, adapter_ids_ref, o_ref, lse_ref, *, block: int):
    """Merges the partial results of one row's query head, `block` at a time, and applies the row's own B.

    partials: as `decode_kernel` writes them. num_parts_ref [rows]; lora_b_ref [A, r_v, K, H] or None; adapter_ids_ref
    [B] or None; o_ref [B, T, N, H]; lse_ref [B, T, N] or None.
    """
    row, n = pl.program_id(0), pl.program_id(1)
    C, _, G, H = partials.o.shape[1:]
    T = o_ref.shape[1]
    b, t, head, group = lax.div(row, T), lax.rem(row, jnp.int32(T)), lax.div(n, G), lax.rem(n, jnp.int32(G))
    num_parts = num_parts_ref[row]

    def load(ref, parts):
        """[parts] of m or l, [parts, lanes] of o or o_lr; 0 from `num_parts` on."""
        if ref.ndim == 4:
            return masked_load(ref.at[row, parts, head, group], parts < num_parts)
        lane = iota(padded(ref.shape[4]))[None]
        there = (parts < num_parts)[:, None]
        return masked_load(ref.at[row, parts[:, None], head, group, lane], there, below(lane, ref.shape[4]))

    every = iota(padded(C))
    top = jnp.max(jnp.where(every < num_parts, load(partials.m, every), UNSEEN))

    def add(turn_of_loop, sums):
        parts = turn_of_loop * block + iota(block)
        weights = jnp.where(parts < num_parts, jnp.exp2(load(partials.m, parts) - top), 0.0)
        o, o_lr = (
            None if ref is None else so_far + jnp.sum(weights[:, None] * load(ref, parts), axis=0)
            for ref, so_far in ((partials.o, sums.o), (partials.o_lr, sums.o_lr))
        )
        return Softmax(o, o_lr, top, sums.l + jnp.sum(weights * load(partials.l, parts)))

    zeros = lambda ref: None if ref is None else jnp.zeros((padded(ref.shape[4]),), jnp.float32)
    sums = Softmax(zeros(partials.o), zeros(partials.o_lr), top, jnp.float32(0))
    sums = add(0, sums) if C <= block else lax.fori_loop(0, lax.div(num_parts + block - 1, block), add, sums)

    o, lane, live = sums.o, iota(padded(H)), num_parts > 0
    if adapter_ids_ref is not None:
        adapter, num_adapters = adapter_ids_ref[b], lora_b_ref.shape[0]
        if sums.o_lr is not None:
            on = live & (adapter > 0) & (adapter < num_adapters)
            o += jnp.sum(jnp.where(on, sums.o_lr, 0.0)[:, None] * load_b(lora_b_ref, adapter, head, (0, H), on), axis=0)
        o = jnp.where((adapter >= 0) & (adapter < num_adapters), o, jnp.nan)
    o = jnp.where(live, o / jnp.where(live, sums.l, 1.0), 0.0)
    store(o_ref.at[b, t, n, lane], o, below(lane, H))
    if lse_ref is not None:
        lse_ref[b, t, n] = jnp.where(live, natural_lse(top, sums.l), -jnp.inf)


def statics(x: Operands, sm_scale: float, block_kv: int) -> Statics:
    H, p = x.q.shape[3], x.base.shape[2]
    r_v, r_k = (0 if pool is None else pool.shape[1] for pool in x.low_rank or (None, None))
    scale, exact = abs(sm_scale) * math.log2(math.e), x.q.dtype == jnp.float32
    return Statics(H, p, x.q.shape[2] // x.base.shape[1], r_v, r_k, scale, sm_scale < 0, exact, block_kv)


def call(kernel, name: str, grid, out_shape, num_warps: int, num_stages: int, interpret: bool):
    params = plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages)
    name = f"{name}_w{num_warps}_s{num_stages}"
    return pl.pallas_call(
        kernel, grid=grid, out_shape=out_shape, compiler_params=params, interpret=interpret, name=name
    )


def results(x: Operands, return_lse: bool):
    lse = jax.ShapeDtypeStruct(x.q.shape[:3], jnp.float32) if return_lse else None
    return jax.ShapeDtypeStruct(x.q.shape, x.q.dtype), lse


def prefill(x: Operands, sizes: PrefillBlockSizes, sm_scale: float, return_lse: bool, interpret: bool):
    """(o, lse or None)."""
    B, T, N, _ = x.q.shape
    return call(
        functools.partial(prefill_kernel, s=statics(x, sm_scale, sizes.block_kv), block_q=sizes.block_q),
        f"lora_prefill_q{sizes.block_q}_kv{sizes.block_kv}",
        (N, B, pl.cdiv(T, sizes.block_q)),
        results(x, return_lse),
        *(sizes.num_warps, sizes.num_stages, interpret),
    )(x)


def decode(x: Operands, sizes: DecodeBlockSizes, sm_scale: float, return_lse: bool, interpret: bool):
    """(o, lse or None)."""
    (B, T, N, H), K, W = x.q.shape, x.base.shape[1], x.page_table.base.shape[1]
    s = statics(x, sm_scale, sizes.block_kv)
    wanted = PlanSizes(sizes.rows_per_item, max(1, sizes.block_kv // s.p), sizes.programs, heads=K)
    ids = x.adapter_ids
    if ids is not None:  # adapters that do not exist have no low-rank pages
        ids = jnp.where((ids > 0) & (ids < num_adapters(x)), ids, 0)
    plan = plan_decode(x.page_table, ids, T=T, page_size=s.p, sizes=wanted)

    def per_part(*lanes):
        return jax.ShapeDtypeStruct((B * T, wanted.max_parts(B, W), K, s.G, *lanes), jnp.float32)

    partials = call(
        functools.partial(decode_kernel, s=s),
        f"lora_decode_r{sizes.rows_per_item}_kv{sizes.block_kv}",
        (K, plan.pages.shape[0]),
        Softmax(per_part(H), per_part(s.r_v) if s.r_v else None, per_part(), per_part()),
        *(sizes.num_warps, sizes.num_stages, interpret),
    )(x, plan)
    block = min(padded(wanted.max_parts(B, W)), max(16, MERGE_ELEMENTS // padded(H)))
    return call(
        functools.partial(merge_kernel, block=block),
        f"lora_merge_{block}",
        (B * T, N),
        results(x, return_lse),
        *(MERGE_WARPS, MERGE_STAGES, interpret),
    )(partials, plan.num_parts, next((b for b in x.lora_b or () if b is not None), None), x.adapter_ids)


@functools.partial(jax.jit, static_argnames=("sizes", "sm_scale", "return_lse", "interpret"))
def run(x: Operands, *, sizes: BlockSizes, sm_scale: float, return_lse: bool, interpret: bool):
    way = prefill if isinstance(sizes, PrefillBlockSizes) else decode
    o, lse = way(x, sizes, sm_scale, return_lse, interpret)
    return (o, lse) if return_lse else o


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
    """See `api.lora_attention`; `block_sizes=None` asks the heuristic, and the type of them says which way to go."""
    (B, T, N, H), (_, K, p, _) = q.shape, base.shape
    r_v, r_k = (0 if pool is None else pool.shape[1] for pool in low_rank or (None, None))
    if p & (p - 1):
        raise NotImplementedError(f"pages of {p} slots: the page size must be a power of two")
    if H > 256 or max(r_v, r_k) > 128:
        raise NotImplementedError(f"head dim {H}, ranks {r_v} and {r_k}: at most 256 and 128 fit a program")
    sizes = block_sizes or heuristic(B, T, N // K, H, p, r_v, r_k, q.dtype.itemsize)
    x = Operands(q, base, low_rank, lora_b, page_table, adapter_ids, rope_inv_freq)
    return run(x, sizes=sizes, sm_scale=sm_scale, return_lse=return_lse, interpret=is_interpreted())
