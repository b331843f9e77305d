"""Few queries per row against long caches, on Hopper: the keys split over the chip, then one merge that applies B.

A program of `stream` takes one lane of a `DecodePlan` and one kv head, item after item: a memory warpgroup brings
blocks of 64 keys in by TMA, several ahead, the next item's while this one's are computed; one or two compute warpgroups
take them in turn, each with all 64 query rows (the item's rows, G heads each) under an online softmax of its own, with
the low-rank accumulator beside the ordinary one, and join at the item's end. Split-KV after Flash-Decoding, the
accumulators after LRAgent's Flash-LoRA-Attention (arXiv 2602.01053).

A partial result is a record in f32: o in lanes [0, H), and from lane max(H, 128) on o_lr, then m, then l.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

from lragent_jax.kernels.hopper import interpreter
from lragent_jax.kernels.lora_attention.arguments import LowRank, PageTable
from lragent_jax.kernels.lora_attention.decode_plan import DecodePlan, before
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.stream_compute import attend, finish, hand_over, join
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.stream_feed import ask, bring, drain
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.stream_shapes import BLOCK_Q, WARPS, Shapes, scratch


class Readers(NamedTuple):
    """Whose low-rank pages an item reads, each once, and which of them a query row belongs to."""

    count: Int32[Array, " I"]
    rows: Int32[Array, "I n"]  # the row whose table is followed; behind the last reader its own again
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
    count = first.sum(axis=1, dtype=jnp.int32)
    numbers = jnp.arange(most, dtype=jnp.int32)
    own = of_slot[:, None] == numbers[:, None]  # [I, n, R]
    followed = of_slot[:, None] == jnp.minimum(numbers, jnp.maximum(count - 1, 0)[:, None])[..., None]
    return Readers(
        count=count,
        rows=jnp.max(jnp.where(followed & first[:, None], plan.rows[:, None], 0), axis=-1),
        limits=jnp.max(jnp.where(own, plan.limits[:, None], 0), axis=-1),
        of_row=pad_rows(of_slot, G, -1),
    )


class Refs:
    """The kernel's refs by name."""

    def __init__(self, **refs):
        self.__dict__.update(refs)


def items_of_lane(refs, lane, shapes: Shapes, ask, run, end=lambda num_blocks: None) -> None:
    """run(item, ask(item), its columns, its blocks, the lane's blocks before it) for its items, then end(its blocks).

    The kernel's buffers and barriers count the lane's blocks, not the item's: nothing starts anew where an item does.
    """

    def span(item):
        first, end = refs.meta[item, 0], refs.meta[item, 1]
        per_block = jnp.int32(shapes.pages_per_block)
        return (first, end), lax.div(end - first + per_block - 1, per_block) * shapes.blocks_per_page

    def one(item, before):
        asked, (columns, num_blocks) = ask(item), span(item)
        run(item, asked, columns, num_blocks, before)
        return before + num_blocks

    if not shapes.one_item:
        end(lax.fori_loop(refs.lanes[lane, 0], refs.lanes[lane, 1], one, jnp.int32(0)))
        return

    asked, (columns, num_blocks) = ask(lane), span(lane)
    pl.when(columns[0] < columns[1])(lambda: run(lane, asked, columns, num_blocks, jnp.int32(0)))


def stream_kernel(refs, shapes: Shapes):
    """One lane and kv head; see the module."""
    lane, head, warpgroup = lax.axis_index("lane"), lax.axis_index("head"), lax.axis_index("warpgroup")

    @pl.when(warpgroup == shapes.compute)
    def _():
        if shapes.compute == 2:
            plgpu.set_max_registers(56, action="decrease")

        def bring_items(warp: int):
            items_of_lane(
                refs, lane, shapes, lambda item: ask(refs, item, warp, shapes),
                lambda *item: bring(refs, head, *item, warp, shapes),
                lambda num_blocks: drain(refs, num_blocks, warp, shapes),
            )  # fmt: skip

        @plgpu.warp_map
        def _(own):
            for warp in range(WARPS):
                pl.when(own == warp)(functools.partial(bring_items, warp))

    @pl.when(warpgroup < shapes.compute)
    def _():
        if shapes.compute == 2:
            plgpu.set_max_registers(224, action="increase")

        def first_record(item):
            return refs.records[item, 0]

        def compute(item, record, span, num_blocks, before):
            state = attend(refs, item, span, num_blocks, before, warpgroup, shapes)
            if shapes.compute == 1:
                finish(refs, item, head, record, state, shapes)
            else:
                pl.when(warpgroup == 1)(lambda: hand_over(refs, state, before, shapes))
                pl.when(warpgroup == 0)(lambda: finish(refs, item, head, record, join(refs, state), shapes))

        def end(num_blocks):
            if shapes.compute == 2 and not shapes.one_at_a_time:
                pl.when((warpgroup == 1) & (num_blocks > 0))(lambda: plgpu.barrier_wait(refs.result_gone))

        items_of_lane(refs, lane, shapes, first_record, compute, end)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def stream(
    q, base, low_rank: LowRank, lora_b_k, page_table: PageTable, adapter_ids, plan: DecodePlan,
    *, rope, shapes: Shapes, parts: int,
):  # fmt: skip
    """Partial results f32[rows, C, K, G, record] of q [rows, K, G, H]; what no item made is left as it was."""
    s = shapes
    end = plan.pages[:, 1] * s.p
    there = plan.rows >= 0
    lowest = jnp.min(jnp.where(there, plan.limits, jnp.iinfo(jnp.int32).max), axis=1)
    highest = jnp.max(plan.limits, axis=1)
    meta = [
        plan.pages[:, 0],
        plan.pages[:, 1],
        plan.rows[:, 0] // s.T,
        jnp.minimum(lowest, end),
        jnp.minimum(highest, end),
    ]
    inputs = {
        "lanes": plan.lanes,
        "meta": jnp.stack(meta, axis=1),
        "rows": plan.rows,
        "records": jnp.where(there, plan.rows * parts + plan.parts, -1),
        "limits": pad_rows(jnp.minimum(plan.limits, end[:, None]), s.G, 0),
        "table": page_table.base,
        "q": q,
        "base": base,
    }
    if s.r_v or s.r_k:
        inputs["low_rank_table"] = page_table.low_rank
    if s.r_v:
        readers = readers_of(plan, plan.readers, s.G, s.readers)
        inputs |= {"low_rank_v": low_rank.v, **{f"readers.{k}": v for k, v in readers._asdict().items()}}
    if s.r_k:
        expanders = readers_of(plan, plan.expanders, s.G, s.readers)
        ids = jnp.clip(adapter_ids[expanders.rows // s.T], 0, lora_b_k.shape[0] - 1)
        inputs |= {"low_rank_k": low_rank.k, "lora_b_k": lora_b_k, "expander_ids": ids, "rope": rope}
        inputs |= {f"expanders.{k}": v for k, v in expanders._asdict().items()}

    def body(*args, **buffers):
        named = dict(zip(inputs, args, strict=False))
        if "queries_or_result" in buffers:
            buffers["q_smem"], buffers["o_smem"] = buffers.pop("queries_or_result")
        groups = {}
        for name in [name for name in named if "." in name]:
            group, field = name.split(".")
            groups.setdefault(group, {})[field] = named.pop(name)
        if s.r_v:
            buffers["v_smem"], buffers["v_flat"] = buffers.pop("low_rank_values")
        groups = {name: Readers(**fields) for name, fields in groups.items()}
        refs = Refs(**named, **groups, **buffers, partial=args[-1])
        stream_kernel(refs, s)

    rows = q.shape[0]
    body.__name__ = f"lora_decode_stream_r{s.r_v}_k{s.r_k}_rows{s.R}_stages{s.stages}"
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows * parts, s.K, s.G, s.record), jnp.float32),
        scratch_types=scratch(s, q.dtype),
        grid=(s.K, plan.lanes.shape[0]),
        grid_names=("head", "lane"),
        num_threads=s.compute + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        **interpreter(s.interpret),
    )
    return kernel(*inputs.values()).reshape(rows, parts, s.K, s.G, s.record)
