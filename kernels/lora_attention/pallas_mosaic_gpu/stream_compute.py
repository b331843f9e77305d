"""The compute warpgroups of decode's streaming kernel: one online softmax per query row, and its record."""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.registers import (
    PER_ROW,
    WGMMA,
    full,
    load,
    multiply_add,
    over_lanes,
    product,
)
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.stream_feed import low_rank_block, with_barrier
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.stream_shapes import BLOCK_KV, BLOCK_Q, LANES, Shapes

# Scores of keys that a row does not see, far below the least maximum: exp2 of the difference is 0 however the products
# in between are rounded.
UNSEEN, LEAST = -1e30, -1e20
MOST_AT_ONCE = 2  # products with low-rank values under way: each takes registers for its weights


class State(NamedTuple):
    """A warpgroup's online softmax, f32, in registers."""

    o: Float[Array, "64 H"]
    o_lr: Float[Array, "64 joined*r_v"] | None  # [64, r_v] from `own_lanes` on
    m: Float[Array, " 64"]
    l: Float[Array, " 64"]  # noqa: E741 (the name that the flash attention papers give it)


def attend(refs, item, span, num_blocks, before, warpgroup, shapes: Shapes) -> State:
    """A compute warpgroup: 64 query rows over the blocks of the item that are its turn, `before` of the lane's gone."""
    H, r, width = shapes.H, shapes.r_v, shapes.joined * shapes.r_v
    start, full_end, held_end = span[0] * shapes.p, refs.meta[item, 3], refs.meta[item, 4]
    limits = load(refs.limits.at[item], PER_ROW, optimized=False)
    if r:
        reader_of_row = load(refs.readers.of_row.at[item], PER_ROW, optimized=False)
        product_of_row = reader_of_row >> int(math.log2(shapes.joined))  # -1, no reader, stays -1
        num_readers = refs.readers.count[item]
    if shapes.r_k:  # the queries stay in shared memory: rebuilding keys takes the registers
        lax.fori_loop(0, refs.expanders.count[item], lambda e, _: plgpu.barrier_wait(refs.b_ready.at[e]), None)
        pl.when(warpgroup == 0)(lambda: tile_queries(refs))
        plgpu.barrier_wait(refs.q_tiled_ready)
        q = refs.q_tiled
    else:
        plgpu.barrier_wait(refs.q_ready)
        q = load(refs.q_smem, WGMMA, optimized=False)
        if not shapes.one_item:
            plgpu.commit_smem()  # or the copy engine might overtake this read with the next item's queries
    if not shapes.one_at_a_time:
        plgpu.barrier_arrive(refs.q_read)
    turn = jnp.int32(shapes.compute)
    own = lax.rem(warpgroup + turn - lax.rem(before, turn), turn)  # the first block that is the warpgroup's turn

    def block(i, state: State, masked: bool) -> State:
        j = before + own + turn * i
        stage, ready = lax.rem(j, jnp.int32(shapes.stages)), lax.rem(j, jnp.int32(shapes.ready))
        position = start + (own + turn * i) * BLOCK_KV
        plgpu.barrier_wait(refs.kv_ready.at[ready])
        k, v = refs.kv_smem.at[stage, :, pl.ds(0, H)], refs.kv_smem.at[stage, :, pl.ds(H, H)]
        if shapes.r_k:
            scores = own_scores(refs, q, stage, j, item, warpgroup, shapes)
        else:
            scores = product(q, k.transpose((1, 0)), interpret=shapes.interpret)
        if masked:
            keys = position + plgpu.broadcasted_iota(jnp.int32, (BLOCK_Q, BLOCK_KV), 1, layout=WGMMA)
            scores = jnp.where(keys < over_lanes(limits, BLOCK_KV), scores, UNSEEN)
            zero_values(v, held_end - position, H)
        m = jnp.maximum(state.m, scores.max(axis=1) * shapes.scale)
        rescale = jnp.exp2(state.m - m)
        probs = jnp.exp2(scores * shapes.scale - over_lanes(m, BLOCK_KV))
        sums = state.l * rescale + probs.sum(axis=1)
        probs = probs.astype(refs.q.dtype)
        o, o_lr = state.o * over_lanes(rescale, H), None
        if r:
            o, o_lr = with_low_rank(o, state.o_lr * over_lanes(rescale, width), probs, v, j, position, masked)
        else:
            o = product(probs, v, o, interpret=shapes.interpret)
        if shapes.interpret:  # products read there as loads do
            plgpu.commit_smem()
        plgpu.barrier_arrive(refs.read.at[stage])
        return State(o, o_lr, m, sums)

    def low_rank_values(probs, n, j, position, masked) -> list:
        """Product number n of the weights with low-rank values, which are waited for."""
        at, slots = low_rank_block(j, n, shapes.products, shapes), shapes.page_slots
        with_barrier(refs.v_ready, j, n, shapes.products, shapes, plgpu.barrier_wait)
        if masked:
            zero_low_rank(refs, item, n, num_readers, at, position, shapes)

        def own(part):
            return jnp.where(over_lanes(product_of_row, part.shape[1]) == n, part, jnp.zeros((), part.dtype))

        pages = range(shapes.pages_per_block)
        parts = [probs if slots == BLOCK_KV else probs[:, i * slots : (i + 1) * slots] for i in pages]
        return [(functools.partial(own, part), refs.v_smem.at[at, i].transpose((1, 0))) for i, part in enumerate(parts)]

    def with_low_rank(o, o_lr, probs, v, j, position, masked):
        def add(n: int):
            """All values and the first n products of low-rank ones."""
            terms = [term for i in range(n) for term in low_rank_values(probs, jnp.int32(i), j, position, masked)]
            if not n:
                return product(probs, v, o, interpret=shapes.interpret), o_lr
            return multiply_add([(o, [(probs, v)]), (o_lr, terms)], interpret=shapes.interpret)

        def one(n, o_lr):
            terms = low_rank_values(probs, n, j, position, masked)
            return multiply_add([(o_lr, terms)], interpret=shapes.interpret)[0]

        num_products = lax.div(num_readers + shapes.joined - 1, jnp.int32(shapes.joined))
        at_once = min(shapes.products, MOST_AT_ONCE)
        branches = [functools.partial(add, n) for n in range(at_once + 1)]
        o, o_lr = lax.switch(jnp.minimum(num_products, at_once), branches)
        if shapes.products > at_once:
            o_lr = lax.fori_loop(at_once, num_products, one, o_lr)
        return o, o_lr

    o_lr = full((BLOCK_Q, width), 0, WGMMA) if r else None
    state = State(full((BLOCK_Q, H), 0, WGMMA), o_lr, full((BLOCK_Q,), LEAST, PER_ROW), full((BLOCK_Q,), 0, PER_ROW))
    unmasked = jnp.clip(lax.div(full_end - start, jnp.int32(BLOCK_KV)), 0, num_blocks)
    unmasked, turns = (lax.div(n - own + turn - 1, turn) for n in (unmasked, num_blocks))
    state = lax.fori_loop(0, unmasked, functools.partial(block, masked=False), state)
    state = lax.fori_loop(unmasked, turns, functools.partial(block, masked=True), state)
    return state._replace(o_lr=own_lanes(state.o_lr, reader_of_row, shapes)) if r else state


def tile_queries(refs) -> None:
    """The queries in the layout that the matrix unit reads from shared memory, for all."""
    plgpu.barrier_wait(refs.q_ready)
    refs.q_tiled[...] = load(refs.q_smem, WGMMA, optimized=False)
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.q_tiled_ready)


def own_lanes(o_lr, reader_of_row, shapes: Shapes):
    """Of the products with several readers' low-rank values each row's with its own; 0 for rows without."""
    if shapes.joined == 1:
        return o_lr
    mine = jnp.where(reader_of_row < 0, -1, reader_of_row & (shapes.joined - 1))
    r = shapes.r_v
    parts = [jnp.where(over_lanes(mine, r) == n, o_lr[:, n * r : (n + 1) * r], 0.0) for n in range(shapes.joined)]
    return functools.reduce(jnp.add, parts)


def hand_over(refs, state: State, before, shapes: Shapes):
    """The second compute warpgroup leaves its result to the first, where the queries were or the result before."""
    if shapes.one_item:
        plgpu.barrier_wait(refs.q_read)
    elif not shapes.one_at_a_time:
        pl.when(before > 0)(lambda: plgpu.barrier_wait(refs.result_gone))
    refs.o_smem[...] = state.o
    if state.o_lr is not None:
        refs.aux_smem[:, pl.ds(0, state.o_lr.shape[1])] = state.o_lr
    refs.m_smem[...], refs.l_smem[...] = state.m, state.l
    plgpu.barrier_arrive(refs.handed_over)


def join(refs, state: State) -> State:
    """What the first warpgroup and the second have seen together."""
    plgpu.barrier_wait(refs.handed_over)
    other_m, other_l = (load(x, PER_ROW, optimized=False) for x in (refs.m_smem, refs.l_smem))
    m = jnp.maximum(state.m, other_m)
    own, other = jnp.exp2(state.m - m), jnp.exp2(other_m - m)

    def both(mine, ref):
        width = mine.shape[1]
        theirs = load(ref, WGMMA, optimized=False)
        return mine * over_lanes(own, width) + theirs * over_lanes(other, width)

    o_lr = None if state.o_lr is None else both(state.o_lr, refs.aux_smem.at[:, pl.ds(0, state.o_lr.shape[1])])
    return State(both(state.o, refs.o_smem), o_lr, m, state.l * own + other_l * other)


def finish(refs, item, head, first_record, state: State, shapes: Shapes):
    """Writes every row's record; which is the first one's has been looked up."""
    r = shapes.r_v
    if not shapes.tells_of_results:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the result of the item before, if there is one
    refs.o_smem[...] = state.o
    if state.o_lr is not None:
        refs.aux_smem[:, pl.ds(0, r)] = state.o_lr
    lane = plgpu.broadcasted_iota(jnp.int32, (BLOCK_Q, 8), 1, layout=WGMMA)
    refs.aux_smem[:, pl.ds(r, 8)] = jnp.where(lane == 0, over_lanes(state.m, 8), over_lanes(state.l, 8))
    # All lookups at once, in front of the branches that they do not pass: one after another, each takes as long as all.
    records = [first_record, *(refs.records[item, slot] for slot in range(1, shapes.R))]
    plgpu.commit_smem()
    for slot, number in enumerate(records):

        @pl.when(number >= 0)
        def _(slot=slot, number=number):
            rows, record = pl.ds(slot * shapes.G, shapes.G), refs.partial.at[number, head]
            aux = record.at[:, pl.ds(shapes.aux_lane, shapes.aux_width)]
            plgpu.copy_smem_to_gmem(refs.o_smem.at[rows], record.at[:, pl.ds(0, shapes.H)])
            plgpu.copy_smem_to_gmem(refs.aux_smem.at[rows], aux)

    if shapes.tells_of_results:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(refs.result_gone)


def own_scores(refs, q, stage, j, item, warpgroup, shapes: Shapes):
    """Scores of the block, with keys K_base + RoPE(L_k B_k) for rows with low-rank keys.

    One adapter's keys are rebuilt where the base keys are. Of several, each gets its own in turn.
    """
    k = refs.kv_smem.at[stage, :, pl.ds(0, shapes.H)]
    count = refs.expanders.count[item]
    if shapes.readers == 1:
        pl.when(count > 0)(lambda: rebuild_keys(refs, jnp.int32(0), stage, j, k, shapes))
        return product(q, k.transpose((1, 0)), interpret=shapes.interpret)
    own_k = refs.own_k.at[warpgroup]
    adapter_of_row = load(refs.expanders.of_row.at[item], PER_ROW, optimized=False)

    def one(e, scores):
        rebuild_keys(refs, e, stage, j, own_k, shapes)
        own = product(q, own_k.transpose((1, 0)), interpret=shapes.interpret)
        return jnp.where(over_lanes(adapter_of_row, BLOCK_KV) == e, own, scores)

    return lax.fori_loop(0, count, one, product(q, k.transpose((1, 0)), interpret=shapes.interpret))


def rebuild_keys(refs, e, stage, j, out, shapes: Shapes) -> None:
    """out = K_base + RoPE(L_k B_k) of the item's e-th adapter, half of the lanes at a time as RoPE pairs them."""
    half = shapes.H // 2
    low_lanes, high_lanes = pl.ds(0, half), pl.ds(half, half)
    with_barrier(refs.k_ready, j, e, shapes.readers, shapes, plgpu.barrier_wait)
    low_rank, b = refs.k_smem.at[stage * shapes.readers + e, 0].transpose((1, 0)), refs.b_smem.at[e]
    low = product(low_rank, b.at[:, low_lanes], interpret=shapes.interpret)
    high = product(low_rank, b.at[:, high_lanes], interpret=shapes.interpret)

    def read(ref):
        return load(ref, WGMMA).astype(jnp.float32)

    cos, sin = read(refs.rope_smem.at[stage, :, low_lanes]), read(refs.rope_smem.at[stage, :, high_lanes])
    for lanes, added in ((low_lanes, low * cos - high * sin), (high_lanes, high * cos + low * sin)):
        base = read(refs.kv_smem.at[stage, :, lanes])
        out[:, lanes] = (base + added).astype(refs.q.dtype)
    plgpu.commit_smem()


def zero_values(values, held, H: int):
    """Zeroes slots ≥ `held` of a block of values: what lies there was never written, and 0 · NaN is NaN."""
    slots = plgpu.broadcasted_iota(jnp.int32, (BLOCK_KV, H), 0, layout=WGMMA)
    values[...] = jnp.where(slots < held, load(values, WGMMA), jnp.zeros((), values.dtype))
    plgpu.commit_smem()


def zero_low_rank(refs, item, n, num_readers, at, position, shapes: Shapes) -> None:
    """The same for a block of low-rank values, each reader's own, through a flat view of the buffer.

    No register layout fits r < 64 rows of a swizzled buffer. Flat, it is plain: rows of `page_slots`, in which the
    number of a 16-byte chunk has the number of its 128-byte line added to it, bit by bit. Where one buffer holds all of
    an item's readers, the other lanes are nobody's.
    """
    dtype, rows, slots = refs.q.dtype, shapes.joined * shapes.r_v, shapes.page_slots
    together = math.gcd(shapes.r_v * slots, 8 * LANES)
    turns = shapes.r_v * slots // together
    layout = plgpu.Layout.WG_STRIDED((together,), vec_size=together // LANES)
    row_bytes = 2 * slots

    def reader(u, _):
        number = jnp.minimum(n * shapes.joined + u, jnp.maximum(num_readers - 1, 0))
        held = refs.readers.limits[item, number] - position

        if shapes.interpret:  # buffers have no layout there
            for i in range(shapes.pages_per_block):
                values = refs.v_smem.at[at, i, pl.ds(u * shapes.r_v, shapes.r_v)]
                slot = i * slots + lax.broadcasted_iota(jnp.int32, values.shape, 1)
                values[...] = jnp.where(slot < held, values[...], jnp.zeros((), dtype))
            return

        def some(turn, _):
            page, part = lax.div(turn, jnp.int32(turns)), lax.rem(turn, jnp.int32(turns))
            first = (page * rows + u * shapes.r_v) * slots + part * together
            byte = (first + plgpu.broadcasted_iota(jnp.int32, (together,), 0, layout=layout)) * 2
            byte = byte ^ (((byte >> 7) & (row_bytes // 16 - 1)) << 4)
            slot = page * slots + lax.rem(byte, jnp.int32(row_bytes)) // 2
            flat = refs.v_flat.at[at, pl.ds(first, together)]
            flat[...] = jnp.where(slot < held, load(flat, layout), jnp.zeros((), dtype))
            return

        lax.fori_loop(0, shapes.pages_per_block * turns, some, None)

    there = jnp.where(num_readers > shapes.joined, shapes.joined, num_readers)
    lax.fori_loop(0, there, reader, None)
    plgpu.commit_smem()
