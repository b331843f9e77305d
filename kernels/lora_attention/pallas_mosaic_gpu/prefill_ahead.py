"""Scores ahead: a warpgroup asks for Q K of the next block, and does the softmax of this one while that is multiplied.

As in Flash Attention 3 (arXiv 2407.08608), within a warpgroup; the two take no turns.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.prefill_config import BLOCK_Q, Barriers, Config, Memory
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.prefill_softmax import Softmax, add_values, empty, weigh


def attend(cfg: Config, first, unmasked, steps, all_steps, q, smem: Memory, barriers: Barriers) -> Softmax:
    """The softmax of a warpgroup's queries over its `steps` blocks of keys, `unmasked` of them seen by all."""

    def over_blocks():
        body = functools.partial(attend_block, cfg, first, q, smem, barriers)
        last = steps - 1
        state = empty(cfg), score(cfg, 0, q, smem, barriers)
        state = lax.fori_loop(0, jnp.minimum(unmasked, last), functools.partial(body, masked=False), state)
        state = lax.fori_loop(jnp.minimum(unmasked, last), last, functools.partial(body, masked=True), state)
        return weigh_and_add(cfg, first, smem, barriers, last, state)

    state = lax.cond(steps > 0, over_blocks, lambda: empty(cfg))

    @pl.loop(steps, all_steps)
    def _skip(step):  # blocks that only the other warpgroup needs; not before they are there: a slot is freed once
        slot = lax.rem(step, jnp.int32(cfg.blocks.num_stages))
        for ready, free in ((barriers.k_ready, barriers.k_free), (barriers.v_ready, barriers.v_free)):
            plgpu.barrier_wait(ready.at[slot])
            plgpu.barrier_arrive(free.at[slot])

    return state


def attend_block(cfg: Config, first, q, smem: Memory, barriers: Barriers, step, state, *, masked: bool):
    """The state after one more block of keys, whose scores are there, and the scores of the next."""
    softmax, scores = state

    def weigh_them():
        pin(barriers)
        found = weigh(cfg, first, step, softmax, scores, masked=masked)
        pin(barriers)
        return found

    scores, (softmax, probs) = score(cfg, step + 1, q, smem, barriers, meanwhile=weigh_them)
    return add(cfg, step, softmax, probs, smem, barriers), scores


def weigh_and_add(cfg: Config, first, smem: Memory, barriers: Barriers, step, state) -> Softmax:
    softmax, probs = weigh(cfg, first, step, *state, masked=True)
    return add(cfg, step, softmax, probs, smem, barriers)


def add(cfg: Config, step, state: Softmax, probs, smem: Memory, barriers: Barriers) -> Softmax:
    slot = lax.rem(step, jnp.int32(cfg.blocks.num_stages))
    plgpu.barrier_wait(barriers.v_ready.at[slot])
    state = add_values(cfg, step, state, probs, smem)
    plgpu.barrier_arrive(barriers.v_free.at[slot])
    return state


def score(cfg: Config, step, q, smem: Memory, barriers: Barriers, meanwhile: Callable[[], Any] | None = None):
    """Q K of a block of keys; with `meanwhile`, which runs while it is multiplied, that and what this returns."""
    slot = lax.rem(jnp.int32(step), jnp.int32(cfg.blocks.num_stages))
    plgpu.barrier_wait(barriers.k_ready.at[slot])

    def multiply(scores):
        plgpu.wgmma(scores, q, smem.k.at[slot].transpose((1, 0)))
        if meanwhile is None:
            return scores[...]
        found = meanwhile()
        return scores[...], found

    found = pl.run_scoped(multiply, plgpu.ACC((BLOCK_Q, cfg.blocks.block_kv), jnp.float32))
    plgpu.barrier_arrive(barriers.k_free.at[slot])
    return found


def pin(barriers: Barriers) -> None:
    """Keeps the compiler from moving arithmetic across: it may, and does, put all of it behind a product's end."""
    own = barriers.pinned.at[lax.axis_index("warpgroup")]
    plgpu.barrier_arrive(own)
    plgpu.barrier_wait(own)
