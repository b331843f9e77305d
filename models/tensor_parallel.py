"""The few places where XLA's own partitioning would move more than it must: there each device runs its shard's program.

XLA partitions everything else by the shardings of weights and caches (`sharding.py`). Left to it, scattering into the
page pools and attention's kernels would gather the pools, looking up embeddings would gather their table in every
step, and the adapters of o and down would cost an all-reduce of their own.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

AXIS = "model"
"""The mesh axis along which weights and kv heads are cut."""

HEADS = PartitionSpec(None, None, AXIS)
"""[B, T, heads, …] and LoRA's B [A, r, out]: cut like the output of q, k and v."""

POOL = PartitionSpec(None, AXIS)
"""Base pages [P, K, p, 2H]: cut by kv head."""

BY_COLUMN = PartitionSpec(None, AXIS)
"""[D, V] of the unembedding, where it is not tied: cut by columns."""

LORA_A_BY_ROW = PartitionSpec(None, AXIS)
"""[g, in, r] of o and down: cut like the rows of their weights."""

BY_ROW = PartitionSpec(AXIS)
"""[V, D] of the embeddings, [in, out] of o and down: cut by rows."""

WHOLE = PartitionSpec()


def is_sharded() -> bool:
    """Whether the mesh that `jax.set_mesh` made current, if any, has the axis. Read while a program is traced."""
    return AXIS in jax.sharding.get_abstract_mesh().axis_names


def num_shards() -> int:
    """How many devices the model is cut for."""
    return jax.sharding.get_abstract_mesh().shape[AXIS] if is_sharded() else 1


def is_per_shard() -> bool:
    """Inside `per_shard`, where the model is cut."""
    return is_sharded() and AXIS in jax.sharding.get_abstract_mesh().manual_axes


def per_shard(function: Callable, in_specs: tuple[Any, ...], out_specs: Any) -> Callable:
    """`function` of the shards of its arguments; `function` itself where nothing is sharded.

    Other axes of the mesh stay XLA's: training cuts the batch along one.
    """
    if not is_sharded():
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names={AXIS}, check_vma=False)


def shapes_per_shard(specs: Any, arguments: Any) -> Any:
    """Shapes and dtypes of what each device's `function` is given by `per_shard`, of arguments with these specs."""
    sizes = {AXIS: num_shards()}

    def cut(spec: PartitionSpec, x):
        shape = (size // sizes.get(axis, 1) for size, axis in itertools.zip_longest(x.shape, spec))
        return jax.ShapeDtypeStruct(tuple(shape), x.dtype)

    return jax.tree.map(lambda spec, xs: jax.tree.map(functools.partial(cut, spec), xs), specs, arguments)


def sum_over_shards(x: jax.Array) -> jax.Array:
    """Inside `per_shard`: the layer's one all-reduce."""
    return jax.lax.psum(x, AXIS) if is_sharded() else x


def look_up(table: Float[Array, "V D"], ids: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
    """`table[ids]`. Of a table that is cut, every device looks up its own rows; one all-reduce adds up the finds."""
    if not is_sharded():
        return table[ids]

    def of_shard(table, ids):
        row = ids - jax.lax.axis_index(AXIS) * table.shape[0]
        found = (row >= 0) & (row < table.shape[0])
        return sum_over_shards(jnp.where(found[..., None], table[jnp.where(found, row, 0)], 0))

    return per_shard(of_shard, (BY_ROW, WHOLE), WHOLE)(table, ids)


def whole(x: Array) -> Array:
    """`x` on every device, where the host of each can read it."""
    return jax.lax.with_sharding_constraint(x, WHOLE) if is_sharded() else x
