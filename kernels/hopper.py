"""Which GPUs the Mosaic GPU kernels are for, and what those have."""

import jax

from lragent_jax.kernels import ptxas_version

SHARED_MEMORY = 227 * 1024  # bytes that the programs of a multiprocessor share out

ptxas_version.ask_once()  # all of those kernels import this module, directly or not, and none is lowered before


def refuse_other_gpus() -> None:
    """Raises NotImplementedError on a machine with a GPU that is no NVIDIA Hopper or newer."""
    if jax.default_backend() == "gpu":
        capability = jax.devices("gpu")[0].compute_capability  # AMD's are names: gfx942
        if not capability[0].isdigit() or float(capability) < 9.0:
            raise NotImplementedError(f"compute capability {capability}: it is written for NVIDIA Hopper and newer")
