"""By turns: of two warpgroups one multiplies while the other does its softmax, one block of keys at a time.

From Flash Attention 3 (arXiv 2407.08608); the order within a block is that of JAX's own Mosaic kernel.
"""

import functools

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.prefill_config import BLOCK_Q, Barriers, Config, Memory
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.prefill_softmax import (
    Softmax,
    add_values,
    empty,
    rescaled,
    weigh,
)


def attend(cfg: Config, first, unmasked, steps, all_steps, q, smem: Memory, barriers: Barriers) -> Softmax:
    """The softmax of a warpgroup's queries over its `steps` blocks of keys, `unmasked` of them seen by all."""
    warpgroup = lax.axis_index("warpgroup")
    pl.when(steps > 0)(lambda: plgpu.barrier_wait(barriers.k_ready.at[0]))
    pl.when(warpgroup == 1)(lambda: take_turn(barriers))
    body = functools.partial(attend_block, cfg, first, steps, q, smem, barriers)
    state = lax.fori_loop(0, unmasked, functools.partial(body, masked=False), empty(cfg))
    state = lax.fori_loop(unmasked, steps, functools.partial(body, masked=True), state)

    @pl.loop(steps, all_steps)
    def _skip(step):  # blocks that only the other warpgroup needs
        slot = cfg.slot(step)
        plgpu.barrier_arrive(barriers.k_free.at[slot])
        plgpu.barrier_arrive(barriers.v_free.at[slot])
        take_turn(barriers)
        take_turn(barriers)

    pl.when(warpgroup == 0)(lambda: take_turn(barriers))
    return state


def take_turn(barriers: Barriers) -> None:
    plgpu.barrier_arrive(barriers.turn)
    plgpu.barrier_wait(barriers.turn)


def attend_block(
    cfg: Config, first, steps, q, smem: Memory, barriers: Barriers, step, state: Softmax, *, masked: bool
) -> Softmax:
    """The state after one more block of keys. Its K has been waited for; the next block's is, too, on return."""
    slot, next_slot = cfg.slot(step), cfg.slot(step + 1)

    def score(scores):
        plgpu.wgmma(scores, q, smem.k.at[slot].transpose((1, 0)))
        take_turn(barriers)
        return scores[...]

    scores = pl.run_scoped(score, plgpu.ACC((BLOCK_Q, cfg.blocks.block_kv), jnp.float32))
    plgpu.barrier_arrive(barriers.k_free.at[slot])
    m, l, rescale, probs = weigh(cfg, first, step, state.m, state.l, scores, masked=masked)  # noqa: E741
    state, probs = lax.optimization_barrier((rescaled(state, m, l, rescale), probs.astype(cfg.dtype)))
    plgpu.barrier_arrive(barriers.turn)
    plgpu.barrier_wait(barriers.v_ready.at[slot])
    plgpu.barrier_wait(barriers.turn)

    def await_next():
        pl.when(step + 1 < steps)(lambda: plgpu.barrier_wait(barriers.k_ready.at[next_slot]))

    state = add_values(cfg, step, state, probs, smem, meanwhile=await_next)
    plgpu.barrier_arrive(barriers.v_free.at[slot])
    return state
