"""Compiles for an H100 and for TPUs that are not there, with the compilers that `make test-aot` installs.

Tests that call this carry `@pytest.mark.aot`. Nothing happens at import: where the compilers are missing, such a test
fails when it runs and says what to do.
"""

import functools
import importlib.util
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lragent_jax.measure.tpu_programs import Workload, model_mesh
from lragent_jax.models.config import LlamaConfig

# What an H100 says of itself (jaxlib's GpuTargetConfig), written down once on one.
H100 = Path(__file__).with_name("h100.gpu_target_config.pbtxt")

# What libtpu would ask a cloud machine's metadata server for.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # or the first of several test processes keeps the library for itself
}


def require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"{package} is not installed: run `make test-aot`, or install lragent-jax[aot]")


@functools.cache
def h100(count: int = 1, axis: str = "x") -> Mesh:
    """One H100, or several of one host, as a mesh with one Auto axis."""
    require("jax_cuda13_plugin")
    topology = topologies.get_topology_desc(
        "h100", platform="cuda", target_config=H100.read_text(), topology=f"1x1x{count}"
    )  # fmt: skip
    return Mesh(np.array(topology.devices), (axis,))


@functools.cache
def tpu(generation: str, chips: str) -> Mesh:
    """TPU chips as a mesh with the axis "x", e.g. `tpu("v5e", "2x2")`, `tpu("v5p", "1x1x1")`, `tpu("tpu7x", "1x1x1")`.

    It has all devices of the slice; a tpu7x chip is two.
    """
    require("libtpu")
    for name, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    sizes = [int(size) for size in chips.split("x")]
    bounds = {"chips_per_host_bounds": [1, 1, 1]} if math.prod(sizes) == 1 else {}
    topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{generation}:{chips}", **bounds)
    return Mesh(np.array(topology.devices), ("x",))


def v5e(chips: str = "1x1") -> Mesh:
    return tpu("v5e", chips)


def compile_for(mesh: Mesh, function: Callable, *shapes, **jit_options) -> jax.stages.Compiled:
    """`function` compiled for the mesh's devices. Arguments: pytrees of arrays or `jax.ShapeDtypeStruct`s.

    What has no sharding of its own is replicated. Keywords are those of `jax.jit`. Kernels that ask for their device
    find it in the mesh that is set meanwhile; `jax.default_backend()` is the machine's own.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(leaf):
        own = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own or replicated)

    with jax.set_mesh(mesh):
        return jax.jit(function, **jit_options).lower(*jax.tree.map(place, shapes)).compile()


def engine_workload(batch: int, tokens: int) -> Workload:
    """A small model of two layers for an H100, adapters on q and v."""
    config = LlamaConfig(
        vocab_size=512, width=1024, mlp_width=2048, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=128,
        rope_theta=1e4, norm_eps=1e-5, context_length=4096,
    )  # fmt: skip
    return Workload(
        config=config, mesh=model_mesh(h100().devices.flatten()), page_size=64, pages=700, width=64, rank=8,
        batch=batch, tokens=tokens, implementation="pallas_mosaic_gpu",
    )  # fmt: skip


@functools.cache
def engine_program(program: str, batch: int, tokens: int) -> tuple[jax.stages.Compiled, list]:
    """`prefill` or `decode` of `engine_workload`; and its pools."""
    workload = engine_workload(batch, tokens)
    compiled = workload.lower(program).compile()
    return compiled, [pool for pools in workload.caches() for pool in pools]


@functools.lru_cache(maxsize=1)
def text_of(compiled: jax.stages.Compiled) -> str:
    """The program as XLA writes it, kernels included, which takes it long; its readers ask one after the other."""
    return compiled.as_text() or ""


def implementations_in(compiled: jax.stages.Compiled) -> set[str]:
    """Names of the implementations of `lora_attention` whose operations the program holds."""
    return set(re.findall(r"/lora_attention_(\w+)/", text_of(compiled)))


def temporaries(compiled: jax.stages.Compiled) -> int:
    """Bytes of device memory that the program takes beside its arguments and results."""
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def copies_of(compiled: jax.stages.Compiled, *arrays) -> list[str]:
    """Names of the program's operations that copy or transpose an array of the size of one of `arrays`.

    Whatever shape they give it, and whether on their own or as a fusion, which XLA names after what it does.
    """
    sizes = {math.prod(array.shape) for array in arrays}
    operations = re.findall(r"%(\S+) = \(?\w+\[([\d,]+)\]\S* ([\w-]+)\(", text_of(compiled))
    return [
        name
        for name, shape, kind in operations
        if math.prod(map(int, shape.split(","))) in sizes
        and (kind in ("copy", "copy-start", "transpose") or (kind == "fusion" and re.search("copy|transpose", name)))
    ]
