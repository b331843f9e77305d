"""Q K of a block of keys and P V of the block before are asked for together, the softmax comes in between.

Two warpgroups take turns at the tensor cores, so that one's softmax runs beside its own P V and the other's products:
both schedules of Flash Attention 3 (arXiv 2407.08608) at once.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.prefill_config import (
    BLOCK_Q,
    COMPUTE_WARPGROUPS,
    Barriers,
    Config,
    Memory,
)
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.prefill_softmax import (
    Softmax,
    add_values,
    empty,
    rescaled,
    value_terms,
    weigh,
)
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.registers import multiply_add


def attend(cfg: Config, first, unmasked, steps, all_steps, q, smem: Memory, barriers: Barriers) -> Softmax:
    """The softmax of a warpgroup's queries over its `steps` blocks of keys, `unmasked` of them seen by all."""
    warpgroup = lax.axis_index("warpgroup")
    own, others = barriers.turn.at[warpgroup], barriers.turn.at[COMPUTE_WARPGROUPS - 1 - warpgroup]
    pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(others))

    def over_blocks():
        body = functools.partial(attend_block, cfg, first, q, smem, barriers, own, others)
        state = first_block(cfg, first, q, smem, barriers, own, others)
        whole = jnp.maximum(unmasked, 1)
        state = lax.fori_loop(1, whole, functools.partial(body, masked=False), state)
        state, probs = lax.fori_loop(whole, steps, functools.partial(body, masked=True), state)
        plgpu.barrier_wait(barriers.v_ready.at[cfg.slot(steps - 1)])
        state = add_values(cfg, steps - 1, state, probs, smem)
        plgpu.barrier_arrive(barriers.v_free.at[cfg.slot(steps - 1)])
        return state

    state = lax.cond(steps > 0, over_blocks, lambda: empty(cfg))

    @pl.loop(steps, all_steps)
    def _skip(step):  # blocks that only the other warpgroup needs; not before they are there: a slot is freed once
        slot = cfg.slot(step)
        for ready, free in ((barriers.k_ready, barriers.k_free), (barriers.v_ready, barriers.v_free)):
            plgpu.barrier_wait(ready.at[slot])
            plgpu.barrier_arrive(free.at[slot])
        plgpu.barrier_wait(own)
        plgpu.barrier_arrive(others)

    pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(own))
    return state


def first_block(cfg: Config, first, q, smem: Memory, barriers: Barriers, own, others):
    """The state in front of the first block's values, and its weights."""
    plgpu.barrier_wait(barriers.k_ready.at[0])
    plgpu.barrier_wait(own)

    scores = score(cfg, q, smem.k.at[0])
    plgpu.barrier_arrive(others)
    plgpu.barrier_arrive(barriers.k_free.at[0])
    state = empty(cfg)
    m, l, _, probs = weigh(cfg, first, 0, state.m, state.l, scores, masked=True)  # noqa: E741
    return state._replace(m=m, l=l), probs.astype(cfg.dtype)


def attend_block(cfg: Config, first, q, smem: Memory, barriers: Barriers, own, others, step, state, *, masked: bool):
    """The state with the values of the block before, under this block's maximum, and this block's weights."""
    state, probs = state
    slot, before = cfg.slot(step), cfg.slot(step - 1)
    plgpu.barrier_wait(barriers.k_ready.at[slot])
    plgpu.barrier_wait(barriers.v_ready.at[before])
    plgpu.barrier_wait(own)

    def weigh_them(scores):
        plgpu.barrier_arrive(barriers.k_free.at[slot])
        pin(barriers)
        found = weigh(cfg, first, step, state.m, state.l, scores, masked=masked)
        pin(barriers)
        return found

    terms = value_terms(cfg, step - 1, state, probs, smem)
    (*o_lr, o), (m, l, rescale, probs) = score_and_add(  # noqa: E741
        cfg, q, smem.k.at[slot], terms, lambda: plgpu.barrier_arrive(others), weigh_them, (state.m, state.l, state.m)
    )
    plgpu.barrier_arrive(barriers.v_free.at[before])
    # Not before the products are there: ptxas takes the one block's weights for the other's, and multiplies in turn.
    return rescaled(Softmax(o, o_lr[0] if o_lr else None, m, l), m, l, rescale), probs.astype(cfg.dtype)


def score(cfg: Config, q, k):
    """q k of 64 queries and a block of keys."""

    def multiply(scores):
        plgpu.wgmma(scores, q, k.transpose((1, 0)))
        return scores[...]

    return pl.run_scoped(multiply, plgpu.ACC((BLOCK_Q, cfg.blocks.block_kv), jnp.float32))


def score_and_add(
    cfg: Config, q, k, terms, asked: Callable[[], None], weigh_them: Callable[[Any], tuple], like: tuple
) -> tuple[tuple, tuple]:
    """`multiply_add` of `terms`, and what `weigh_them` makes of q k meanwhile.

    `asked` is called when all is under way. `like` has the shapes and dtypes of what `weigh_them` returns, but for the
    last: that is like the scores.
    """
    shape = (BLOCK_Q, cfg.blocks.block_kv)
    if cfg.interpret:
        scores = score(cfg, q, k)
        asked()
        found = weigh_them(scores)
        return multiply_add(terms, interpret=cfg.interpret), found

    def issue(state):
        accumulators, found = state

        def multiply(scores):
            plgpu.wgmma(scores, q, k.transpose((1, 0)))
            for acc, (_, products) in zip(accumulators, terms, strict=True):
                for a, b in products:
                    plgpu.wgmma(acc, a, b)
            asked()
            weighed = weigh_them(plgpu.wgmma_accumulator_load(scores, wait_n=len(terms)))
            for ref, x in zip(found, weighed, strict=True):
                ref[...] = x

        pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))

    weights = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
    return pl.run_state(issue)((tuple(plgpu.ACC.init(acc) for acc, _ in terms), (*like, weights)))


def pin(barriers: Barriers) -> None:
    """Keeps the compiler from moving arithmetic across: it may, and does, put all of it behind a product's end."""
    own = barriers.pinned.at[lax.axis_index("warpgroup")]
    plgpu.barrier_arrive(own)
    plgpu.barrier_wait(own)
