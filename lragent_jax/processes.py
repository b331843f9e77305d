"""Several processes as one: JAX's start-up of a run over many hosts."""

import jax

from lragent_jax.models.errors import InputError


def join_processes(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Meets the other processes, after which JAX's devices are those of all of them; once is enough.

    Every process then makes the same calls in the same order. What is None is found out by JAX, which knows Cloud TPU,
    Slurm, Kubernetes and MPI. Call it before anything asks JAX for its devices. Raises `InputError` if it is too late
    or the arguments do not say enough.
    """
    if jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"this process cannot join others: {error}; make the engine before anything else uses JAX, and where the "
            "cluster does not say, give coordinator_address, num_processes and process_id"
        ) from error
