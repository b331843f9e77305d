"""Rotary position embedding of the low-rank keys, which are cached before it."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def rotate(
    x: Float[Array, "B S K H"], positions: Int32[Array, " S"], inv_freq: Float[Array, " H//2"]
) -> Float[Array, "B S K H"]:
    """Rotates lanes i and i + H/2 of every head by the angle positions · inv_freq[i].

    The pairing is that of Hugging Face's Llama weights ("rotate half"), not the interleaved one of the paper
    (RoFormer, arXiv 2104.09864). `inv_freq` already carries whatever scaling the model's configuration asks for.
    """
    angles = positions.astype(jnp.float32)[:, None] * inv_freq[None]
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def rope_table(num_positions: int, inv_freq: Float[Array, " half"] | None) -> Float[Array, "S 2*half"] | None:
    """Cosines and sines of all positions, side by side: the same for every layer, so XLA makes it once per step."""
    if inv_freq is None:
        return None
    angles = jnp.arange(num_positions).astype(jnp.float32)[:, None] * inv_freq[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1).astype(jnp.float16)
