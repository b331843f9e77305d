"""Few queries per row against long caches, on Hopper: the keys split over the chip, then one merge that applies B.

Two kernels. `stream` takes one item of a `DecodePlan` and one kv head: a memory warpgroup brings blocks of 64 keys in
by TMA, several ahead, and a compute warpgroup keeps 64 query rows (all rows of the item, G heads each) under one
online softmax, with the low-rank accumulator beside the ordinary one. `merge` joins each row's partial results and
multiplies the low-rank part by the row's own B, once. Split-KV after Flash-Decoding, the accumulators after LRAgent's
Flash-LoRA-Attention (arXiv 2602.01053).

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
UNSEEN = -1e30
LOG2_E = math.log2(math.e)
LANES = 128  # threads of a warpgroup, one f32 each
SMEM_BYTES = 227 * 1024
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
    scale: float  # of scores, for base 2
    interpret: bool = False

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
        item = BLOCK_Q * (6 * self.H + 4 * self.aux_width) + (self.readers * self.r_k * self.H + BLOCK_Q * self.H) * 2
        stage = BLOCK_KV * 2 * (2 * self.H + self.readers * (self.r_v + self.r_k))
        return item + self.stages * stage + 2048

    def fitted(self) -> "Shapes":
        """The same with fewer stages, then with fewer rows per item, so that shared memory holds it."""
        fits = self
        while fits.smem_bytes() > SMEM_BYTES:
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


def bring_block(j, span, table, pool, dst, barrier, shapes: Shapes):
    """Starts the copies of block j of the item's range: from row `table` of page ids, `dst(i)` for its i-th page.

    Columns past the range are read as its last: always a page that may be read, and its keys are masked.
    """
    first, end = span
    per_page = shapes.blocks_per_page
    for i in range(shapes.pages_per_block):
        column = first + (lax.div(j, jnp.int32(per_page)) if per_page > 1 else j * shapes.pages_per_block + i)
        page = table[jnp.minimum(column, end - 1)]
        start = lax.rem(j, jnp.int32(per_page)) * BLOCK_KV if per_page > 1 else 0
        plgpu.copy_gmem_to_smem(pool(page, start), dst(i), barrier)


def stream_kernel(refs, *, shapes: Shapes, zero_tail):
    """One item and kv head; see the module."""
    item, head, wg = lax.axis_index("item"), lax.axis_index("head"), lax.axis_index("wg")
    first, end = refs.meta[item, 0], refs.meta[item, 1]

    @pl.when(first < end)
    def _():
        pages = end - first
        if shapes.p <= BLOCK_KV:
            num_blocks = lax.div(pages + shapes.pages_per_block - 1, jnp.int32(shapes.pages_per_block))
        else:
            num_blocks = pages * shapes.blocks_per_page
        pl.when(wg == 1)(lambda: bring(refs, item, head, (first, end), num_blocks, shapes))
        pl.when(wg == 0)(lambda: attend(refs, item, head, (first, end), num_blocks, shapes, zero_tail))


def bring(refs, item, head, span, num_blocks, shapes: Shapes):
    """The memory warpgroup: the item's queries, then block after block into the stage that was read longest ago."""
    H, K_bytes = shapes.H, shapes.page_slots
    for slot in range(shapes.R):
        row = jnp.maximum(refs.rows[item, slot], 0)
        plgpu.copy_gmem_to_smem(refs.q.at[row, head], refs.q_smem.at[pl.ds(slot * shapes.G, shapes.G)], refs.q_ready)
    leader = refs.meta[item, 2]
    if shapes.r_k:

        def bring_b(e, _):
            b = refs.lora_b_k.at[refs.expander_ids[item, e], :, head]
            plgpu.copy_gmem_to_smem(b, refs.b_smem.at[e], refs.b_ready.at[e])
            return None

        lax.fori_loop(0, refs.expanders.count[item], bring_b, None)

    def base_page(page, start):
        return refs.base.at[page, head, pl.ds(start, K_bytes)]

    def bring_low_rank(j, stage, readers, pool, smem, ready, count):
        def one(u, _):
            row = lax.div(readers.rows[item, u], jnp.int32(shapes.T))
            at = stage * shapes.readers + u
            bring_block(
                j, span, refs.low_rank_table.at[row], lambda page, start: pool.at[page, :, pl.ds(start, K_bytes)],
                lambda i: smem.at[at, :, pl.ds(i * K_bytes, K_bytes)], ready.at[at], shapes,
            )  # fmt: skip
            return None

        lax.fori_loop(0, count, one, None)

    def step(j, _):
        stage = lax.rem(j, jnp.int32(shapes.stages))

        @pl.when(j >= shapes.stages)
        def _wait():
            plgpu.barrier_wait(refs.read.at[stage])

        bring_block(
            j, span, refs.table.at[leader], base_page,
            lambda i: refs.kv_smem.at[stage, pl.ds(i * K_bytes, K_bytes)], refs.kv_ready.at[stage], shapes,
        )  # fmt: skip
        if shapes.r_k:
            count = refs.expanders.count[item]
            bring_low_rank(j, stage, refs.expanders, refs.low_rank_k, refs.k_smem, refs.k_ready, count)
        if shapes.r_v:
            count = refs.readers.count[item]
            bring_low_rank(j, stage, refs.readers, refs.low_rank_v, refs.v_smem, refs.v_ready, count)
        return None

    del H
    lax.fori_loop(0, num_blocks, step, None)


def attend(refs, item, head, span, num_blocks, shapes: Shapes, zero_tail):
    """The compute warpgroup: 64 query rows over the item's blocks, then their partial results, row by row."""
    H, G, r = shapes.H, shapes.G, shapes.r_v
    start, full_end, held_end = span[0] * shapes.p, refs.meta[item, 3], refs.meta[item, 4]
    limits = plgpu.load(refs.limits.at[item], layout=PER_ROW, optimized=False)
    reader_of_row = plgpu.load(refs.readers.of_row.at[item], layout=PER_ROW, optimized=False) if r else None
    plgpu.barrier_wait(refs.q_ready)
    q = plgpu.load(refs.q_smem, layout=WGMMA, optimized=False)
    if shapes.r_k:  # which leaves no registers for the queries
        refs.q_tiled[...] = q
        plgpu.commit_smem()
        q = refs.q_tiled
        lax.fori_loop(0, refs.expanders.count[item], lambda e, _: plgpu.barrier_wait(refs.b_ready.at[e]), None)

    def block(j, carry, masked: bool):
        o, o_lr, m, l = carry
        stage = lax.rem(j, jnp.int32(shapes.stages))
        position = start + j * BLOCK_KV
        plgpu.barrier_wait(refs.kv_ready.at[stage])
        scores = product(q, refs.kv_smem.at[stage, :, pl.ds(0, H)].transpose((1, 0)), interpret=shapes.interpret)
        if shapes.r_k:
            scores = own_scores(refs, scores, stage, position, item, shapes)
        if masked:
            keys = position + plgpu.broadcasted_iota(jnp.int32, (BLOCK_Q, BLOCK_KV), 1, layout=WGMMA)
            scores = jnp.where(keys < over_lanes(limits, BLOCK_KV), scores, UNSEEN)
            zero_values(refs.kv_smem.at[stage, :, pl.ds(H, H)], held_end - position, H)
        m_new = jnp.maximum(m, scores.max(axis=1) * shapes.scale)
        rescale = jnp.exp2(m - m_new)
        probs = jnp.exp2(scores * shapes.scale - over_lanes(m_new, BLOCK_KV))
        l = l * rescale + probs.sum(axis=1)  # noqa: E741
        o = product(
            probs.astype(refs.q.dtype), refs.kv_smem.at[stage, :, pl.ds(H, H)], o * over_lanes(rescale, H),
            interpret=shapes.interpret,
        )  # fmt: skip
        if r:
            o_lr = read_low_rank(o_lr * over_lanes(rescale, r), probs, stage, position, masked)
        plgpu.barrier_arrive(refs.read.at[stage])
        return o, o_lr, m_new, l

    def read_low_rank(o_lr, probs, stage, position, masked):
        def one(u, o_lr):
            at = stage * shapes.readers + u
            plgpu.barrier_wait(refs.v_ready.at[at])
            if masked:
                zero_tail(refs, at, refs.readers.limits[item, u] - position, r)
            own = jnp.where(over_lanes(reader_of_row, BLOCK_KV) == u, probs, 0.0)
            return product(own.astype(refs.q.dtype), refs.v_smem.at[at].transpose((1, 0)), o_lr, interpret=shapes.interpret)

        return lax.fori_loop(0, refs.readers.count[item], one, o_lr)

    o = full((BLOCK_Q, H), 0, WGMMA)
    o_lr = full((BLOCK_Q, r), 0, WGMMA) if r else None
    m, l = full((BLOCK_Q,), UNSEEN, PER_ROW), full((BLOCK_Q,), 0, PER_ROW)  # noqa: E741
    unmasked = jnp.clip(lax.div(full_end - start, jnp.int32(BLOCK_KV)), 0, num_blocks)
    carry = lax.fori_loop(0, unmasked, functools.partial(block, masked=False), (o, o_lr, m, l))
    o, o_lr, m, l = lax.fori_loop(unmasked, num_blocks, functools.partial(block, masked=True), carry)  # noqa: E741

    refs.o_smem[...] = o
    if r:
        refs.aux_smem[:, pl.ds(0, r)] = o_lr
    lane = plgpu.broadcasted_iota(jnp.int32, (BLOCK_Q, 8), 1, layout=WGMMA)
    refs.aux_smem[:, pl.ds(r, 8)] = jnp.where(lane == 0, over_lanes(m, 8), over_lanes(l, 8))
    plgpu.commit_smem()
    for slot in range(shapes.R):
        row = refs.rows[item, slot]

        @pl.when(row >= 0)
        def _(slot=slot, row=row):
            rows, record = pl.ds(slot * G, G), refs.partial.at[row, refs.parts[item, slot], head]
            plgpu.copy_smem_to_gmem(refs.o_smem.at[rows], record.at[:, pl.ds(0, H)])
            plgpu.copy_smem_to_gmem(refs.aux_smem.at[rows], record.at[:, pl.ds(shapes.aux_lane, shapes.aux_width)])

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


def own_scores(refs, scores, stage, position, item, shapes: Shapes):
    """Scores of rows with low-rank keys, from K_base + RoPE(L_k B_k) of each adapter in turn; the others' as they are."""
    half = shapes.H // 2
    adapter_of_row = plgpu.load(refs.expanders.of_row.at[item], layout=PER_ROW, optimized=False)

    def one(e, scores):
        at = stage * shapes.readers + e
        plgpu.barrier_wait(refs.k_ready.at[at])
        low_rank, b = refs.k_smem.at[at].transpose((1, 0)), refs.b_smem.at[e]
        cos, sin = rotation(refs, position, shapes)
        low = product(low_rank, b.at[:, pl.ds(0, half)], interpret=shapes.interpret)
        high = product(low_rank, b.at[:, pl.ds(half, half)], interpret=shapes.interpret)
        for lanes, added in ((pl.ds(0, half), low * cos - high * sin), (pl.ds(half, half), high * cos + low * sin)):
            base = plgpu.load(refs.kv_smem.at[stage, :, lanes], layout=WGMMA).astype(jnp.float32)
            refs.own_k[:, lanes] = (base + added).astype(refs.q.dtype)
        plgpu.commit_smem()
        own = product(refs.q_tiled, refs.own_k.transpose((1, 0)), interpret=shapes.interpret)
        return jnp.where(over_lanes(adapter_of_row, BLOCK_KV) == e, own, scores)

    return lax.fori_loop(0, refs.expanders.count[item], one, scores)


def zero_values(values, held, H: int):
    """Zeroes slots ≥ `held` of a block of values: what lies there was never written, and 0 · NaN is NaN."""
    slots = plgpu.broadcasted_iota(jnp.int32, (BLOCK_KV, H), 0, layout=WGMMA)
    values[...] = jnp.where(slots < held, plgpu.load(values, layout=WGMMA), jnp.zeros((), values.dtype))
    plgpu.commit_smem()


def zero_low_rank_tail(refs, at, held, r: int):
    """The same for a block of low-rank values [r, 64], through a flat view of the buffer.

    No register layout fits r < 64 rows of a swizzled buffer. Flat, it is plain: 16-byte chunk c of row i lies at chunk
    c ^ (i % 8).
    """
    flat = refs.v_flat.at[at]
    index = plgpu.broadcasted_iota(jnp.int32, (r * BLOCK_KV,), 0, layout=plgpu.Layout.WG_STRIDED((r * BLOCK_KV,), vec_size=min(8, r // 2)))
    row, lane = index // BLOCK_KV, index % BLOCK_KV
    slot = ((lane // 8) ^ (row % 8)) * 8 + lane % 8
    values = plgpu.load(flat, layout=plgpu.Layout.WG_STRIDED((r * BLOCK_KV,), vec_size=min(8, r // 2)))
    flat[...] = jnp.where(slot < held, values, jnp.zeros((), values.dtype))
    plgpu.commit_smem()


def zero_interpreted_tail(refs, at, held, r: int):
    """The same where buffers have no layout."""
    slots = lax.broadcasted_iota(jnp.int32, (r, BLOCK_KV), 1)
    refs.v_smem[at] = jnp.where(slots < held, refs.v_smem[at], jnp.zeros((), refs.v_smem.dtype))
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
        "q_ready": plgpu.Barrier(num_arrivals=R),
        "kv_ready": plgpu.Barrier(num_arrivals=s.pages_per_block, num_barriers=s.stages),
        "read": plgpu.Barrier(num_barriers=s.stages),
    }
    if s.r_v or s.r_k:
        inputs["low_rank_table"] = page_table.low_rank
    if s.r_v:
        readers = readers_of(plan, plan.readers, s.G, s.readers)
        inputs |= {"low_rank_v": low_rank.v, **{f"readers.{k}": v for k, v in readers._asdict().items()}}
        swizzled = tiled(s.stages * s.readers, s.r_v, BLOCK_KV, dtype=dtype, swizzle=2 * s.page_slots)
        flat = plgpu.SMEM((s.stages * s.readers, s.r_v * BLOCK_KV), dtype)
        scratch["low_rank_smem"] = plgpu.RefUnion(swizzled, flat)
        scratch["v_ready"] = plgpu.Barrier(num_arrivals=s.pages_per_block, num_barriers=s.stages * s.readers)

    if s.r_k:
        expanders = readers_of(plan, plan.expanders, s.G, s.readers)
        ids = jnp.clip(adapter_ids[expanders.rows // s.T], 0, lora_b_k.shape[0] - 1)
        inputs |= {"low_rank_k": low_rank.k, "lora_b_k": lora_b_k, "expander_ids": ids, "inv_freq": rope_inv_freq}
        inputs |= {f"expanders.{k}": v for k, v in expanders._asdict().items()}
        scratch |= {
            "k_smem": tiled(s.stages * s.readers, s.r_k, BLOCK_KV, dtype=dtype, swizzle=32),
            "b_smem": tiled(s.readers, s.r_k, s.H, dtype=dtype, swizzle=32),
            "k_ready": plgpu.Barrier(num_arrivals=s.pages_per_block, num_barriers=s.stages * s.readers),
            "b_ready": plgpu.Barrier(num_barriers=s.readers),
        }

    # The queries are done with when the result is there.
    o_smem, q_smem = plgpu.SMEM((BLOCK_Q, s.H), jnp.float32), plgpu.SMEM((BLOCK_Q, s.H), dtype)
    if s.r_k:
        operands = [tiled(BLOCK_Q, s.H, dtype=dtype, swizzle=swizzle)] * 2
        scratch |= {"q_smem": q_smem, "queries_or_result": plgpu.RefUnion(operands, o_smem)}
    else:
        scratch["queries_or_result"] = plgpu.RefUnion(q_smem, o_smem)

    def body(*args, **buffers):
        queries, buffers["o_smem"] = buffers.pop("queries_or_result")
        if s.r_k:
            buffers["q_tiled"], buffers["own_k"] = queries
        else:
            buffers["q_smem"] = queries
        named = dict(zip(inputs, args, strict=False))
        groups = {}
        for name in [name for name in named if "." in name]:
            group, field = name.split(".")
            groups.setdefault(group, {})[field] = named.pop(name)
        if s.r_v:
            buffers["v_smem"], buffers["v_flat"] = buffers.pop("low_rank_smem")
        groups = {name: Readers(**fields) for name, fields in groups.items()}
        refs = Refs(**named, **groups, **buffers, partial=args[-1])
        stream_kernel(refs, shapes=s, zero_tail=zero_interpreted_tail if s.interpret else zero_low_rank_tail)

    rows = q.shape[0]
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, parts, s.K, s.G, s.record), jnp.float32),
        scratch_types=scratch,
        grid=(s.K, items),
        grid_names=("head", "item"),
        num_threads=2,
        thread_name="wg",
        compiler_params=COMPILER(),
        **interpreter(s.interpret),
    )
    return kernel(*inputs.values())
