"""What `row_matmul` is called with, as pytrees."""

from typing import NamedTuple

from jaxtyping import Array, Float


class Norm(NamedTuple):
    """RMSNorm in front of the product: x / sqrt(mean(x²) + eps), in f32, rounded to x's dtype, times scale."""

    scale: Float[Array, " D"]
    eps: float
