"""Arguments from the host travel as one array, and come out as they were put in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lragent_jax.device_jit import DeviceJit
from lragent_jax.flat_tree import FlatTree
from lragent_jax.packed_tree import PackedTree


def test_leaves_come_out_as_they_went_in():
    tree = {
        "ints": np.arange(-3, 3, dtype=np.int32).reshape(2, 3),
        "floats": np.array([1.5, -0.0, np.inf, np.nan], np.float32),
        "seeds": np.array([2**32 - 1], np.uint32),
        "number": np.int32(7),
        "nothing": np.empty((0, 2), np.int32),
        "elsewhere": np.array([[5], [6]], np.int32).T,  # not in the order of memory
        "bits": np.array([True, False]),
        "on the device": jnp.arange(4),
        "absent": None,
    }
    packed = PackedTree(tree)
    assert packed.num_packed == 6
    assert len(jax.tree.leaves(packed)) == 3, "the array, the bits and what is on the device"
    found = jax.jit(lambda packed: packed.tree)(packed)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for given, returned in zip(jax.tree.leaves(tree), jax.tree.leaves(found), strict=True):
        assert (given.dtype, given.shape) == (returned.dtype, returned.shape)
        np.testing.assert_array_equal(given, returned)


@pytest.mark.parametrize("sizes", [(1, 1), (63, 64, 65), (530, 16, 1)])
def test_a_kernel_can_take_every_leaf_where_it_lies(sizes):
    """Mosaic GPU refuses addresses that are no multiple of 256 bytes, and XLA copies nothing for it."""
    _, places = PackedTree([np.ones(size, np.int32) for size in sizes]).tree_flatten()[1]
    assert [place.start % 64 for place in places if place] == [0] * len(sizes)


def test_a_program_is_compiled_once_for_all_numbers_and_once_for_every_shape():
    traced = []

    @DeviceJit
    def add(x, y):
        traced.append(x.shape)
        return x + y["a"]

    for value in (1, 2):
        np.testing.assert_array_equal(add(np.full(3, value, np.int32), {"a": np.int32(value)}), [2 * value] * 3)
    add(np.ones(4, np.int32), {"a": np.int32(1)})
    assert traced == [(3,), (4,)]


def test_a_flat_tree_beside_arrays_of_the_host_is_a_tree():
    program = DeviceJit(lambda weights, x, y: weights[0] + x + y)
    found = program(FlatTree([jnp.ones(2)]), np.array([1, 2], np.float32), np.array([3, 4], np.float32))
    np.testing.assert_array_equal(found, [5, 7])


def test_what_is_not_in_the_machines_own_bytes_is_left_to_jax():
    program = DeviceJit(lambda x, y: x + y)
    with pytest.raises(TypeError):
        program(np.array([1, 2], ">i4"), np.array([1, 2], ">i4"))
    with pytest.raises(TypeError):
        program(np.int32(1), np.int32(2), np.int32(3))


def test_arguments_that_are_static_donated_or_resident_stay_where_they_are():
    seen = {}

    def function(graph, weights, pool, x, y):
        seen.update(graph=graph, weights=type(weights), pool=type(pool))
        return pool + x + y * weights

    program = DeviceJit(function, resident=("weights",), static_argnames=("graph",), donate_argnames="pool")
    pool = jnp.ones(2, jnp.int32)
    result = program("a graph", np.int32(3), pool, np.int32(1), np.arange(2, dtype=np.int32))
    np.testing.assert_array_equal(result, [2, 5])
    assert seen["graph"] == "a graph"
    assert pool.is_deleted()
    assert len(program.lower("a graph", np.int32(3), result, np.int32(1), np.int32(2)).args_info[0]) == 5 - 1
