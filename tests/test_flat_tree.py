"""A tree that is flattened once means to a compiled program what the tree means."""

import jax
import jax.numpy as jnp
import numpy as np

from lragent_jax.device_jit import DeviceJit
from lragent_jax.flat_tree import FlatTree
from lragent_jax.models.pytree import pytree


@pytree
class Weights:
    x: jax.Array
    more: dict[str, jax.Array]


def tree(scale: float = 1.0):
    return Weights(jnp.full(3, scale), {"b": jnp.ones(2), "a": jnp.zeros(2)})


def add(weights: Weights, y):
    assert isinstance(weights, Weights)
    return weights.x.sum() + weights.more["b"].sum() + y


def test_the_function_gets_the_tree_and_equal_structures_share_a_program():
    program = DeviceJit(add, resident=("weights",))
    assert program(FlatTree(tree()), 1.0) == program(tree(), 1.0) == 6
    assert program(FlatTree(tree(2.0)), 1.0) == 9
    assert program._jitted()._cache_size() == 2  # as a tree and as a flat one, however many of these there are


def test_another_structure_is_another_program():
    program = DeviceJit(lambda weights: jax.tree.map(lambda x: 2 * x, weights))
    assert set(program(FlatTree({"a": jnp.ones(1)}))) == {"a"}
    assert set(program(FlatTree({"b": jnp.ones(1)}))) == {"b"}


class Walked(list):
    """A node that counts how often it is flattened."""

    times = 0


def _flatten(node: Walked):
    Walked.times += 1
    return list(node), None


jax.tree_util.register_pytree_node(Walked, _flatten, lambda _, leaves: Walked(leaves))


def test_a_call_does_not_walk_the_tree():
    program = DeviceJit(lambda weights, y: weights[0] + y)
    flat = FlatTree(Walked([jnp.ones(1)]))
    program(flat, 1.0)
    before = Walked.times
    assert program(flat, 2.0) == 3
    assert Walked.times == before
    program(flat.tree, 2.0)
    assert Walked.times > before


def test_the_tree_comes_back_as_it_was():
    was = {"a": [np.arange(3), None], "b": (np.float32(2),)}
    back = FlatTree(was).tree
    assert jax.tree.structure(back) == jax.tree.structure(was)
    assert back["a"][0] is was["a"][0]
    assert jax.tree.leaves(jax.tree.map(lambda x: x + 1, FlatTree(was)))[1] == 3
