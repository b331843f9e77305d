"""The warpgroups of a prefill program that supply keys and values: one copies, one expands low-rank keys."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.prefill_config import (
    EXPANDED_KEYS,
    Barriers,
    Config,
    Inputs,
    Memory,
    Tile,
    padded_rank,
)
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.registers import WGMMA, load

TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED  # of ranks by lanes, as they lie in memory


def feed(cfg: Config, tile: Tile, steps, inputs: Inputs, smem: Memory, barriers: Barriers) -> None:
    """Fills slot after slot with keys and values, as the other warpgroups get done with them."""
    block_kv, stages = cfg.blocks.block_kv, cfg.blocks.num_stages

    def locate_block(step):
        return [locate(cfg, tile, inputs, step * block_kv + i * cfg.slots_per_copy) for i in range(cfg.copies)]

    first_pieces = locate_block(jnp.int32(0))  # in front of the first copy: the compiler moves no load past one
    for pool, rank, target in (
        (inputs.b_v, cfg.r_v, smem.b_v), (inputs.b_k, cfg.r_k, smem.b_k), (inputs.b_k_turned, cfg.r_k, smem.b_k_turned),
    ):  # fmt: skip
        if rank:
            adapter = jnp.where(tile.adapter > 0, tile.adapter, cfg.num_adapters)
            lanes = pl.ds(tile.kv_head * cfg.H, cfg.H)
            copy_ranks(pool, adapter, lanes, rank, 8, target, barriers.b_ready)

    def copy_block(step, pieces):
        slot = cfg.slot(step)
        next_pieces = locate_block(step + 1)  # a read of device memory, under way while this block waits for its slot
        partly_filled = tile.kv_len < (step + 1) * block_kv
        k_landed = (barriers.k_landed if cfg.r_k else barriers.k_ready).at[slot]
        v_landed = barriers.v_ready.at[jnp.where(partly_filled, stages, slot)]

        pl.when(step >= stages)(lambda: plgpu.barrier_wait(barriers.k_free.at[slot]))
        copy_base(cfg, inputs, pieces, 0, smem.k.at[slot], k_landed)
        if cfg.r_k:
            copy_low_rank(cfg, inputs.low_rank_k, pieces, cfg.r_k, smem.low_rank_k.at[slot], k_landed)
            plgpu.copy_gmem_to_smem(inputs.rope_starts.at[step], smem.rope_starts.at[slot], k_landed)
        pl.when(step >= stages)(lambda: plgpu.barrier_wait(barriers.v_free.at[slot]))
        copy_base(cfg, inputs, pieces, cfg.H, smem.v.at[slot], v_landed)
        if cfg.r_v:
            copy_low_rank(cfg, inputs.low_rank_v, pieces, cfg.r_v, smem.low_rank_v.at[slot], v_landed)

        @pl.when(partly_filled)
        def _clean():
            plgpu.barrier_wait(v_landed)
            clear_from(cfg, smem, slot, tile.kv_len - step * block_kv)
            plgpu.commit_smem()
            for _ in range(cfg.v_arrivals):
                plgpu.barrier_arrive(barriers.v_ready.at[slot])

        return next_pieces

    lax.fori_loop(0, steps, copy_block, first_pieces)

    @pl.loop(jnp.maximum(steps - stages, 0), steps)
    def _drain(step):
        slot = cfg.slot(step)
        plgpu.barrier_wait(barriers.k_free.at[slot])
        plgpu.barrier_wait(barriers.v_free.at[slot])


def locate(cfg: Config, tile: Tile, inputs: Inputs, position):
    """Page and kv head in the base pool, low-rank page, offset in both, of a key; outside of the pools if not held."""
    held = position < tile.kv_len
    column = jnp.where(held, lax.div(position, jnp.int32(cfg.p)), 0)
    page = jnp.where(held, inputs.table[tile.b, column] * cfg.K + tile.kv_head, inputs.base.shape[0])
    offset = lax.rem(position, jnp.int32(cfg.p))
    if not cfg.num_adapters:
        return page, page, offset
    held &= tile.adapter > 0
    nowhere = max(pool.shape[0] for pool in (inputs.low_rank_v, inputs.low_rank_k) if pool is not None)
    return page, jnp.where(held, inputs.low_rank_table[tile.b, column], nowhere), offset


def copy_base(cfg: Config, inputs: Inputs, pieces, lane: int, target, barrier) -> None:
    """Copies a block of K (lane 0) or V (lane H) to `target` [block_kv, H]."""
    for i, (page, _, offset) in enumerate(pieces):
        rows = pl.ds(pl.multiple_of(offset, cfg.slots_per_copy), cfg.slots_per_copy)
        part = target.at[pl.ds(i * cfg.slots_per_copy, cfg.slots_per_copy)]
        plgpu.copy_gmem_to_smem(inputs.base.at[page, rows, pl.ds(lane, cfg.H)], part, barrier)


def copy_low_rank(cfg: Config, pool, pieces, rank: int, target, barrier) -> None:
    """Copies a block of low-rank keys or values to `target` [R, block_kv]."""
    for i, (_, page, offset) in enumerate(pieces):
        lanes = pl.ds(pl.multiple_of(offset, cfg.slots_per_copy), cfg.slots_per_copy)
        part = target.at[:, pl.ds(i * cfg.slots_per_copy, cfg.slots_per_copy)]
        copy_ranks(pool, page, lanes, rank, cfg.ranks_per_copy(rank), part, barrier)


def copy_ranks(pool, page, lanes, rank: int, rows: int, target, barrier) -> None:
    """Copies [rank, lanes] of a page, so many rows at a time, and zeros to the rows of `target` that pad the rank."""
    for row in range(0, padded_rank(rank), rows):
        at, first = (page, row) if row < rank else (pool.shape[0], 0)
        plgpu.copy_gmem_to_smem(pool.at[at, pl.ds(first, rows), lanes], target.at[pl.ds(row, rows)], barrier)


def clear_from(cfg: Config, smem: Memory, slot, limit) -> None:
    """Zeroes the values of a block's keys from `limit` on: 0 times what lies there would be NaN if that is."""

    def keep(part, dim, count, lanes=64):  # `part`: four tiles of 8 rows, its keys on axis `dim`
        layout = plgpu.Layout.SMEM_GMEM_COPY(part.shape, cfg.dtype, 2 * lanes)
        index = plgpu.broadcasted_iota(jnp.int32, part.shape, dim, layout=layout)
        values = plgpu.layout_cast(part[...], layout)
        part[...] = jnp.where(index < count, values, jnp.zeros_like(values))

    rows = 4 * 8 * 64 // cfg.H

    @pl.loop(lax.div(limit, jnp.int32(rows)), cfg.blocks.block_kv // rows)
    def _values(i):
        row = pl.multiple_of(i * rows, rows)
        keep(smem.v.at[slot, pl.ds(row, rows)], 0, limit - row)

    if cfg.r_v:

        @pl.loop(0, padded_rank(cfg.r_v) // 16)
        def _low_rank_values(i):
            rows = pl.ds(pl.multiple_of(i * 16, 16), 16)
            keep(smem.low_rank_v.at[slot, rows], 1, limit, lanes=cfg.low_rank_v_lanes)


# The warpgroup that adds low-rank keys.


def expand_keys(cfg: Config, steps, inputs: Inputs, smem: Memory, barriers: Barriers) -> None:
    """K += RoPE(L B) for slot after slot, 64 keys at a time.

    Key j of those that start at position s is rotated by s and by j. By s the few rows of B are; by j the product, and
    its cosines and sines stay in registers: a table of all positions would be read as often as K is.
    """
    half, width = cfg.H // 2, cfg.k_lanes
    lanes = [(pl.ds(lane, width), pl.ds(half + lane, width)) for lane in range(0, half, width)]
    turns = [[load(inputs.rope.at[:, some], WGMMA, optimized=False) for some in pair] for pair in lanes]
    plgpu.barrier_wait(barriers.b_ready)

    @pl.loop(0, steps)
    def _block(step):
        slot = cfg.slot(step)
        plgpu.barrier_wait(barriers.k_landed.at[slot])
        for part in range(cfg.expanded_parts):
            rotate_b(cfg, smem.rope_starts.at[slot, part], smem)
            plgpu.commit_smem()
            keys = pl.ds(part * EXPANDED_KEYS, EXPANDED_KEYS)
            low_rank = smem.low_rank_k.at[slot, :, keys].transpose((1, 0))  # [64, R_k]
            for (first, second), turn in zip(lanes, turns, strict=True):
                x, y = shared_products(low_rank, [smem.b_k_rotated.at[:, some] for some in (first, second)])
                cos, sin = (numbers.astype(jnp.float32) for numbers in turn)
                add(smem.k.at[slot, keys, first], x * cos - y * sin)
                add(smem.k.at[slot, keys, second], y * cos + x * sin)
            plgpu.commit_smem()
        plgpu.barrier_arrive(barriers.k_ready.at[slot])


def rotate_b(cfg: Config, rope, smem: Memory) -> None:
    """RoPE of B's rows, at the position of which `rope` [2, H] has cosines and sines."""
    rows = 64
    for lane in range(0, cfg.H, rows):
        lanes = pl.ds(lane, rows)
        cos, sin = (load(rope.at[i, lanes], TRANSPOSED.reduce(1), optimized=False) for i in range(2))
        for rank in range(0, padded_rank(cfg.r_k), 16):
            ranks = pl.ds(rank, 16)

            def of(ref, ranks=ranks, lanes=lanes):
                return ref.at[ranks, lanes].transpose((1, 0))

            b, turned = (
                load(of(ref), TRANSPOSED, optimized=False).astype(jnp.float32) for ref in (smem.b_k, smem.b_k_turned)
            )
            rotated = b * lax.broadcast_in_dim(cos, b.shape, [0]) + turned * lax.broadcast_in_dim(sin, b.shape, [0])
            of(smem.b_k_rotated)[...] = rotated.astype(cfg.dtype)


def shared_products(a, others):
    """a b for every b, refs in shared memory."""

    def multiply(*accumulators):
        for acc, b in zip(accumulators, others, strict=True):
            plgpu.wgmma(acc, a, b)
        return [acc[...] for acc in accumulators]

    return pl.run_scoped(multiply, *(plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32) for b in others))


def add(ref, x) -> None:
    there = plgpu.layout_cast(ref[...], WGMMA).astype(jnp.float32)
    ref[...] = (there + x).astype(ref.dtype)
