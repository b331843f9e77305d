"""What the profiler saw on the device: kernels with their times, and when there was none."""

import collections
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Kernel(NamedTuple):
    """One event of a stream, in nanoseconds of the profiler's clock, and the program it belongs to ("" if unknown)."""

    start: float
    stop: float
    name: str
    program: str


class Gap(NamedTuple):
    """Nanoseconds in which no kernel ran."""

    start: float
    stop: float

    @property
    def length(self) -> float:
        return self.stop - self.start


def traced_kernels(run: Callable[[], Any]) -> list[Kernel]:
    """The kernels of one `run`, in order; none where the profiler sees no device, as on a CPU."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        [file] = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_serialized_xspace(file.read_bytes())
    kernels = []
    for plane in (plane for plane in data.planes if plane.name.startswith("/device:")):
        for line in (line for line in plane.lines if (line.name or "").startswith("Stream")):
            for event in line.events:
                program = next((str(value) for name, value in event.stats if name == "hlo_module"), "")
                kernels.append(Kernel(event.start_ns, event.start_ns + event.duration_ns, event.name, program))
    return sorted(kernels)


def busiest_program(kernels: Iterable[Kernel]) -> list[Kernel]:
    """The kernels of the program that ran longest."""
    seconds: collections.Counter[str] = collections.Counter()
    kernels = list(kernels)
    for kernel in kernels:
        seconds[kernel.program] += int(kernel.stop - kernel.start)
    if not seconds:
        return []
    program, _ = seconds.most_common(1)[0]
    return [kernel for kernel in kernels if kernel.program == program]


def gaps(kernels: Sequence[Kernel]) -> list[Gap]:
    """When none of the kernels ran, between the first one's start and the last one's end. They may overlap."""
    found, ordered = [], sorted(kernels)
    busy_until = ordered[0].start if ordered else 0.0
    for kernel in ordered:
        if kernel.start > busy_until:
            found.append(Gap(busy_until, kernel.start))
        busy_until = max(busy_until, kernel.stop)
    return found


def idle_shares(kernels: Sequence[Kernel], num_steps: int, untraced_ms: float) -> dict[str, Any]:
    """How much of the time of `num_steps` steps of one program the device idles; one takes `untraced_ms` untraced.

    `idle`: all gaps between kernels over the time from the first to the last. `between_steps`: the num_steps - 1
    longest of them, one for each border of two steps: if the borders' are not the longest, they are shorter still.
    Both are those of the traced run, whose launches the profiler makes slower, and with them the gaps. `idle_untraced`
    is free of that: what is left of an untraced step beside its kernels, all gaps counted.
    """
    window = max(kernel.stop for kernel in kernels) - min(kernel.start for kernel in kernels)
    lengths = sorted((gap.length for gap in gaps(kernels)), reverse=True)
    busy_ms = 1e-6 * (window - sum(lengths)) / num_steps
    return {
        "steps": num_steps,
        "ms_per_step": 1e-6 * window / num_steps,
        "busy_ms_per_step": busy_ms,
        "untraced_ms": untraced_ms,
        "idle_untraced": max(0.0, 1 - busy_ms / untraced_ms),
        "kernels_per_step": len(kernels) / num_steps,
        "idle": sum(lengths) / window,
        "between_steps": sum(lengths[: num_steps - 1]) / window,
        "longest_gap_us": 1e-3 * lengths[0] if lengths else 0.0,
    }


def around_longest_gap(kernels: Sequence[Kernel], microseconds: float = 150.0) -> list[tuple[float, float, str]]:
    """(start, duration, name) of the kernels near the longest gap, in microseconds from its start: to be drawn."""
    found = gaps(kernels)
    if not found:
        return []
    centre = max(found, key=lambda gap: gap.length).start
    near = [kernel for kernel in kernels if abs(kernel.start - centre) <= 1e3 * microseconds]
    return [(round(1e-3 * (k.start - centre), 3), round(1e-3 * (k.stop - k.start), 3), k.name[:40]) for k in near]
