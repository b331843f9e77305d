"""Which GPUs the Mosaic GPU kernels are for, what those have, and what all of these kernels are made with."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from lragent_jax.kernels import ptxas_version

SHARED_MEMORY = 227 * 1024  # bytes that the programs of a multiprocessor share out

ptxas_version.ask_once()  # all of those kernels import this module, directly or not, and none is lowered before


def refuse_other_gpus() -> None:
    """Raises NotImplementedError on a machine with a GPU that is no NVIDIA Hopper or newer."""
    if jax.default_backend() == "gpu":
        capability = jax.devices("gpu")[0].compute_capability  # AMD's are names: gfx942
        if not capability[0].isdigit() or float(capability) < 9.0:
            raise NotImplementedError(f"compute capability {capability}: it is written for NVIDIA Hopper and newer")


def tiled(*shape: int, dtype, swizzle: int = 128):
    """A buffer in shared memory in the layout that TMA writes and wgmma reads, rows of tiles of `swizzle` bytes."""
    lanes = swizzle // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(swizzle)))


def interpreter(interpret: bool) -> dict:
    """What `plgpu.kernel` takes to run interpreted, races detected. Public from JAX 0.11.2 on."""
    return {"interpret": plgpu.InterpretGPUParams(detect_races=True)} if interpret else {}
