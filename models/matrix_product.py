"""Products with weights that stay products of matrices on GPUs, where a batch of one token makes vectors of them.

XLA turns a vector times a matrix into an elementwise product, written to memory and rounded to the operands' dtype, and
sums that serially inside of whatever operation reads the result: seen in the compiled decode step of Llama-3.1-8B.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_ROWS = 8
"""Of zeros, and the vector among them: the weight is read once in any case, and the rest is small beside it."""


def matrix_product(
    product: Callable[..., Array], x: Float[Array, "B T width"], weight: Float[Array, "..."]
) -> Float[Array, "B T out_width"]:
    """product(x, weight), which treats the T rows of x alike; on GPUs one row alone is run among rows of zeros.

    A weight without a batch takes all B·T rows at once, one with a batch T rows for each of B.
    """
    num_rows = x.shape[1] if weight.ndim == 3 else x.shape[0] * x.shape[1]
    if num_rows > 1:
        return product(x, weight)

    def among_zeros(x, weight):
        return product(jnp.pad(x, ((0, 0), (0, _ROWS - 1), (0, 0))), weight)[:, :1]

    return jax.lax.platform_dependent(x, weight, cuda=among_zeros, rocm=among_zeros, default=product)


FEW_ROWS = 64
"""Where weights are what a product takes its time from: there XLA may join them, which it does once per program."""


def unjoined(x: Float[Array, "B T width"], count: int) -> list[Float[Array, "B T width"]]:
    """x so many times, as arrays that XLA on GPUs takes for different ones; of few rows, x itself.

    Products that read the same array it joins to one, and copies their weights side by side in every call.
    """
    if x.shape[0] * x.shape[1] <= FEW_ROWS:
        return [x] * count

    def hidden(x):
        copies = [x]
        for _ in range(count):
            copies.append(jax.lax.optimization_barrier(copies[-1]))
        return copies[1:]

    return jax.lax.platform_dependent(x, cuda=hidden, rocm=hidden, default=lambda x: [x] * count)
