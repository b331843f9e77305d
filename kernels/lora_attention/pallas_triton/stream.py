"""The loop of both ways through attention: blocks of keys under one online softmax.

Flash Attention 2 (arXiv 2307.08691) with a second accumulator, o_lr = P L, for the low-rank values. Pages are read
through pointers, a page id per key; low-rank keys are expanded, rotated and added to the base keys on chip.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from lragent_jax.kernels.lora_attention.arguments import LoraB, LowRank, PageTable

# Scores of keys that a query does not see: finite, or a row that sees none of a block would compute inf − inf.
UNSEEN = -1e30


def padded(size: int) -> int:
    """Triton's arrays have sizes that are powers of two, and its matrix products none below 16."""
    return max(16, pl.next_power_of_2(size))


class Operands(NamedTuple):
    """What the kernels read, whole: as arrays outside of them and as refs inside."""

    q: Float[Array, "B T N H"]
    base: Float[Array, "P K p 2*H"]
    low_rank: LowRank | None
    lora_b: LoraB | None
    page_table: PageTable
    adapter_ids: Int32[Array, " B"] | None
    inv_freq: Float[Array, " H//2"] | None
    turns: Float[Array, "2 S H//2"] | None  # cosines and sines of the angles of positions 0 to S − 1; see `turns_of`


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
    ptx: bool  # whether kernels may speak to NVIDIA's compiler

    @property
    def lanes(self) -> tuple[tuple[int, int], ...]:
        """(first, size) of the pieces in which q and K are held: halves where RoPE has to turn them."""
        half = self.H // 2
        return ((0, half), (half, half)) if self.r_k else ((0, self.H),)

    def dot(self, a, b, **transposed):
        return plgpu.dot(a, b, **transposed, precision=lax.Precision.HIGHEST if self.exact else None)

    def exp2(self, x, scale, minus):
        """2 ** (x scale − minus), `minus` of x's shape but for lanes.

        XLA has Triton round the product and scale arguments below −126 up and results down again: with the product,
        six instructions per score where two do, since what is below 2 ** −126 may as well be 0.
        """
        if not self.ptx:
            return jnp.exp2(x * scale - minus)
        args = [x, jnp.full(x.shape, scale, jnp.float32), jnp.broadcast_to(-minus, x.shape)]
        return ptx("{ .reg .f32 t; fma.rn.ftz.f32 t, $1, $2, $3; ex2.approx.ftz.f32 $0, t; }", args)

    def cos_sin(self, position, inv_freq):
        """Of the angles position · inv_freq [n], rounded to f32 before they are taken, whatever their size."""
        if self.exact or not self.ptx:
            angles = position.astype(jnp.float32) * inv_freq
            return jnp.cos(angles), jnp.sin(angles)
        turns = position.astype(jnp.float32) * (inv_freq * (0.5 / math.pi))
        angles = (turns - jnp.floor(turns)) * (2 * math.pi)  # the chip's own functions are precise near 0 only
        return ptx("cos.approx.ftz.f32 $0, $1;", [angles]), ptx("sin.approx.ftz.f32 $0, $1;", [angles])


def ptx(asm: str, args: list):
    """One f32 per element of f32 arguments of one shape, by NVIDIA's assembly language."""
    shape, constraints = jax.ShapeDtypeStruct(args[0].shape, jnp.float32), ",".join(["=f"] + ["f"] * len(args))
    return plgpu.elementwise_inline_asm(asm, args=args, constraints=constraints, pack=1, result_shape_dtypes=[shape])[0]


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
        rescale = s.exp2(self.m, 1.0, m)
        probs = s.exp2(scores, s.scale, m[:, None])
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
    part = lax.rem(lax.div(start, s.block_kv), s.p // s.block_kv)
    return part * s.block_kv + iota(s.block_kv)  # written so that Triton sees what divides it


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


class Rotations(NamedTuple):
    """RoPE's angles, for half the lanes each."""

    inv_freq: Array  # [H/2]
    cos: Array  # [S, H/2], of the angles of positions 0 to S − 1
    sin: Array


def load_rotations(x: Operands, s: Statics) -> Rotations:
    half, key = s.H // 2, iota(s.block_kv)[:, None]
    lane = iota(padded(half))
    cos, sin = (masked_load(x.turns.at[i, key, lane[None]], below(lane[None], half)) for i in range(2))
    return Rotations(masked_load(x.inv_freq.at[lane], below(lane, half)), cos, sin)


def turn(low, high, cos, sin):
    return low * cos - high * sin, high * cos + low * sin


def expanded_keys(b: list, low_rank, rotations: Rotations, keys: list, start, s: Statics) -> list:
    """The block's keys, K + RoPE(L B), in halves of their lanes like `b` [r, H/2] and `keys`; low_rank: L [r, S].

    A rotation by start + i is one by start, which turns the few rows of B, and then one by i, the same in every block.
    """
    turned_b = turn(*b, *(x[None] for x in s.cos_sin(start, rotations.inv_freq)))
    expanded = (s.dot(low_rank, half.astype(low_rank.dtype), trans_a=True) for half in turned_b)
    turned = turn(*expanded, rotations.cos.astype(jnp.float32), rotations.sin.astype(jnp.float32))
    return [(k.astype(jnp.float32) + more).astype(k.dtype) for k, more in zip(keys, turned, strict=True)]


def score(q: list, keys: list, s: Statics):
    return functools.reduce(jnp.add, (s.dot(*pair, trans_b=True) for pair in zip(q, keys, strict=True)))


def load_key_b(x: Operands, head, reader: Reader, s: Statics) -> list:
    return [load_b(x.lora_b.k, reader.adapter, head, lanes, reader.on) for lanes in s.lanes]


def expand_for(x: Operands, head, q: list, reader: Reader, s: Statics):
    """`expand`, as `attend` calls it, for queries that all belong to `reader`; None without low-rank keys."""
    if not s.r_k:
        return None
    b, rotations = load_key_b(x, head, reader, s), load_rotations(x, s)

    def expand(keys, ids, start, masked):
        low_rank = load_low_rank(x.low_rank.k, [ids], [reader], start, masked, s)
        return score(q, expanded_keys(b, low_rank, rotations, keys, start, s), s)

    return expand


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


def statics(x: Operands, sm_scale: float, block_kv: int, interpret: bool) -> Statics:
    H, p = x.q.shape[3], x.base.shape[2]
    r_v, r_k = (0 if pool is None else pool.shape[1] for pool in x.low_rank or (None, None))
    ptx = not interpret and "rocm" not in jax.devices()[0].client.platform_version
    scale, exact = abs(sm_scale) * math.log2(math.e), x.q.dtype == jnp.float32
    return Statics(H, p, x.q.shape[2] // x.base.shape[1], r_v, r_k, scale, sm_scale < 0, exact, block_kv, ptx)


def call(kernel, name: str, grid, out_shape, num_warps: int, num_stages: int, interpret: bool):
    params = plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages)
    name = f"{name}_w{num_warps}_s{num_stages}"
    return pl.pallas_call(
        kernel, grid=grid, out_shape=out_shape, compiler_params=params, interpret=interpret, name=name
    )


def results(x: Operands, return_lse: bool):
    lse = jax.ShapeDtypeStruct(x.q.shape[:3], jnp.float32) if return_lse else None
    return jax.ShapeDtypeStruct(x.q.shape, x.q.dtype), lse
