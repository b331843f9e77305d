"""Tensor parallelism as data: which weight is cut along which axis of a mesh."""

from typing import Any, overload

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lragent_jax.models.adapter_bank import AdapterBank
from lragent_jax.models.cache_view import BaseCache, LowRankCache
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import ConfigError
from lragent_jax.models.llama import Params
from lragent_jax.models.problems import listing
from lragent_jax.models.tensor_parallel import AXIS, HEADS, LORA_A_BY_ROW, POOL, WHOLE

SHARDED = {"N": "num_heads", "K": "num_kv_heads", "F": "mlp_width", "V": "vocab_size"}
"""Letters of the legend that are cut, and how many parts each has; width and everything else is on every device.

q, k, v, gate and up are cut along their output, o and down along their input, so a layer needs one all-reduce after
o and one after down (Megatron-LM, arXiv 1909.08053)."""


def param_shardings(config: LlamaConfig, abstract: Params, mesh: Mesh, axis: str = AXIS) -> Any:
    """A `NamedSharding` per weight, in a tree shaped like the parameters, for tensor parallelism along `axis`.

    `abstract` is that of `abstract_params` (its `axes` decide). The mesh must be made of Auto axes, as
    `jax.make_mesh(..., axis_types=(AxisType.Auto,))` does. Raises `ConfigError` that lists everything the axis does
    not divide, and `ValueError` for a mesh that does not fit.
    """
    if axis not in mesh.axis_names:
        raise ValueError(f"the mesh has the axes {', '.join(map(str, mesh.axis_names))} and none called {axis!r}")
    if any(axis_type != AxisType.Auto for axis_type in mesh.axis_types):
        raise ValueError("the mesh must have Auto axes: make it with axis_types=(jax.sharding.AxisType.Auto,) per axis")
    parts = mesh.shape[axis]
    sizes = {field: getattr(config, field) for field in SHARDED.values()}
    if problems := [f"{field} = {size}" for field, size in sizes.items() if size % parts]:
        raise ConfigError(listing(f"{parts} devices along {axis!r} do not divide these; use fewer devices:", problems))
    shardings = {
        path: NamedSharding(mesh, PartitionSpec(*(axis if letter in SHARDED else None for letter in variable.axes)))
        for path, variable in nnx.to_flat_state(abstract)
    }
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(abstract)[0]]
    leaves = [shardings[tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))] for path in paths]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def bank_shardings(bank: AdapterBank, mesh: Mesh) -> AdapterBank:
    """A `NamedSharding` per array of the bank, such that adapters add no collective to a step."""

    def place(path, _) -> NamedSharding:
        if not isinstance(path[-1], jax.tree_util.GetAttrKey):  # group_of
            return NamedSharding(mesh, WHOLE)
        a, b = lora_shardings(path[-2].key, mesh)
        return a if path[-1].name == "lora_a" else b

    return jax.tree_util.tree_map_with_path(place, bank)


@overload
def lora_shardings(target: str, mesh: Mesh) -> tuple[NamedSharding, NamedSharding]: ...
@overload
def lora_shardings(target: str, mesh: None) -> None: ...


def lora_shardings(target: str, mesh: Mesh | None) -> tuple[NamedSharding, NamedSharding] | None:
    """Those of A and B. None without a mesh: on the default device.

    A of q, k, v, gate and up is on every device and B is cut like the weight's output; A of o and down is cut like the
    weight's input and B is on every device.
    """
    if mesh is None:
        return None
    a, b = (LORA_A_BY_ROW, WHOLE) if target in ("o", "down") else (WHOLE, HEADS)
    return NamedSharding(mesh, a), NamedSharding(mesh, b)


def current_mesh() -> Mesh | None:
    """The mesh that `jax.set_mesh` made current, if it has the axis that models are cut along."""
    mesh = jax.sharding.get_mesh()
    return mesh if AXIS in mesh.axis_names else None


def cache_shardings(base: BaseCache, low_rank: LowRankCache, mesh: Mesh) -> tuple[BaseCache, LowRankCache]:
    """A `NamedSharding` per pool: base pages are cut by kv head, low-rank pages are on every device."""
    by_head, whole = NamedSharding(mesh, POOL), NamedSharding(mesh, WHOLE)
    return jax.tree.map(lambda _: by_head, base), jax.tree.map(lambda _: whole, low_rank)
