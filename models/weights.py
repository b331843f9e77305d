"""Fills the declaration of the weights from a file of another layout: one table of names, one tensor at a time."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from lragent_jax.models.errors import CheckpointError, ConfigError
from lragent_jax.models.problems import listing

Progress = Callable[[int, int, str], None]
"""Called with (bytes done, bytes in all, what is being read)."""

Shardings = Sharding | Any
"""None (the default device), one sharding for every weight, or a tree of them shaped like the parameters."""

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file that has not been read.

    `shape` is the file's, `num_bytes` what it takes there; `unreadable` says why it cannot be read as a weight.
    """

    name: str
    shape: tuple[int, ...]
    num_bytes: int
    read: Callable[[], np.ndarray]
    unreadable: str | None = None


@dataclasses.dataclass(frozen=True)
class WeightName:
    """One line of a weight map; `{i}` stands for the layer. `transposed`: they keep [out, in] and we [in, out]."""

    theirs: str
    ours: str
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class _Assignment:
    ours: str
    tensor: StoredTensor
    transposed: bool


def weight_dtype(dtype: Any) -> np.dtype:
    """The dtype by name or object; raises `ConfigError` for one that weights cannot have."""
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        raise ConfigError(f"dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}") from None
    if dtype.name not in DTYPES:
        raise ConfigError(f"weights cannot be {dtype.name}; use one of {', '.join(DTYPES)}")
    return dtype


def leaf_names(params: Any) -> list[str]:
    """Dotted paths ("layers.0.attention.q.kernel") of the leaves, in the order of `jax.tree.leaves`."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    return [".".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)) for path in paths]


def leaf_shardings(params: Any, shardings: Shardings) -> list[Sharding | None]:
    """One sharding per leaf of `params`, in the order of `jax.tree.leaves`."""
    structure = jax.tree.structure(params)
    if shardings is None or isinstance(shardings, Sharding):
        return [shardings] * structure.num_leaves
    if jax.tree.structure(shardings) != structure:
        raise ValueError("the tree of shardings is not shaped like the parameters; make it with param_shardings")
    return jax.tree.leaves(shardings)


def fill(
    abstract: Any,
    stored: Mapping[str, StoredTensor],
    weight_map: Sequence[WeightName],
    ignored: re.Pattern[str],
    source: str,
    shardings: Shardings = None,
    progress: Progress | None = None,
) -> Any:
    """The parameters that `abstract` declares, read from `stored` in its order and put on the device.

    Every missing, unused or mis-shaped key is reported in one `CheckpointError` before anything is read; names that
    match `ignored` may stay unused. Transposition and cast happen on the device, and the host lets go of a tensor
    before it reads the one after the next. NaN, infinity and numbers too large for the dtype are a `CheckpointError`
    as well.
    """
    assignments = _match(abstract, stored, weight_map, ignored, source)
    names = leaf_names(abstract)
    leaves = dict(zip(names, jax.tree.leaves(abstract), strict=True))
    placed = dict(zip(names, leaf_shardings(abstract, shardings), strict=True))
    total = sum(assignment.tensor.num_bytes for assignment in assignments)
    done, filled, problems = 0, {}, []
    for assignment in assignments:
        if progress is not None:
            progress(done, total, assignment.tensor.name)
        weight, problem = _put(assignment, leaves[assignment.ours].dtype, placed[assignment.ours])
        filled[assignment.ours] = weight
        problems.extend([] if problem is None else [f"{assignment.tensor.name}: {problem}"])
        done += assignment.tensor.num_bytes
    if problems:
        raise CheckpointError(listing(f"{source} holds numbers that cannot be run:", problems))
    if progress is not None:
        progress(total, total, "")
    return jax.tree.unflatten(jax.tree.structure(abstract), [filled[name] for name in names])


def _match(
    abstract: Any,
    stored: Mapping[str, StoredTensor],
    weight_map: Iterable[WeightName],
    ignored: re.Pattern[str],
    source: str,
) -> list[_Assignment]:
    """Which stored tensor fills which weight, in the order of `stored`."""
    by_our_name = {line.ours: line for line in weight_map}
    wanted, found, problems = set(), {}, []
    for ours, leaf in zip(leaf_names(abstract), jax.tree.leaves(abstract), strict=True):
        layer = re.search(r"\d+", ours)
        line = by_our_name[re.sub(r"\d+", "{i}", ours)]
        theirs = line.theirs.format(i=layer.group() if layer else "")
        wanted.add(theirs)
        shape = leaf.shape[::-1] if line.transposed else leaf.shape
        if theirs not in stored:
            problems.append(f"missing: {theirs}")
        elif (tensor := stored[theirs]).shape != shape:
            problems.append(f"mis-shaped: {theirs} is {list(tensor.shape)}, expected {list(shape)}")
        elif tensor.unreadable:
            problems.append(f"unreadable: {theirs} is {tensor.unreadable}")
        else:
            found[theirs] = _Assignment(ours, tensor, line.transposed)
    problems += [f"unused: {name}" for name in stored if name not in wanted and not ignored.search(name)]
    if problems:
        raise CheckpointError(listing(f"the tensors of {source} do not agree with its configuration:", problems))
    return [found[name] for name in stored if name in found]


def _put(assignment: _Assignment, dtype: np.dtype, sharding: Sharding | None) -> tuple[jax.Array, str | None]:
    """Reads one tensor onto the device, and what is wrong with its numbers."""
    stored = jax.device_put(assignment.tensor.read(), _stored_sharding(sharding, assignment.transposed))
    weight, finite = _converter(dtype, assignment.transposed, sharding)(stored)
    # Waiting for the flag also keeps the host from reading ahead of the device, and so its memory bounded.
    return weight, None if finite else f"NaN, infinity or too large for {dtype.name}"


@functools.cache
def _converter(dtype: np.dtype, transposed: bool, sharding: Sharding | None):
    """Jitted: (stored tensor) -> (weight, whether all of it is finite)."""

    def convert(stored):
        weight = (stored.T if transposed else stored).astype(dtype)
        return weight, jnp.isfinite(weight).all()

    return jax.jit(convert, out_shardings=None if sharding is None else (sharding, None))


def _stored_sharding(sharding: Sharding | None, transposed: bool) -> Sharding | None:
    """Where the parts of a tensor go before it is transposed: to the devices that will hold them."""
    if not transposed or not isinstance(sharding, NamedSharding):
        return sharding
    first, second = (*sharding.spec, None, None)[:2]
    return NamedSharding(sharding.mesh, PartitionSpec(second, first))
