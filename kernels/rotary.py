"""Rotary position embeddings, half-split as in Llama, from cosines and sines that are computed once per pass."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def rotate(
    x: Float[Array, "B T heads H"], cos: Float[Array, "B T Hh"], sin: Float[Array, "B T Hh"]
) -> Float[Array, "B T heads H"]:
    """Turns the pairs (x[i], x[i + H/2]) by their angle, in f32, back to x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
