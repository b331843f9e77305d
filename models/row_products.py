"""Products of few rows with weights, and what stands around them, as one kernel: a decode step on Hopper GPUs.

Switched off until its time is known: `kernels/row_matmul/dispatch.py`.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Float

from lragent_jax.kernels.row_matmul import Norm, dispatch, row_matmul

MAX_ROWS = 16


def row_products(
    x: Float[Array, "B T D"],
    weights: Sequence[Float[Array, "D _"]],
    *,
    norm: tuple[Float[Array, " D"], float] | None = None,
    keep_normed: bool = False,
    gated: bool = False,
    residual: Float[Array, "B T _"] | None = None,
    implementation: str | None,
) -> list[Any] | None:
    """`row_matmul` of the B·T rows, where it is switched on and has a kernel for them.

    It has none for many rows, and where a mesh divides them.

    `norm` is a scale and an epsilon. `implementation` is the one of attention: its name, too, if there is one of it.
    None: nothing was done, and the caller's own operations are to do it.
    """
    B, T, width = x.shape
    if not dispatch.ENABLED_BY_DEFAULT or B * T > MAX_ROWS or is_divided():
        return None
    if implementation not in (None, "pallas_mosaic_gpu") or (residual is not None and not dispatch.RESIDUAL_BY_DEFAULT):
        return None
    rows, weights = x.reshape(B * T, width), tuple(weights)
    by = None if norm is None else Norm(*norm)
    try:
        chosen = dispatch.choose(implementation, rows, weights, by)
    except NotImplementedError:
        return None
    if chosen == "xla":
        return None
    added = None if residual is None else residual.reshape(B * T, -1)
    results = row_matmul(
        rows, weights, norm=by, keep_normed=keep_normed, gated=gated, residual=added,
        weights_at_rest=dispatch.EARLY_BY_DEFAULT, implementation=chosen,
    )  # fmt: skip
    return [y.reshape(B, T, -1) for y in results]


def is_divided() -> bool:
    """Whether the mesh that `jax.set_mesh` made current, if any, has several devices."""
    return jax.sharding.get_abstract_mesh().size > 1
