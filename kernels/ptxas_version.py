"""The PTX that ptxas knows, asked for once in a process.

JAX's Mosaic GPU asks whenever it lowers a conversion from or to few bits, and every condition in a kernel is one: it
starts ptxas again and again for an engine's programs, and Python waits. Nothing but small floats and integers uses the
answer, which stays the same for as long as the process runs.
"""

import functools

from jax.experimental.mosaic.gpu import fragmented_array


def ask_once() -> None:
    """From now on; nothing is done where JAX has no such question, or no CUDA."""
    extension = getattr(getattr(fragmented_array, "mgpu_lib", None), "_mosaic_gpu_ext", None)
    ask = getattr(extension, "_get_ptxas_isa_version", None)
    if ask is not None and not hasattr(ask, "cache_info"):
        setattr(extension, "_get_ptxas_isa_version", functools.cache(ask))  # noqa: B010
