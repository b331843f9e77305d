"""The angles of rotary position embeddings, with Llama 3.1's frequency scaling."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lragent_jax.models.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians per position, f32 [H/2].

    With `rope_scaling` (Llama 3.1): wavelengths longer than the original context over `low_freq_factor` are
    stretched by `factor`, those shorter than the context over `high_freq_factor` stay, between them it blends.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    inv_freq = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq
    turns = scaling.original_context_length * inv_freq / np.float32(2 * np.pi)  # within the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0).astype(np.float32)
    return (blend * inv_freq + (1 - blend) * inv_freq / np.float32(scaling.factor)).astype(np.float32)


def rotation(
    positions: Int[Array, "B T"], inv_freq: Float[np.ndarray, " Hh"]
) -> tuple[Float[Array, "B T Hh"], Float[Array, "B T Hh"]]:
    """Cosines and sines of every angle, f32 [B, T, H/2]: computed once per pass, used by all layers."""
    angles = positions[..., None].astype(jnp.float32) * inv_freq
    return jnp.cos(angles), jnp.sin(angles)
