"""Few queries per row against long caches, on Hopper: the keys split over the chip, then one merge that applies B.

`stream` takes one item of a `DecodePlan` and one kv head: a memory warpgroup brings blocks of 64 keys in by TMA,
several ahead; one or two compute warpgroups take them in turn, each with all 64 query rows (the item's rows, G heads each)
under an online softmax of its own, with the low-rank accumulator beside the ordinary one, and join at the end.
Split-KV after Flash-Decoding, the accumulators after LRAgent's Flash-LoRA-Attention (arXiv 2602.01053).

A partial result is a record in f32: o in lanes [0, H), and from lane max(H, 128) on o_lr, then m, then l.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from lragent_jax.kernels.lora_attention.arguments import LoraB, LowRank, PageTable
from lragent_jax.kernels.lora_attention.decode_plan import DecodePlan, PlanSizes, before, plan_decode

BLOCK_Q = BLOCK_KV = 64  # a warpgroup's matrix instruction takes 64 rows; 64 keys are one 128-byte row of low-rank
# Scores of keys that a row does not see, far below the least maximum: exp2 of the difference is 0 however the products
# in between are rounded.
UNSEEN, LEAST = -1e30, -1e20
LOG2_E = math.log2(math.e)
LANES = 128  # threads of a warpgroup, one f32 each
SMEM_BYTES = 227 * 1024
MAX_BARRIERS = 32  # in one group
TWO_PI_HIGH, TWO_PI_LOW = 6.28125, 2 * math.pi - 6.28125

COMPILER = functools.partial(
    plgpu.CompilerParams, approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
)
WGMMA, PER_ROW, PER_COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


class Readers(NamedTuple):
    """Whose low-rank pages an item reads, each once, and which of them a query row belongs to."""

    count: Int32[Array, " I"]
    rows: Int32[Array, "I n"]  # the row whose table is followed
    limits: Int32[Array, "I n"]  # slots at positions < limit are written
    of_row: Int32[Array, "I 64"]  # −1: none


def pad_rows(per_slot: Int32[Array, "I R"], G: int, fill: int) -> Int32[Array, "I 64"]:
    """From the item's slots to the query rows of its tile."""
    per_row = jnp.repeat(per_slot, G, axis=1)
    return jnp.pad(per_row, ((0, 0), (0, BLOCK_Q - per_row.shape[1])), constant_values=fill)


def readers_of(plan: DecodePlan, first_slots: Int32[Array, "I R"], G: int, most: int) -> Readers:
    slots = jnp.arange(plan.rows.shape[1], dtype=jnp.int32)
    first = first_slots == slots
    ordinals = before(first.astype(jnp.int32))
    of_slot = jnp.where(first_slots < 0, -1, jnp.take_along_axis(ordinals, jnp.maximum(first_slots, 0), axis=1))
    own = of_slot[:, None] == jnp.arange(most, dtype=jnp.int32)[:, None]  # [I, n, R]
    return Readers(
        count=first.sum(axis=1, dtype=jnp.int32),
        rows=jnp.max(jnp.where(own & first[:, None], plan.rows[:, None], 0), axis=-1),
        limits=jnp.max(jnp.where(own, plan.limits[:, None], 0), axis=-1),
        of_row=pad_rows(of_slot, G, -1),
    )


def tiled(*shape: int, dtype, swizzle: int = 128):
    """A buffer in shared memory in the layout that TMA writes and wgmma reads."""
    lanes = swizzle // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(swizzle))
    )


def interpreter(interpret: bool) -> dict:
    """What `plgpu.kernel` takes to run interpreted, races detected. Public from JAX 0.11.2 on."""
    return {"interpret": plgpu.InterpretGPUParams(detect_races=True)} if interpret else {}


def product(a, b, acc=None, *, interpret: bool):
    """acc + a b on the matrix unit, in f32; b, and a if it is no array, in shared memory."""
    if interpret:  # wgmma on values in registers is not interpreted
        total = jnp.dot(a if isinstance(a, jax.Array) else a[...], b[...], preferred_element_type=jnp.float32)
        return total if acc is None else acc + total
    if acc is None:
        shape = (a.shape[0], b.shape[1])

        def compute(acc_ref):
            plgpu.wgmma(acc_ref, a, b)
            return acc_ref[...]

        return pl.run_scoped(compute, plgpu.ACC(shape, jnp.float32))
    return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, a, b))(plgpu.ACC.init(acc))


def full(shape, value, layout, dtype=jnp.float32):
    return plgpu.layout_cast(jnp.full(shape, value, dtype), layout)


def over_lanes(per_row, width: int):
    return lax.broadcast_in_dim(per_row, (BLOCK_Q, width), (0,))


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What `stream` is compiled for."""

    T: int
    K: int
    G: int
    H: int
    p: int
    R: int  # rows per item
    r_v: int
    r_k: int
    readers: int  # the most low-rank pages that an item reads per column
    stages: int
    compute: int  # warpgroups that compute
    scale: float  # of scores, for base 2
    interpret: bool = False

    @property
    def ready(self) -> int:
        """Barriers that tell of blocks: a multiple of the warpgroups, so that each always waits for the same ones."""
        return self.stages * (1 if self.stages % self.compute == 0 else self.compute)

    @property
    def page_slots(self) -> int:
        """Slots of a page that one block takes."""
        return min(self.p, BLOCK_KV)

    @property
    def pages_per_block(self) -> int:
        return BLOCK_KV // self.page_slots

    @property
    def blocks_per_page(self) -> int:
        return max(1, self.p // BLOCK_KV)

    def smem_bytes(self) -> int:
        """Shared memory, nearly: what the buffers take, and some for alignment and barriers."""
        item = BLOCK_Q * 4 * (self.H + self.aux_width) + 4096
        if self.r_k:
            item += 2 * self.H * (BLOCK_Q + self.compute * BLOCK_KV + self.readers * self.r_k)
        stage = BLOCK_KV * 2 * (2 * self.H + self.readers * (self.r_v + self.r_k))
        return item + self.stages * stage

    def fitted(self) -> "Shapes":
        """The same with fewer stages, then with fewer rows per item, so that shared memory and barriers suffice."""
        fits = self
        while fits.smem_bytes() > SMEM_BYTES or fits.stages * fits.readers > MAX_BARRIERS:
            if fits.stages > 2:
                fits = dataclasses.replace(fits, stages=fits.stages - 1)
            else:
                fewer = (fits.R + 1) // 2
                fits = dataclasses.replace(fits, R=fewer, readers=min(fits.readers, fewer), stages=self.stages)
        return fits

    @property
    def aux_lane(self) -> int:
        return max(self.H, LANES)

    @property
    def aux_width(self) -> int:
        """Lanes for o_lr, m and l. TMA takes 128-byte steps through shared memory."""
        return -(-(self.r_v + 2) // 32) * 32

    @property
    def record(self) -> int:
        return self.aux_lane + LANES


def page_of_block(j, span, table, shapes: Shapes, i: int = 0):
    """(page, its first slot that counts) of block j of the item's range; `i`: which of the block's pages.

    Columns past the range are read as its last: always a page that may be read, and its keys are masked.
    """
    first, end = span
    if shapes.blocks_per_page == 1:
        return table[jnp.minimum(first + j * shapes.pages_per_block + i, end - 1)], 0
    per_page = jnp.int32(shapes.blocks_per_page)
    return table[first + lax.div(j, per_page)], lax.rem(j, per_page) * BLOCK_KV


def stream_kernel(refs, shapes: Shapes):
    """One item and kv head; see the module."""
    item, head, warpgroup = lax.axis_index("item"), lax.axis_index("head"), lax.axis_index("warpgroup")
    first, end = refs.meta[item, 0], refs.meta[item, 1]

    @pl.when(first < end)
    def _():
        per_block = jnp.int32(shapes.pages_per_block)
        num_blocks = lax.div(end - first + per_block - 1, per_block) * shapes.blocks_per_page

        @pl.when(warpgroup == shapes.compute)
        def _():
            if shapes.compute == 2:
                plgpu.set_max_registers(64, action="decrease")
            bring(refs, item, head, (first, end), num_blocks, shapes)

        @pl.when(warpgroup < shapes.compute)
        def _():
            if shapes.compute == 2:
                plgpu.set_max_registers(216, action="increase")
            state = attend(refs, item, head, (first, end), num_blocks, warpgroup, shapes)
            if shapes.compute == 1:
                finish(refs, item, head, state, shapes)
            else:
                pl.when(warpgroup == 1)(lambda: hand_over(refs, state))
                pl.when(warpgroup == 0)(lambda: finish(refs, item, head, join(refs, state), shapes))


def bring(refs, item, head, span, num_blocks, shapes: Shapes):
    """The memory warpgroup: the item's queries, then block after block into the stage that was read longest ago."""
    for slot in range(shapes.R):
        row = jnp.maximum(refs.rows[item, slot], 0)
        plgpu.copy_gmem_to_smem(refs.q.at[row, head], refs.q_smem.at[pl.ds(slot * shapes.G, shapes.G)], refs.q_ready)
    leader = refs.meta[item, 2]
    if shapes.r_k:
        bring_expansion(refs, item, head)

    def step(j, _):
        stage, ready = lax.rem(j, jnp.int32(shapes.stages)), lax.rem(j, jnp.int32(shapes.ready))
        pl.when(j >= shapes.stages)(lambda: plgpu.barrier_wait(refs.read.at[stage]))
        for i in range(shapes.pages_per_block):
            page, start = page_of_block(j, span, refs.table.at[leader], shapes, i)
            kv = refs.kv_smem.at[stage, pl.ds(i * shapes.page_slots, shapes.page_slots)]
            slots = refs.base.at[page, head, pl.ds(start, shapes.page_slots)]
            plgpu.copy_gmem_to_smem(slots, kv, refs.kv_ready.at[ready])
        if shapes.r_k:
            bring_low_rank(refs, refs.expanders, item, j, span, shapes, refs.low_rank_k, refs.k_smem, refs.k_ready)
        if shapes.r_v:
            bring_low_rank(refs, refs.readers, item, j, span, shapes, refs.low_rank_v, refs.v_smem, refs.v_ready)
        return None

    lax.fori_loop(0, num_blocks, step, None)


def bring_expansion(refs, item, head):
    """B of every adapter whose keys are rebuilt, and the queries in the layout that the matrix unit reads."""

    def one(e, _):
        b = refs.lora_b_k.at[refs.expander_ids[item, e], :, head]
        plgpu.copy_gmem_to_smem(b, refs.b_smem.at[e], refs.b_ready.at[e])
        return None

    lax.fori_loop(0, refs.expanders.count[item], one, None)
    plgpu.barrier_wait(refs.q_ready)
    refs.q_tiled[...] = plgpu.load(refs.q_smem, layout=WGMMA, optimized=False)
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.q_tiled_ready)


def with_barrier(ready, j, u, shapes: Shapes, use) -> None:
    """use(the barrier that tells of reader u's low-rank pages of block j): of those whose turn block j is."""
    turn, own = lax.div(j, jnp.int32(shapes.compute)), lax.rem(j, jnp.int32(shapes.compute))
    index = lax.rem(turn, jnp.int32(shapes.stages)) * shapes.readers + u
    for warpgroup, barriers in enumerate(ready):
        pl.when(own == warpgroup)(lambda barriers=barriers: use(barriers.at[index]))


def bring_low_rank(refs, readers, item, j, span, shapes: Shapes, pool, smem, ready):
    """A block of every reader's low-rank pages. Page ids are read some at a time: the reads' latencies overlap."""
    count = readers.count[item]
    together = min(4, shapes.readers)

    def some(turn, _):
        for i in range(shapes.pages_per_block):
            us = [turn * together + n for n in range(together)]
            rows = [lax.div(readers.rows[item, jnp.minimum(u, count - 1)], jnp.int32(shapes.T)) for u in us]
            pages = [page_of_block(j, span, refs.low_rank_table.at[row], shapes, i) for row in rows]
            for u, (page, start) in zip(us, pages, strict=True):
                at = lax.rem(j, jnp.int32(shapes.stages)) * shapes.readers + u

                @pl.when(u < count)
                def _(at=at, u=u, page=page, start=start, i=i):
                    slots = pool.at[page, :, pl.ds(start, shapes.page_slots)]
                    with_barrier(
                        ready, j, u, shapes, lambda told: plgpu.copy_gmem_to_smem(slots, smem.at[at, i], told)
                    )

        return None

    lax.fori_loop(0, lax.div(count + together - 1, jnp.int32(together)), some, None)


class State(NamedTuple):
    """A warpgroup's online softmax, f32, in registers."""

    o: Float[Array, "64 H"]
    o_lr: Float[Array, "64 r_v"] | None
    m: Float[Array, " 64"]
    l: Float[Array, " 64"]  # noqa: E741 (the name that the flash attention papers give it)


def attend(refs, item, head, span, num_blocks, warpgroup, shapes: Shapes) -> State:
    """A compute warpgroup: 64 query rows over the blocks of the item that are its turn."""
    H, r = shapes.H, shapes.r_v
    start, full_end, held_end = span[0] * shapes.p, refs.meta[item, 3], refs.meta[item, 4]
    limits = plgpu.load(refs.limits.at[item], layout=PER_ROW, optimized=False)
    reader_of_row = plgpu.load(refs.readers.of_row.at[item], layout=PER_ROW, optimized=False) if r else None
    if shapes.r_k:  # the queries stay in shared memory: rebuilding keys takes the registers
        plgpu.barrier_wait(refs.q_tiled_ready)
        lax.fori_loop(0, refs.expanders.count[item], lambda e, _: plgpu.barrier_wait(refs.b_ready.at[e]), None)
        q = refs.q_tiled
    else:
        plgpu.barrier_wait(refs.q_ready)
        q = plgpu.load(refs.q_smem, layout=WGMMA, optimized=False)
    plgpu.barrier_arrive(refs.q_read)

    def block(i, state: State, masked: bool) -> State:
        j = shapes.compute * i + warpgroup
        stage, ready = lax.rem(j, jnp.int32(shapes.stages)), lax.rem(j, jnp.int32(shapes.ready))
        position = start + j * BLOCK_KV
        plgpu.barrier_wait(refs.kv_ready.at[ready])
        k, v = refs.kv_smem.at[stage, :, pl.ds(0, H)], refs.kv_smem.at[stage, :, pl.ds(H, H)]
        scores = product(q, k.transpose((1, 0)), interpret=shapes.interpret)
        if shapes.r_k:
            scores = own_scores(refs, scores, j, stage, position, item, warpgroup, shapes)
        if masked:
            keys = position + plgpu.broadcasted_iota(jnp.int32, (BLOCK_Q, BLOCK_KV), 1, layout=WGMMA)
            scores = jnp.where(keys < over_lanes(limits, BLOCK_KV), scores, UNSEEN)
            zero_values(v, held_end - position, H)
        m = jnp.maximum(state.m, scores.max(axis=1) * shapes.scale)
        rescale = jnp.exp2(state.m - m)
        probs = jnp.exp2(scores * shapes.scale - over_lanes(m, BLOCK_KV))
        sums = state.l * rescale + probs.sum(axis=1)
        o = product(probs.astype(refs.q.dtype), v, state.o * over_lanes(rescale, H), interpret=shapes.interpret)
        o_lr = None
        if r:
            o_lr = read_low_rank(state.o_lr * over_lanes(rescale, r), probs, j, stage, position, masked)
        plgpu.barrier_arrive(refs.read.at[stage])
        return State(o, o_lr, m, sums)

    def read_low_rank(o_lr, probs, j, stage, position, masked):
        slots = shapes.page_slots

        def one(u, o_lr):
            at = stage * shapes.readers + u
            with_barrier(refs.v_ready, j, u, shapes, plgpu.barrier_wait)
            if masked:
                zero_low_rank(refs, at, refs.readers.limits[item, u] - position, shapes)
            own = jnp.where(over_lanes(reader_of_row, BLOCK_KV) == u, probs, 0.0).astype(refs.q.dtype)
            for i in range(shapes.pages_per_block):
                part = own if slots == BLOCK_KV else own[:, i * slots : (i + 1) * slots]
                page = refs.v_smem.at[at, i].transpose((1, 0))
                o_lr = product(part, page, o_lr, interpret=shapes.interpret)
            return o_lr

        return lax.fori_loop(0, refs.readers.count[item], one, o_lr)

    o_lr = full((BLOCK_Q, r), 0, WGMMA) if r else None
    state = State(full((BLOCK_Q, H), 0, WGMMA), o_lr, full((BLOCK_Q,), LEAST, PER_ROW), full((BLOCK_Q,), 0, PER_ROW))
    unmasked = jnp.clip(lax.div(full_end - start, jnp.int32(BLOCK_KV)), 0, num_blocks)
    turn = jnp.int32(shapes.compute)
    unmasked, turns = (lax.div(n - warpgroup + turn - 1, turn) for n in (unmasked, num_blocks))
    state = lax.fori_loop(0, unmasked, functools.partial(block, masked=False), state)
    return lax.fori_loop(unmasked, turns, functools.partial(block, masked=True), state)


def hand_over(refs, state: State):
    """The second compute warpgroup leaves its result to the first, where the queries were."""
    plgpu.barrier_wait(refs.q_read)
    refs.o_smem[...] = state.o
    if state.o_lr is not None:
        refs.aux_smem[:, pl.ds(0, state.o_lr.shape[1])] = state.o_lr
    refs.m_smem[...], refs.l_smem[...] = state.m, state.l
    plgpu.barrier_arrive(refs.handed_over)


def join(refs, state: State) -> State:
    """What the first warpgroup and the second have seen together."""
    plgpu.barrier_wait(refs.handed_over)
    other_m, other_l = (plgpu.load(x, layout=PER_ROW, optimized=False) for x in (refs.m_smem, refs.l_smem))
    m = jnp.maximum(state.m, other_m)
    own, other = jnp.exp2(state.m - m), jnp.exp2(other_m - m)

    def both(mine, ref):
        width = mine.shape[1]
        theirs = plgpu.load(ref, layout=WGMMA, optimized=False)
        return mine * over_lanes(own, width) + theirs * over_lanes(other, width)

    o_lr = None if state.o_lr is None else both(state.o_lr, refs.aux_smem.at[:, pl.ds(0, state.o_lr.shape[1])])
    return State(both(state.o, refs.o_smem), o_lr, m, state.l * own + other_l * other)


def finish(refs, item, head, state: State, shapes: Shapes):
    """Writes every row's record."""
    r = shapes.r_v
    refs.o_smem[...] = state.o
    if state.o_lr is not None:
        refs.aux_smem[:, pl.ds(0, r)] = state.o_lr
    lane = plgpu.broadcasted_iota(jnp.int32, (BLOCK_Q, 8), 1, layout=WGMMA)
    refs.aux_smem[:, pl.ds(r, 8)] = jnp.where(lane == 0, over_lanes(state.m, 8), over_lanes(state.l, 8))
    plgpu.commit_smem()
    for slot in range(shapes.R):
        row = refs.rows[item, slot]

        @pl.when(row >= 0)
        def _(slot=slot, row=row):
            rows, record = pl.ds(slot * shapes.G, shapes.G), refs.partial.at[row, refs.parts[item, slot], head]
            aux = record.at[:, pl.ds(shapes.aux_lane, shapes.aux_width)]
            plgpu.copy_smem_to_gmem(refs.o_smem.at[rows], record.at[:, pl.ds(0, shapes.H)])
            plgpu.copy_smem_to_gmem(refs.aux_smem.at[rows], aux)

    plgpu.wait_smem_to_gmem(0)


def rotation(refs, position, shapes: Shapes):
    """cos and sin of the block's angles, f32 [64, H/2]."""
    shape = (BLOCK_KV, shapes.H // 2)
    inv_freq = plgpu.load(refs.inv_freq, layout=PER_COLUMN, optimized=False)
    keys = position + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA)
    angles = keys.astype(jnp.float32) * lax.broadcast_in_dim(inv_freq, shape, (1,))
    # The fast sine and cosine are exact near 0 only. n TWO_PI_HIGH has few enough bits to be exact in f32.
    turns = (angles * (0.5 / math.pi) + 0.5).astype(jnp.int32).astype(jnp.float32)
    angles = (angles - turns * TWO_PI_HIGH) - turns * TWO_PI_LOW
    return jnp.cos(angles), jnp.sin(angles)


def own_scores(refs, scores, j, stage, position, item, warpgroup, shapes: Shapes):
    """Scores of rows with low-rank keys, from K_base + RoPE(L_k B_k) of each adapter in turn; the others' as they are."""
    half = shapes.H // 2
    own_k = refs.own_k.at[warpgroup]
    adapter_of_row = plgpu.load(refs.expanders.of_row.at[item], layout=PER_ROW, optimized=False)

    def one(e, scores):
        at = stage * shapes.readers + e
        with_barrier(refs.k_ready, j, e, shapes, plgpu.barrier_wait)
        low_rank, b = refs.k_smem.at[at, 0].transpose((1, 0)), refs.b_smem.at[e]
        cos, sin = rotation(refs, position, shapes)
        low = product(low_rank, b.at[:, pl.ds(0, half)], interpret=shapes.interpret)
        high = product(low_rank, b.at[:, pl.ds(half, half)], interpret=shapes.interpret)
        for lanes, added in ((pl.ds(0, half), low * cos - high * sin), (pl.ds(half, half), high * cos + low * sin)):
            base = plgpu.load(refs.kv_smem.at[stage, :, lanes], layout=WGMMA).astype(jnp.float32)
            own_k[:, lanes] = (base + added).astype(refs.q.dtype)
        plgpu.commit_smem()
        own = product(refs.q_tiled, own_k.transpose((1, 0)), interpret=shapes.interpret)
        return jnp.where(over_lanes(adapter_of_row, BLOCK_KV) == e, own, scores)

    return lax.fori_loop(0, refs.expanders.count[item], one, scores)


def zero_values(values, held, H: int):
    """Zeroes slots ≥ `held` of a block of values: what lies there was never written, and 0 · NaN is NaN."""
    slots = plgpu.broadcasted_iota(jnp.int32, (BLOCK_KV, H), 0, layout=WGMMA)
    values[...] = jnp.where(slots < held, plgpu.load(values, layout=WGMMA), jnp.zeros((), values.dtype))
    plgpu.commit_smem()


def zero_low_rank(refs, at, held, shapes: Shapes):
    """The same for a block of low-rank values, through a flat view of the buffer.

    No register layout fits r < 64 rows of a swizzled buffer. Flat, it is plain: rows of `page_slots`, in which the
    number of a 16-byte chunk has the number of its 128-byte line added to it, bit by bit.
    """
    dtype, size = refs.q.dtype, shapes.r_v * BLOCK_KV
    if shapes.interpret:  # buffers have no layout there
        slots = jnp.stack([jnp.full((shapes.r_v, shapes.page_slots), i * shapes.page_slots) for i in range(shapes.pages_per_block)])
        slots += lax.broadcasted_iota(jnp.int32, slots.shape, 2)
        refs.v_smem[at] = jnp.where(slots < held, refs.v_smem[at], jnp.zeros((), dtype))
    else:
        layout = plgpu.Layout.WG_STRIDED((size,), vec_size=min(8, size // LANES))
        byte = plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout) * 2
        row_bytes = 2 * shapes.page_slots
        byte = byte ^ (((byte >> 7) & (row_bytes // 16 - 1)) << 4)
        page = lax.div(byte, jnp.int32(shapes.r_v * row_bytes))
        slot = page * shapes.page_slots + lax.rem(byte, jnp.int32(row_bytes)) // 2
        flat = refs.v_flat.at[at]
        flat[...] = jnp.where(slot < held, plgpu.load(flat, layout=layout), jnp.zeros((), dtype))
    plgpu.commit_smem()


class Refs:
    """The kernel's refs by name."""

    def __init__(self, **refs):
        self.__dict__.update(refs)


def stream(
    q, base, low_rank: LowRank, lora_b_k, page_table: PageTable, adapter_ids, plan: DecodePlan,
    *, rope_inv_freq, shapes: Shapes, parts: int,
):  # fmt: skip
    """Partial results f32[rows, C, K, G, record] of q [rows, K, G, H]; what no item made is left as it was."""
    s, (items, R) = shapes, plan.rows.shape
    dtype = q.dtype
    end = plan.pages[:, 1] * s.p
    there = plan.rows >= 0
    lowest = jnp.min(jnp.where(there, plan.limits, jnp.iinfo(jnp.int32).max), axis=1)
    highest = jnp.max(plan.limits, axis=1)
    meta = [plan.pages[:, 0], plan.pages[:, 1], plan.rows[:, 0] // s.T, jnp.minimum(lowest, end), jnp.minimum(highest, end)]
    inputs = {
        "meta": jnp.stack(meta, axis=1),
        "rows": plan.rows,
        "parts": plan.parts,
        "limits": pad_rows(jnp.minimum(plan.limits, end[:, None]), s.G, 0),
        "table": page_table.base,
        "q": q,
        "base": base,
    }
    swizzle = 64 if s.r_k and s.H == 64 else 128  # low-rank keys are added to halves of K
    scratch = {
        "kv_smem": tiled(s.stages, BLOCK_KV, 2 * s.H, dtype=dtype, swizzle=swizzle),
        "aux_smem": plgpu.SMEM((BLOCK_Q, s.aux_width), jnp.float32),
        "m_smem": plgpu.SMEM((BLOCK_Q,), jnp.float32),
        "l_smem": plgpu.SMEM((BLOCK_Q,), jnp.float32),
        "q_ready": plgpu.Barrier(num_arrivals=R),
        "q_read": plgpu.Barrier(num_arrivals=s.compute),
        "handed_over": plgpu.Barrier(),
        "kv_ready": plgpu.Barrier(num_arrivals=s.pages_per_block, num_barriers=s.ready),
        "read": plgpu.Barrier(num_barriers=s.stages),
    }
    if s.r_v or s.r_k:
        inputs["low_rank_table"] = page_table.low_rank
    if s.r_v:
        readers = readers_of(plan, plan.readers, s.G, s.readers)
        inputs |= {"low_rank_v": low_rank.v, **{f"readers.{k}": v for k, v in readers._asdict().items()}}
        swizzled = tiled(s.stages * s.readers, s.pages_per_block, s.r_v, s.page_slots, dtype=dtype, swizzle=2 * s.page_slots)
        flat = plgpu.SMEM((s.stages * s.readers, s.r_v * BLOCK_KV), dtype)
        scratch["low_rank_smem"] = plgpu.RefUnion(swizzled, flat)
        scratch["v_ready"] = [plgpu.Barrier(num_arrivals=s.pages_per_block, num_barriers=s.stages * s.readers)] * s.compute

    if s.r_k:
        expanders = readers_of(plan, plan.expanders, s.G, s.readers)
        ids = jnp.clip(adapter_ids[expanders.rows // s.T], 0, lora_b_k.shape[0] - 1)
        inputs |= {"low_rank_k": low_rank.k, "lora_b_k": lora_b_k, "expander_ids": ids, "inv_freq": rope_inv_freq}
        inputs |= {f"expanders.{k}": v for k, v in expanders._asdict().items()}
        scratch |= {
            "k_smem": tiled(s.stages * s.readers, 1, s.r_k, BLOCK_KV, dtype=dtype, swizzle=32),
            "b_smem": tiled(s.readers, s.r_k, s.H, dtype=dtype, swizzle=32),
            "k_ready": [plgpu.Barrier(num_arrivals=s.pages_per_block, num_barriers=s.stages * s.readers)] * s.compute,
            "b_ready": plgpu.Barrier(num_barriers=s.readers),
        }

    # What is done with when the result is there lends it its memory.
    o_smem, q_smem = plgpu.SMEM((BLOCK_Q, s.H), jnp.float32), plgpu.SMEM((BLOCK_Q, s.H), dtype)
    scratch["queries_or_result"] = plgpu.RefUnion(q_smem, o_smem)
    if s.r_k:
        scratch["q_tiled"] = tiled(BLOCK_Q, s.H, dtype=dtype, swizzle=swizzle)
        scratch["own_k"] = tiled(s.compute, BLOCK_KV, s.H, dtype=dtype, swizzle=swizzle)
        scratch["q_tiled_ready"] = plgpu.Barrier()

    def body(*args, **buffers):
        buffers["q_smem"], buffers["o_smem"] = buffers.pop("queries_or_result")
        named = dict(zip(inputs, args, strict=False))
        groups = {}
        for name in [name for name in named if "." in name]:
            group, field = name.split(".")
            groups.setdefault(group, {})[field] = named.pop(name)
        if s.r_v:
            buffers["v_smem"], buffers["v_flat"] = buffers.pop("low_rank_smem")
        groups = {name: Readers(**fields) for name, fields in groups.items()}
        refs = Refs(**named, **groups, **buffers, partial=args[-1])
        stream_kernel(refs, s)

    rows = q.shape[0]
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, parts, s.K, s.G, s.record), jnp.float32),
        scratch_types=scratch,
        grid=(s.K, items),
        grid_names=("head", "item"),
        num_threads=s.compute + 1,
        thread_name="warpgroup",
        compiler_params=COMPILER(),
        **interpreter(s.interpret),
    )
    return kernel(*inputs.values())
