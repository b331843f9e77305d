"""Where Mosaic GPU's interpreter runs."""

import os

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import pytest

# Warpgroups wait for each other inside of callbacks. XLA takes NPROC for the number of processors, and runs as many.
_THREADS = int(os.environ.get("NPROC", os.cpu_count() or 1))
# Where JAX's default device is a GPU, the callbacks wait for ever.
IS_THERE = hasattr(plgpu, "InterpretGPUParams") and _THREADS >= 8 and jax.default_backend() != "gpu"
NEEDS = "needs Mosaic GPU's interpreter (JAX 0.11 and newer, JAX_PLATFORMS=cpu) and 8 threads (NPROC=8)"

in_interpreter = pytest.mark.skipif(not IS_THERE, reason=NEEDS)
