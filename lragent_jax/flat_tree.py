"""Large trees that compiled programs take over and over, flattened once."""

from typing import Any

import jax


class _Structure:
    """A `PyTreeDef` that is compared by identity first: JAX compares those of all arguments in every call."""

    __slots__ = ("treedef",)

    def __init__(self, treedef: Any):
        self.treedef = treedef

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Structure) and self.treedef == other.treedef)

    def __hash__(self) -> int:
        return hash(self.treedef)

    def __repr__(self) -> str:
        return repr(self.treedef)


@jax.tree_util.register_pytree_node_class
class FlatTree:
    """A pytree as its leaves and its structure.

    A call of a compiled program flattens its arguments, and the nodes of Flax and of our own, hundreds in a model, are
    flattened in Python. Here it happens once. The tree has to stay as it is. `DeviceJit` gives a program the `tree`.
    """

    def __init__(self, tree: Any):
        leaves, treedef = jax.tree.flatten(tree)
        self._leaves, self._structure = tuple(leaves), _Structure(treedef)

    @property
    def tree(self) -> Any:
        """The tree that was flattened, built anew around the same leaves."""
        return self._structure.treedef.unflatten(self._leaves)

    def tree_flatten(self) -> tuple[tuple[Any, ...], _Structure]:
        return self._leaves, self._structure

    @classmethod
    def tree_unflatten(cls, structure: _Structure, leaves: tuple[Any, ...]) -> "FlatTree":
        flat = object.__new__(cls)
        flat._leaves, flat._structure = leaves, structure
        return flat
