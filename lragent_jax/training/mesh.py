"""Training over the mesh that `jax.set_mesh` made current: rows along "data", weights along "model"."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.llama import abstract_params
from lragent_jax.models.sharding import param_shardings
from lragent_jax.models.tensor_parallel import AXIS, WHOLE

DATA_AXIS = "data"


def current_mesh() -> Mesh | None:
    """The mesh that is current, if it has an axis that training can use."""
    mesh = jax.sharding.get_mesh()
    return mesh if {DATA_AXIS, AXIS} & set(mesh.axis_names) else None


def num_data_parts(mesh: Mesh | None) -> int:
    """How many parts the rows of a step are cut into."""
    return 1 if mesh is None else mesh.shape.get(DATA_AXIS, 1)


def weight_shardings(config: LlamaConfig, dtype: Any, mesh: Mesh | None) -> Any:
    """Where the base model's weights lie, as `read_model` takes it."""
    if mesh is None:
        return None
    if AXIS in mesh.axis_names:
        return param_shardings(config, abstract_params(config, dtype)[1], mesh)
    return NamedSharding(mesh, WHOLE)


def replicated(tree: Any, mesh: Mesh | None) -> Any:
    """The arrays on every device."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, WHOLE))


def cut_into_rows(batch: Any, mesh: Mesh | None) -> Any:
    """The arrays of a batch, each device with its rows; host arrays stay where they are without a mesh."""
    if mesh is None:
        return batch
    spec = PartitionSpec(DATA_AXIS) if DATA_AXIS in mesh.axis_names else WHOLE
    return jax.device_put(batch, NamedSharding(mesh, spec))
