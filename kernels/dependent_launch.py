"""Kernels of NVIDIA GPUs that start while the one before still runs: programmatic dependent launch, from JAX 0.11 on.

A kernel that waits for those before it by itself may be launched early: its blocks come to processors that the kernel
before leaves, set up what they need and read what no kernel writes. It is a matter of the launch, too: where one goes
into a CUDA graph by itself, it has nothing before it to wait for, and starts as every kernel does.
"""

import jax.experimental.pallas.mosaic_gpu as plgpu

from lragent_jax.kernels.interpret import is_interpreted

ENABLED = True
"""Read while a kernel is traced."""


def can_start_early() -> bool:
    return ENABLED and hasattr(plgpu, "griddepcontrol_wait") and not is_interpreted()


def wait_for_kernels_before() -> None:
    """What they wrote may be read from here on, and what they read written; and the next kernel may start to wait.

    All warps of a kernel call it that touch such memory, before they do, and none of them twice. No kernel runs beside
    one that is two before it: this one's wait was over when the next one could start.
    """
    if can_start_early():
        plgpu.griddepcontrol_wait()
        plgpu.griddepcontrol_launch_dependents()
