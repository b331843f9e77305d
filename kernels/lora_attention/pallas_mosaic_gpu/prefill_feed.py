"""The warpgroup of a prefill program that supplies keys and values."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.pages import (
    copy_base,
    copy_low_rank,
    copy_ranks,
    padded_rank,
)
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.prefill_config import (
    Barriers,
    Config,
    Inputs,
    Memory,
    Tile,
)


def feed(cfg: Config, tile: Tile, steps, inputs: Inputs, smem: Memory, barriers: Barriers) -> None:
    """Fills slot after slot with keys and values, as the other warpgroups get done with them."""
    block_kv, stages = cfg.blocks.block_kv, cfg.blocks.num_stages
    row, low_rank = tile.row, inputs.low_rank

    def locate(step):
        return row.pieces(cfg.block, step, inputs.base.shape[0] // cfg.K, low_rank.shape[0] if cfg.r else 0)

    first_pieces = locate(jnp.int32(0))  # in front of the first copy: the compiler moves no load past one
    if cfg.r:
        adapter = jnp.where(row.adapter > 0, row.adapter, cfg.num_adapters)
        lanes = pl.ds(tile.kv_head * cfg.H, cfg.H)
        copy_ranks(inputs.lora_b, adapter, lanes, cfg.r, 8, smem.lora_b, barriers.b_ready)

    def copy(expanded, pieces, step, lane: int, target, barrier):
        """A block of keys (lane 0) or values (lane H)."""
        if expanded is None:
            copy_base(cfg.block, inputs.base, pieces, tile.kv_head, cfg.K, pl.ds(lane, cfg.H), target, barrier)
        else:
            positions = pl.ds(step * block_kv, block_kv)
            plgpu.copy_gmem_to_smem(expanded.at[tile.row.b * cfg.K + tile.kv_head, positions], target, barrier)

    def copy_block(step, pieces):
        slot = cfg.slot(step)
        next_pieces = locate(step + 1)  # a read of device memory, under way while this block waits for its slot
        partly_filled = row.kv_len < (step + 1) * block_kv
        v_landed = barriers.v_ready.at[jnp.where(partly_filled, stages, slot)]

        pl.when(step >= stages)(lambda: plgpu.barrier_wait(barriers.k_free.at[slot]))
        copy(inputs.keys, pieces, step, 0, smem.k.at[slot], barriers.k_ready.at[slot])
        pl.when(step >= stages)(lambda: plgpu.barrier_wait(barriers.v_free.at[slot]))
        copy(inputs.values, pieces, step, cfg.H, smem.v.at[slot], v_landed)
        if cfg.r:
            copy_low_rank(cfg.block, low_rank, pieces, cfg.r, smem.low_rank.at[slot], v_landed)

        @pl.when(partly_filled)
        def _clean():
            plgpu.barrier_wait(v_landed)
            clear_from(cfg, smem, slot, row.kv_len - step * block_kv)
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

    if cfg.r:

        @pl.loop(0, padded_rank(cfg.r) // 16)
        def _low_rank_values(i):
            rows = pl.ds(pl.multiple_of(i * 16, 16), 16)
            keep(smem.low_rank.at[slot, rows], 1, limit, lanes=cfg.low_rank_lanes)
