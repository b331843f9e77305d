"""How much of a low-rank cache is expanded at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

MAX_EXPANDED_BYTES = 2**30  # of keys and values that a call holds expanded; one row's are, however many they be


def in_turn(attend: Callable, row_bytes: int, *by_row):
    """attend(*by_row), for as many rows at a time as `MAX_EXPANDED_BYTES` has room for, one at least.

    row_bytes: of a row, expanded. by_row: pytrees of arrays, rows on axis 0, as those of the results.
    """
    num_rows = jax.tree.leaves(by_row)[0].shape[0]
    at_once = max(1, MAX_EXPANDED_BYTES // max(1, row_bytes))
    if num_rows <= at_once:
        return attend(*by_row)
    parts = [
        attend(*jax.tree.map(lambda x, first=first: x[first : first + at_once], by_row))
        for first in range(0, num_rows, at_once)
    ]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
