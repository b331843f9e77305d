"""The online softmax of a prefill program's warpgroup: 64 queries, block of keys after block of keys."""

from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.pages import padded_rank
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.prefill_config import BLOCK_Q, Config, Memory
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.registers import multiply_add


class Softmax(NamedTuple):
    """An online softmax over base 2, f32 in registers: sums under the weights exp2(score - m), and the weights' sum."""

    o: Any  # [64, H]
    o_lr: Any  # [64, R] or None
    m: Any  # [64]
    l: Any  # [64]  # noqa: E741


def empty(cfg: Config) -> Softmax:
    row, tile = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA

    def full(fill, shape, layout):
        return plgpu.layout_cast(jnp.full(shape, fill, jnp.float32), layout)

    o_lr = full(0, (BLOCK_Q, padded_rank(cfg.r)), tile) if cfg.r else None
    return Softmax(full(0, (BLOCK_Q, cfg.H), tile), o_lr, full(-jnp.inf, (BLOCK_Q,), row), full(0, (BLOCK_Q,), row))


def weigh(cfg: Config, first, step, m, l, scores, *, masked: bool):  # noqa: E741
    """The new m and l, the factor of all sums under the old m, and the block's weights, in f32."""
    if masked:
        query, key = (
            plgpu.broadcasted_iota(jnp.int32, scores.shape, dim, layout=plgpu.Layout.WGMMA) for dim in range(2)
        )
        scores = jnp.where(key + (step * cfg.blocks.block_kv - first) <= query, scores, -jnp.inf)
    higher = jnp.maximum(m, scores.max(axis=1) * cfg.exp2_scale)
    rescale = jnp.exp2(m - higher)
    probs = jnp.exp2(scores * cfg.exp2_scale - lax.broadcast_in_dim(higher, scores.shape, [0]))
    return higher, l * rescale + probs.sum(axis=1), rescale, probs


def rescaled(state: Softmax, m, l, rescale) -> Softmax:  # noqa: E741
    o, o_lr = (None if a is None else a * lax.broadcast_in_dim(rescale, a.shape, [0]) for a in (state.o, state.o_lr))
    return Softmax(o, o_lr, m, l)


def value_terms(cfg: Config, step, state: Softmax, probs, smem: Memory) -> list:
    """A block's P L and P V, as `multiply_add` takes them: the small one first, the faster order where it was timed."""
    slot = cfg.slot(step)
    o = state.o, ((probs, smem.v.at[slot]),)
    return [(state.o_lr, ((probs, smem.low_rank.at[slot].transpose((1, 0))),)), o] if cfg.r else [o]


def add_values(cfg: Config, step, state: Softmax, probs, smem: Memory) -> Softmax:
    """The state with the values of a block, which have been waited for."""
    *o_lr, o = multiply_add(value_terms(cfg, step, state, probs, smem), interpret=cfg.interpret)
    return state._replace(o=o, o_lr=o_lr[0] if o_lr else None)
