"""Rows times weights for NVIDIA Hopper: of few rows the weights' bytes take the time, of many the matrix units do."""

from types import ModuleType

from jaxtyping import Array

from lragent_jax.kernels.row_matmul.arguments import Described, Norm, Shrink
from lragent_jax.kernels.row_matmul.pallas_mosaic_gpu import few_rows, many_rows


def of_rows(x: Array) -> ModuleType:
    """The kernel for so many rows."""
    return few_rows if x.shape[0] <= few_rows.MAX_ROWS else many_rows


def refuse(
    x: Array, weights: tuple[Described, ...], norm: Norm | None, shrinks: tuple[Shrink, ...], gated: bool
) -> None:
    """Raises NotImplementedError for what neither kernel was written for."""
    of_rows(x).refuse(x, weights, norm, shrinks, gated)


def row_matmul(x: Array, weights: tuple[Array, ...], **options) -> tuple[Array, ...]:
    """See `api.row_matmul`."""
    return of_rows(x).row_matmul(x, weights, **options)
