"""`jax.jit` for the engine's programs: with the compiler options that a kind of device needs, on a mesh as on one."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractDevice, NamedSharding, SingleDeviceSharding

from lragent_jax.exported_programs import exporting
from lragent_jax.flat_tree import FlatTree
from lragent_jax.models.tensor_parallel import WHOLE, is_sharded, num_shards
from lragent_jax.packed_tree import PackedTree

COMPILER_OPTIONS: dict[str, dict[str, str]] = {
    # Left alone, the compiler gives what a loop reads tiles of 16 x 128, where arguments have 8 x 128: a copy of all
    # weights in front of the loop, in every call. It expects the loop itself to take as long with either.
    "TPU7x": {"xla_tpu_control_large_2nd_minor_layout_for_x16": "0"},
}
"""By the name that JAX has for a kind of device; a compiler refuses the options of another."""

GPU_PLATFORMS = ("gpu", "cuda", "rocm")

NO_CUDA_GRAPHS = {"xla_gpu_graph_min_graph_size": "1000000"}
"""For a GPU's compiler, which else makes graphs of what it launches, and updates one whenever an argument has moved."""


# XLA's own kernel for small all-reduces goes into no graph, and so cuts a step into one graph per layer and more:
# between them the devices wait for the host. NCCL's goes into the graph of the whole step.
# Newer compilers take a list of what they may do with kernels of their own: gathering, which a step hardly does, stays.
_ALL_REDUCES_BY_NCCL = (
    {"xla_gpu_experimental_use_collective_kernels": "COLLECTIVE_KERNEL_ALL_GATHER"}
    if jax.__version_info__ >= (0, 11, 1)
    else {"xla_gpu_unsupported_use_all_reduce_one_shot_kernel": "False"}
)
CUDA_GRAPHS_OF_SEVERAL = _ALL_REDUCES_BY_NCCL | {
    "xla_gpu_enable_command_buffer":
    "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,COLLECTIVES,CONDITIONAL",
}  # fmt: skip
"""For a GPU's compiler, of a program that several devices run together as graphs: all-reduces, and the choice between
drawing a token and taking the likeliest, are part of them."""


class DeviceJit:
    """`jax.jit(function, **jit_options)`, compiled with the options of the device that it is compiled for.

    Arrays of the host travel together, as one (see `PackedTree`): those of positional arguments, but for arguments that
    are static or `resident`, which names large trees that lie on the devices already. Where a mesh is current,
    arguments from the host or from one device are put on all of its devices first: a program is not compiled once more
    when it is given its own results, and no process is left out. Where a positional argument is a `FlatTree`, the
    function gets its tree. `cuda_graphs`: whether a GPU launches it as graphs. That pays where one is launched many
    times in a call, as a step of decoding is; elsewhere, bringing it up to date costs more than it spares.

    A program that `exported_programs` keeps is not traced. No function that is itself jitted may call it: JAX takes
    compiler options at the top alone.
    """

    def __init__(self, function: Callable, *, resident: Sequence[str] = (), cuda_graphs: bool = False, **jit_options):
        functools.update_wrapper(self, function)
        stay = {*resident, *_names(jit_options.get("static_argnames")), *_names(jit_options.get("donate_argnames"))}
        self._stays = [name in stay for name in inspect.signature(function).parameters]
        self._function, self._jit_options = exporting(_given_trees(function)), jit_options
        self._cuda_graphs = cuda_graphs
        self._current: tuple[Mapping[str, str], dict[tuple[AbstractDevice, bool], Any]] = ({}, {})

    @contextlib.contextmanager
    def compiled_with(self, options: Mapping[str, str]) -> Iterator[None]:
        """Meanwhile, calls in all threads run a program compiled with these options, too.

        They go before those of the device. A call raises `jax.errors.JaxRuntimeError` if its compiler refuses one.
        """
        before = self._current
        self._current = options, {}
        try:
            yield
        finally:
            self._current = before

    def compiler_options(self, device: AbstractDevice) -> dict[str, str]:
        """Those that it is compiled with for such a device, or for several where a mesh of them is current."""
        return self._options(device, num_shards() > 1, self._current[0])

    def _options(self, device: AbstractDevice, is_cut: bool, more: Mapping[str, str]) -> dict[str, str]:
        options = dict(COMPILER_OPTIONS.get(device.device_kind, {}))
        if device.platform in GPU_PLATFORMS and not self._cuda_graphs:
            options |= NO_CUDA_GRAPHS
        elif device.platform in GPU_PLATFORMS and is_cut:
            options |= CUDA_GRAPHS_OF_SEVERAL
        return options | dict(more)

    def _jitted(self) -> Any:
        key = this_device(), num_shards() > 1
        more, jits = self._current  # read once: another thread may set it meanwhile
        if key not in jits:
            options = self._options(*key, more)
            jits.setdefault(key, jax.jit(self._function, compiler_options=options or None, **self._jit_options))
        return jits[key]

    def __call__(self, *args, **kwargs) -> Any:
        return self._jitted()(*self._sent(args, _on_all_devices), **kwargs)

    def lower(self, *args, **kwargs) -> jax.stages.Lowered:
        """The program that a call of such arguments runs; nothing is moved.

        Of those that do not come from the host shapes and dtypes are enough: where the others are among them belongs to
        the program.
        """
        return self._jitted().lower(*self._sent(args, _as_on_all_devices), **kwargs)

    def _sent(self, args: Sequence[Any], move: Callable[[Any], Any]) -> Sequence[Any]:
        """The arguments as the program takes them: what comes from the host is in the place of the first that moves."""
        sent = {i: arg for i, arg in enumerate(args) if i >= len(self._stays) or not self._stays[i]}
        packed = PackedTree(sent)
        if packed.num_packed > 1:
            sent = dict.fromkeys(sent) | {next(iter(sent)): packed}
        if is_sharded():
            sent = {i: move(arg) for i, arg in sent.items()}
        return [sent.get(i, arg) for i, arg in enumerate(args)]


def _names(names: str | Sequence[str] | None) -> Sequence[str]:
    return [names] if isinstance(names, str) else names or ()


def _given_trees(function: Callable) -> Callable:
    @functools.wraps(function)
    def with_trees(*args, **kwargs):
        sent = next((arg.tree for arg in args if isinstance(arg, PackedTree)), {})
        there = (sent.get(i, arg) for i, arg in enumerate(args))
        return function(*(arg.tree if isinstance(arg, FlatTree) else arg for arg in there), **kwargs)

    return with_trees


def _on_all_devices(tree: Any) -> Any:
    """The tree with all of its arrays on the current mesh; those that are there stay where they are."""
    leaves, treedef = jax.tree.flatten(tree)
    elsewhere = [_is_elsewhere(leaf) for leaf in leaves]
    if not any(elsewhere):
        return tree
    everywhere = NamedSharding(jax.sharding.get_mesh(), WHOLE)
    moved = iter(
        jax.device_put([leaf for leaf, is_moved in zip(leaves, elsewhere, strict=True) if is_moved], everywhere)
    )
    return treedef.unflatten(
        [next(moved) if is_moved else leaf for leaf, is_moved in zip(leaves, elsewhere, strict=True)]
    )


def _as_on_all_devices(tree: Any) -> Any:
    """What `_on_all_devices` returns, as shapes and dtypes."""
    everywhere = NamedSharding(jax.sharding.get_mesh(), WHOLE)

    def described(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere) if _is_elsewhere(leaf) else leaf

    return jax.tree.map(described, tree)


def _is_elsewhere(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array):
        return isinstance(leaf.sharding, SingleDeviceSharding)
    return isinstance(leaf, np.ndarray | np.generic) or getattr(leaf, "sharding", leaf) is None


def this_device() -> AbstractDevice:
    """One of the current mesh's; without one, where JAX puts work of its own accord."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None:
        return mesh.abstract_device
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue] (made at run time)
    device = default if isinstance(default, jax.Device) else jax.devices(default)[0]
    return _abstract(device.device_kind, device.platform)


@functools.cache
def _abstract(device_kind: str, platform: str) -> AbstractDevice:
    return AbstractDevice(device_kind, None, platform)
