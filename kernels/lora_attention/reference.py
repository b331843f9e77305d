"""The oracle: every page gathered, L B expanded for every token, one softmax. For tests, not for speed."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lragent_jax.kernels.lora_attention.arguments import LoraB, LowRank, PageTable
from lragent_jax.kernels.lora_attention.rope import rotate

einsum = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)


def dense(pool, page_indices, held):
    """The rows' own slots side by side in f32, [B, S, …]; zeros where `held` [B, S] says that nothing is stored."""
    page_size = pool.shape[2]
    pages = jnp.where(held[:, ::page_size], page_indices, 0)
    slots = pool[pages].swapaxes(2, 3).astype(jnp.float32)  # [B, W, p, K, 2H] or [B, W, p, r]
    slots = slots.reshape(*held.shape, *slots.shape[3:])
    return jnp.where(jnp.expand_dims(held, range(2, slots.ndim)), slots, 0.0)


@functools.partial(jax.jit, static_argnames=("sm_scale", "return_lse"))
def lora_attention(
    q: Float[Array, "B T N H"],
    base: Float[Array, "P K p 2*H"],
    low_rank: LowRank | None,
    lora_b: LoraB | None,
    page_table: PageTable,
    adapter_ids: Array | None,
    *,
    rope_inv_freq: Float[Array, " H//2"] | None,
    sm_scale: float,
    return_lse: bool,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """See `api.lora_attention`."""
    B, T, N, H = q.shape
    K, p = base.shape[1:3]
    positions = page_table.q_starts[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    keys = jnp.arange(page_table.base.shape[1] * p, dtype=jnp.int32)
    held = keys[None] < page_table.kv_lens[:, None]
    k, v = jnp.split(dense(base, page_table.base, held), 2, axis=-1)

    if low_rank and lora_b and adapter_ids is not None:  # all or none: see api
        own_b, adapted = lora_b.select(adapter_ids), held & (adapter_ids > 0)[:, None]
        if low_rank.v is not None:
            v += einsum("bsr,brkh->bskh", dense(low_rank.v, page_table.low_rank, adapted), own_b.v)
        if low_rank.k is not None and rope_inv_freq is not None:
            low_rank_keys = einsum("bsr,brkh->bskh", dense(low_rank.k, page_table.low_rank, adapted), own_b.k)
            k += rotate(low_rank_keys, keys, rope_inv_freq)

    grouped = q.astype(jnp.float32).reshape(B, T, K, N // K, H)
    scores = einsum("btkgh,bskh->btkgs", grouped, k).reshape(B, T, N, -1) * sm_scale
    seen = held[:, None, None, :] & (keys[None, None, None] <= positions[:, :, None, None])
    live = ((positions >= 0) & (positions < page_table.kv_lens[:, None]))[:, :, None]
    lse = jax.nn.logsumexp(jnp.where(seen & live[..., None], scores, -jnp.inf), axis=-1)
    probs = jnp.where(seen & live[..., None], jnp.exp(scores - jnp.where(live, lse, 0.0)[..., None]), 0.0)
    o = einsum("btkgs,bskh->btkgh", probs.reshape(B, T, K, N // K, -1), v).reshape(q.shape).astype(q.dtype)
    return (o, lse) if return_lse else o
