"""The page write as scatters, on any platform."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from lragent_jax.kernels.page_write.arguments import Expansion, LowRank, Pools, Projections, Rotation, Slots
from lragent_jax.kernels.rotary import rotate


def rotate_and_write(
    projections: Projections, rotation: Rotation, low_rank: LowRank, slots: Slots, pools: Pools
) -> tuple[Float[Array, "B T N H"], Pools]:
    """See `api.rotate_and_write`."""
    q, k, v, q_delta = projections
    if isinstance(q_delta, Expansion):
        q_delta = q_delta.expanded()
    q = rotate(q if q_delta is None else q + q_delta, *rotation)
    if k is not None and v is not None:
        pools = pools._replace(kv=write_base(pools.kv, rotate(k, *rotation), v, slots.base))
    for name, new in (("low_rank_v", low_rank.v), ("low_rank_k", low_rank.k)):
        if new is not None and slots.low_rank is not None:
            pools = pools._replace(**{name: write_low_rank(getattr(pools, name), new, slots.low_rank)})
    return q, pools


def expands(projections: Projections, low_rank: LowRank, pools: Pools, rank: int) -> bool:
    """See `api.expands`."""
    return False


def is_in_pool(slots: Int32[Array, "*tokens"], num_slots: int) -> Bool[Array, "*tokens"]:
    return (slots >= 0) & (slots < num_slots)


def write_base(
    kv: Float[Array, "P K p HH"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], slots: Int32[Array, "B T"]
) -> Float[Array, "P K p HH"]:
    """The pool is scattered into as a matrix of token rows: one leading scattered dimension is what XLA updates in
    place; two of them around the heads made it transpose, that is copy, the pool.
    """
    num_pages, num_kv_heads, page_size, width = kv.shape
    heads = jnp.arange(num_kv_heads, dtype=jnp.int32)
    page, slot = slots[..., None] // page_size, slots[..., None] % page_size
    rows = (page * num_kv_heads + heads) * page_size + slot
    nowhere = num_pages * num_kv_heads * page_size  # out of range: dropped
    rows = jnp.where(is_in_pool(slots, num_pages * page_size)[..., None], rows, nowhere)
    tokens = jnp.concatenate([k, v], axis=-1).astype(kv.dtype)
    flat = kv.reshape(-1, width).at[rows.reshape(-1)].set(tokens.reshape(-1, width), mode="drop")
    return flat.reshape(kv.shape)


def write_low_rank(
    pool: Float[Array, "P r p"], low_rank: Float[Array, "g B T r"], slots: Int32[Array, "g B T"]
) -> Float[Array, "P r p"]:
    num_pages, rank, page_size = pool.shape
    page, slot = slots[..., None] // page_size, slots[..., None] % page_size
    index = (page * rank + jnp.arange(rank, dtype=jnp.int32)) * page_size + slot
    index = jnp.where(is_in_pool(slots, num_pages * page_size)[..., None], index, num_pages * rank * page_size)
    flat = pool.reshape(-1).at[index.reshape(-1)].set(low_rank.astype(pool.dtype).reshape(-1), mode="drop")
    return flat.reshape(pool.shape)
