"""Products of a row with weights, and what stands around them, as one kernel: a decode step on Hopper GPUs.

For how many rows that is faster than XLA, `kernels/row_matmul/dispatch.py` says.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lragent_jax.kernels.row_matmul import Norm, Shrink, dispatch, row_matmul
from lragent_jax.models.tensor_parallel import BY_COLUMN, WHOLE, is_per_shard, num_shards, per_shard


def row_products(
    x: Float[Array, "B T D"],
    weights: Sequence[Float[Array, "D _"]],
    *,
    norm: tuple[Float[Array, " D"], float] | None = None,
    keep_normed: bool = False,
    gated: bool = False,
    residual: Float[Array, "B T _"] | None = None,
    shrinks: Mapping[str, tuple[Float[Array, "g D r"], Int[Array, "tables B"]]] = {},
    implementation: str | None,
) -> tuple[list[Any], dict[str, Float[Array, "tables B T r"]]] | None:
    """`row_matmul` of the B·T rows, where it is switched on for them and has a kernel.

    `norm` is a scale and an epsilon. `shrinks` are A's by target, and the groups of every table and row: X A is the
    second result. `implementation` is the one of attention: its name, too, if there is one of it. None: nothing was
    done, and the caller's own operations are to do it.

    Where a mesh cuts the model, every device makes its own columns of the products, of weights that are cut so; inside
    `per_shard`, products of its shards. A residual is for the caller to add there, behind the sum over shards.
    """
    B, T, width = x.shape
    if B * T > dispatch.MOST_ROWS_BY_DEFAULT or is_cut_otherwise():
        return None
    if implementation not in (None, "pallas_mosaic_gpu") or (residual is not None and not dispatch.RESIDUAL_BY_DEFAULT):
        return None
    shards = num_shards()
    if shards > dispatch.MOST_SHARDS_BY_DEFAULT or (residual is not None and shards > 1):
        return None
    rows, weights = x.reshape(B * T, width), tuple(weights)
    by = None if norm is None else Norm(*norm)
    by_row = tuple(Shrink(lora_a, jnp.repeat(groups, T, axis=1)) for lora_a, groups in shrinks.values())
    cuts = 1 if is_per_shard() else shards
    of_shard = tuple(jax.ShapeDtypeStruct((width, weight.shape[1] // cuts), weight.dtype) for weight in weights)
    try:
        chosen = dispatch.choose(implementation, rows, of_shard, by, by_row)
    except NotImplementedError:
        return None
    if chosen == "xla":
        return None

    def multiply(rows, weights, scale, residual, by_row):
        return row_matmul(
            rows, weights, norm=by and by._replace(scale=scale), keep_normed=keep_normed, gated=gated,
            residual=residual, shrinks=by_row, implementation=chosen,
        )  # fmt: skip

    if cuts > 1:
        products = (BY_COLUMN,) * (1 if gated else len(weights))
        multiply = per_shard(
            multiply,
            (WHOLE, BY_COLUMN, WHOLE, WHOLE, WHOLE),
            (*products, *(WHOLE,) * (keep_normed + len(by_row))),
        )
    results = multiply(
        rows, weights, by and by.scale, None if residual is None else residual.reshape(B * T, -1), by_row
    )  # fmt: skip
    products, shrunk = results[: len(results) - len(by_row)], results[len(results) - len(by_row) :]
    by_target = {target: y.reshape(-1, B, T, y.shape[-1]) for target, y in zip(shrinks, shrunk, strict=True)}
    return [y.reshape(B, T, -1) for y in products], by_target


def is_cut_otherwise() -> bool:
    """Whether the mesh that `jax.set_mesh` made current, if any, has several devices that do not cut the model."""
    return jax.sharding.get_abstract_mesh().size > num_shards()
