"""The implementation that runs everywhere: an operation after the other."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lragent_jax.kernels.rms_norm import rms_norm
from lragent_jax.kernels.row_matmul.arguments import Norm


def refuse(x: Array, weights: tuple[Array, ...], norm: Norm | None) -> None:
    """Nothing is refused."""


def row_matmul(
    x: Float[Array, "rows D"],
    weights: tuple[Array, ...],
    *,
    norm: Norm | None,
    keep_normed: bool,
    gated: bool,
    residual: Float[Array, "rows out"] | None,
    weights_at_rest: bool,
) -> tuple[Array, ...]:
    """See `api.row_matmul`; `weights_at_rest` changes nothing here."""
    if norm is not None:
        x = rms_norm(x, norm.scale, norm.eps)
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT  # no TF32 for f32
    results = tuple(
        jnp.dot(x, weight, precision=exact, preferred_element_type=jnp.float32).astype(x.dtype) for weight in weights
    )
    if gated:
        results = (jax.nn.silu(results[0]) * results[1],)
    if residual is not None:
        results = (residual + results[0],)
    return (*results, x) if keep_normed else results
