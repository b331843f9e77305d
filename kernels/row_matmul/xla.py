"""The implementation that runs everywhere: an operation after the other."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lragent_jax.kernels.rms_norm import rms_norm
from lragent_jax.kernels.row_matmul.arguments import Described, Norm, Shrink


def refuse(x: Array, weights: tuple[Described, ...], norm: Norm | None, shrinks: tuple[Shrink, ...] = ()) -> None:
    """Nothing is refused."""


def row_matmul(
    x: Float[Array, "rows D"],
    weights: tuple[Array, ...],
    *,
    norm: Norm | None,
    keep_normed: bool,
    gated: bool,
    residual: Float[Array, "rows out"] | None,
    shrinks: tuple[Shrink, ...] = (),
) -> tuple[Array, ...]:
    """See `api.row_matmul`."""
    if norm is not None:
        x = rms_norm(x, norm.scale, norm.eps)
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT  # no TF32 for f32

    def product(equation: str, *operands):
        return jnp.einsum(equation, *operands, precision=exact, preferred_element_type=jnp.float32).astype(x.dtype)

    results = tuple(product("bd,do->bo", x, weight) for weight in weights)
    shrunk = tuple(product("bd,tbdr->tbr", x, lora_a[groups]) for lora_a, groups in shrinks)
    if gated:
        results = (jax.nn.silu(results[0]) * results[1],)
    if residual is not None:
        results = (residual + results[0],)
    return (*results, *[x] * keep_normed, *shrunk)
