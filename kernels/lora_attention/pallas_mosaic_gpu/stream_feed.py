"""The memory warpgroup of decode's streaming kernel: which pages come when, and where they go."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.registers import WGMMA, load
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.stream_shapes import BLOCK_KV, Shapes


def page_of_block(j, span, table, shapes: Shapes, i: int = 0):
    """(page, its first slot that counts) of block j of the item's range; `i`: which of the block's pages.

    Columns past the range are read as its last: always a page that may be read, and its keys are masked.
    """
    first, end = span
    if shapes.blocks_per_page == 1:
        return table[jnp.minimum(first + j * shapes.pages_per_block + i, end - 1)], 0
    per_page = jnp.int32(shapes.blocks_per_page)
    return table[first + lax.div(j, per_page)], lax.rem(j, per_page) * BLOCK_KV


def with_barrier(ready, j, u, shapes: Shapes, use) -> None:
    """use(the barrier that tells of reader u's low-rank pages of block j): of those whose turn block j is."""
    turn, own = lax.div(j, jnp.int32(shapes.compute)), lax.rem(j, jnp.int32(shapes.compute))
    index = lax.rem(turn, jnp.int32(shapes.stages)) * shapes.readers + u
    for warpgroup, barriers in enumerate(ready):
        pl.when(own == warpgroup)(lambda barriers=barriers: use(barriers.at[index]))


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
            position = span[0] * shapes.p + j * BLOCK_KV
            angles = refs.rope.at[pl.ds(position, BLOCK_KV)]
            plgpu.copy_gmem_to_smem(angles, refs.rope_smem.at[stage], refs.kv_ready.at[ready])
            bring_low_rank(refs, refs.expanders, item, j, span, shapes, refs.low_rank_k, refs.k_smem, refs.k_ready)
        if shapes.r_v:
            bring_low_rank(refs, refs.readers, item, j, span, shapes, refs.low_rank_v, refs.v_smem, refs.v_ready)
        return

    lax.fori_loop(0, num_blocks, step, None)


def bring_expansion(refs, item, head):
    """B of every adapter whose keys are rebuilt, and the queries in the layout that the matrix unit reads."""

    def one(e, _):
        b = refs.lora_b_k.at[refs.expander_ids[item, e], :, head]
        plgpu.copy_gmem_to_smem(b, refs.b_smem.at[e], refs.b_ready.at[e])
        return

    lax.fori_loop(0, refs.expanders.count[item], one, None)
    plgpu.barrier_wait(refs.q_ready)
    refs.q_tiled[...] = load(refs.q_smem, WGMMA, optimized=False)
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.q_tiled_ready)


def bring_low_rank(refs, readers, item, j, span, shapes: Shapes, pool, smem, ready):
    """A block of every reader's low-rank pages. Page ids are read some at a time: the reads' latencies overlap."""
    count = readers.count[item]
    together = min(8, shapes.readers)

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
                    with_barrier(ready, j, u, shapes, lambda told: plgpu.copy_gmem_to_smem(slots, smem.at[at, i], told))

        return

    lax.fori_loop(0, lax.div(count + together - 1, jnp.int32(together)), some, None)
