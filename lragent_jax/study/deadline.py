"""When to stop: before work that would not be finished."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_RESERVE = 1.25
"""Work takes up to so much longer than the like of it took."""


class Deadline:
    """`seconds` from now; None never comes."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds

    def allows(self, seconds: float) -> bool:
        return self._end is None or self._clock() + seconds * _RESERVE < self._end


def expected_seconds(cell: Mapping[str, Any], finished: Iterable[Mapping[str, Any]], compiles: bool) -> float:
    """What a cell will take, by the finished ones: of its mode and length if there are any, otherwise by proportion.

    Cells have `mode`, `tokens` and `number` (of what is run), finished ones also `seconds` and, as a part of them,
    `compile_seconds`. `compiles`: whether this mode is new to the process, so that it compiles what others did.
    """
    finished = list(finished)
    if not finished:
        return 0.0

    def seconds(other: Mapping[str, Any]) -> float:
        net = max(other["seconds"] - other["compile_seconds"], 0.0)
        return net * cell["number"] / other["number"] * max(1.0, cell["tokens"] / other["tokens"])

    same_mode = [other for other in finished if other["mode"] == cell["mode"]]
    closest = [other for other in same_mode if other["tokens"] == cell["tokens"]]
    closest = closest or [other for other in finished if other["tokens"] == cell["tokens"]] or finished
    compiling = max((other["compile_seconds"] for other in same_mode), default=0.0) if compiles else 0.0
    return max(map(seconds, closest)) + compiling
