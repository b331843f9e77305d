"""Arguments of a compiled program that come from the host, sent to the device as one array."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

_ALIGNMENT = 64
"""Words. A compiler hands kernels what is cut out as it lies there, and those of Mosaic GPU take no other address."""


_PACKED = tuple(map(np.dtype, ("int32", "uint32", "float32")))
"""Dtypes, in the machine's own order of bytes."""


class _Place(NamedTuple):
    """Where a leaf lies in the array: its shape and the name of its dtype, from word `start` on."""

    start: int
    shape: tuple[int, ...]
    dtype: str

    def cut_from(self, words: Any) -> Any:
        cut = words[self.start : self.start + math.prod(self.shape)].reshape(self.shape)
        return lax.bitcast_convert_type(cut, self.dtype)


@jax.tree_util.register_pytree_node_class
class PackedTree:
    """A pytree whose leaves of the host, those of i32, u32 and f32, are one array of words; the others stay.

    A call of a compiled program sends every array of the host by itself, and takes its time over each: as often as a
    page table has fields. In the program, `tree` is the tree again.
    """

    def __init__(self, tree: Any):
        leaves, treedef = jax.tree.flatten(tree)
        places: list[_Place | None] = []
        packed, others, start = [np.empty(0, np.uint32)], [], 0
        for leaf in leaves:
            if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype in _PACKED:
                places.append(_Place(start, leaf.shape, leaf.dtype.name))
                padding = np.zeros(-leaf.size % _ALIGNMENT, np.uint32)
                packed += [np.ravel(leaf).view(np.uint32), padding]
                start += leaf.size + padding.size
            else:
                places.append(None)
                others.append(leaf)
        self._leaves = (np.concatenate(packed), *others)
        self._structure = treedef, tuple(places)

    @property
    def num_packed(self) -> int:
        """How many leaves are in the array."""
        return sum(place is not None for place in self._structure[1])

    @property
    def tree(self) -> Any:
        """The tree that was packed. Inside of a program: outside, every leaf would be cut out on the device."""
        treedef, places = self._structure
        words, *others = self._leaves
        rest = iter(others)
        return treedef.unflatten([next(rest) if place is None else place.cut_from(words) for place in places])

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, tuple[_Place | None, ...]]]:
        return self._leaves, self._structure

    @classmethod
    def tree_unflatten(cls, structure: tuple[Any, tuple[_Place | None, ...]], leaves: tuple[Any, ...]) -> "PackedTree":
        packed = object.__new__(cls)
        packed._leaves, packed._structure = tuple(leaves), structure
        return packed
