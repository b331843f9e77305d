"""How time is taken: chains of calls on the device, medians over repeats, beside the most that the device can do."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class DeviceSpeed(NamedTuple):
    """Measured here: bytes read plus written per second by a copy, and FLOP per second of a bf16 matrix product."""

    bytes_per_s: float
    flop_per_s: float

    def floor_s(self, num_bytes: float, flop: float) -> float:
        """The least time that moving so many bytes and computing so many FLOP can take."""
        return max(num_bytes / self.bytes_per_s, flop / self.flop_per_s)


def median_seconds(run: Callable[[], Any], repeats: int = 5, runs: int = 3) -> float:
    """Median seconds of one `run`, queued `runs` times in a row so that the host's share hides behind the device's."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(runs - 1):
            run()
        jax.block_until_ready(run())
        seconds.append((time.perf_counter() - started) / runs)
    return statistics.median(seconds)


def measure_device() -> DeviceSpeed:
    """Copies 2 GB (a CPU: 8 MB) and multiplies two random matrices of 8192 x 8192 (a CPU: 1024 x 1024)."""
    small = jax.default_backend() == "cpu"
    array = jnp.ones((2**22 if small else 2**30,), jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)  # one read, one write
    n = 1024 if small else 8192
    matrix = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    matmul = jax.jit(lambda x: x @ x)
    return DeviceSpeed(
        bytes_per_s=2 * array.nbytes / median_seconds(lambda: copy(array), runs=10),
        flop_per_s=2 * n**3 / median_seconds(lambda: matmul(matrix), runs=10),
    )


def chain(function: Callable, calls: int, turns: int) -> Callable:
    """A program of 1 + calls * turns calls of `function(x, data[i], shared)`, each with the last one's result as its x.

    `data` is a sequence to cycle through: with more bytes in it than a cache of the device holds, every call reads
    from memory. Calls follow each other inside one program, since the launch of a program takes longer than a small
    kernel. Returns the first result, to be checked, and the last.
    """

    def program(x, data, shared):
        def turn(_, x):
            for i in range(calls):
                x = function(x, data[(i + 1) % len(data)], shared)
            return x

        first = function(x, data[0], shared)
        return first, lax.fori_loop(0, turns, turn, first)

    return program
