"""The structure of a model as an argument that compiled programs are chosen by."""

import dataclasses
from typing import Any

import jax
from flax import nnx


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class HashedGraph(nnx.GraphDef):
    """A `GraphDef` that knows its hash.

    Flax's walks all layers whenever it is asked, in Python, and every call of a compiled program asks.
    """

    hashed: int = dataclasses.field(repr=False)  # another number in every process

    @classmethod
    def of(cls, graphdef: nnx.GraphDef) -> "HashedGraph":
        fields: dict[str, Any] = {field.name: getattr(graphdef, field.name) for field in dataclasses.fields(graphdef)}
        return cls(**fields, hashed=hash(graphdef))

    def __hash__(self) -> int:
        return self.hashed
