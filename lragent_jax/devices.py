"""Where an engine runs: one device, or a mesh of several that weights and kv heads are cut along."""

import contextlib
import dataclasses
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, Sharding, SingleDeviceSharding

from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import InputError
from lragent_jax.models.llama import Params, abstract_params
from lragent_jax.models.sharding import current_mesh, param_shardings
from lragent_jax.models.tensor_parallel import AXIS

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says what a container may have: version 2, and version 1."""


@dataclasses.dataclass(frozen=True)
class Devices:
    """The mesh, or None for one device. What an engine makes and runs, it makes and runs inside `scope()`."""

    mesh: Mesh | None

    @classmethod
    def of(cls, tensor_parallel: int) -> "Devices":
        """A mesh of so many devices; for 1 the mesh that is current, if there is one that models are cut along.

        Raises `InputError` where there are not so many.
        """
        if tensor_parallel == 1:
            return cls(current_mesh())
        return cls(Mesh(np.array(choose_devices(tensor_parallel)), (AXIS,), axis_types=(AxisType.Auto,)))

    def scope(self) -> contextlib.AbstractContextManager:
        """Makes the mesh this thread's current one, which is what programs and pools are cut by."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def weight_shardings(self, config: LlamaConfig, dtype: Any) -> Any:
        """Where weights lie, as `read_model` takes it. Raises `ConfigError` if the devices do not divide the model."""
        if self.mesh is None:
            return None
        return param_shardings(config, abstract_params(config, dtype)[1], self.mesh)

    def place(self, config: LlamaConfig, params: Params) -> Params:
        """The weights where they lie; those that are there already are not copied."""
        if self.mesh is None:
            return params
        return jax.device_put(params, param_shardings(config, params, self.mesh))

    def home(self, params: Params) -> Sharding | None:
        """The one device that the weights lie on, for what programs change to lie there from the start.

        Of arrays that were put on a device JAX makes another program than of those that happen to be on it, and what
        comes out of an exported program counts as put there. None on a mesh, and where the weights are not on a device.
        """
        if self.mesh is not None:
            return None
        place = getattr(jax.tree.leaves(params)[0], "sharding", None)
        return place if isinstance(place, SingleDeviceSharding) else None


def machine_bytes() -> int | None:
    """Memory that this process may have of the machine, as far as the system says; None where it does not."""
    if not hasattr(os, "sysconf"):
        return None
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            found.append(int(Path(file).read_text()))
    return min(found)


def choose_devices(count: int) -> list[Any]:
    """The first `count` devices, as many of every process: none may be left out. Raises `InputError`."""
    of_process: dict[int, list[Any]] = defaultdict(list)
    for device in jax.devices():
        of_process[device.process_index].append(device)
    each, rest = divmod(count, len(of_process))
    if rest:
        raise InputError(
            f"tensor_parallel is {count}, and there are {len(of_process)} processes: take as many devices of each"
        )
    if any(len(devices) < each for devices in of_process.values()):
        there = " + ".join(str(len(devices)) for devices in of_process.values())
        hint = (
            "; on CPU, XLA_FLAGS=--xla_force_host_platform_device_count makes virtual ones"
            if jax.default_backend() == "cpu"
            else ""
        )
        raise InputError(f"tensor_parallel is {count}, and JAX sees {there} {jax.default_backend()} devices{hint}")
    return [device for process in sorted(of_process) for device in of_process[process][:each]]
