"""What `row_matmul` is called with, as pytrees."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int32

Described = Array | jax.ShapeDtypeStruct
"""An array, or what is to be known of one that is not there yet."""


class Norm(NamedTuple):
    """RMSNorm in front of the product: x / sqrt(mean(x²) + eps), in f32, rounded to x's dtype, times scale."""

    scale: Float[Array, " D"]
    eps: float


class Shrink(NamedTuple):
    """A of LoRA adapters, and which of its groups a row is multiplied by, for every table that its numbers go to."""

    lora_a: Float[Array, "g D r"]
    groups: Int32[Array, "tables rows"]
