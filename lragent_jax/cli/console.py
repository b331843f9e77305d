"""What a person sees: progress on standard error, tables on standard output."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console

Progress = Callable[[int, int, str], None]
"""(steps done, steps in all, what is going on); 0 steps in all where nobody knows."""

_SECONDS_BETWEEN_LINES = 5.0


def stderr() -> Console:
    """Made anew for each use: tests and shells redirect the stream."""
    return Console(stderr=True)


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on a terminal; elsewhere a line per thing that is going on, and one every few seconds."""
    console = stderr()
    if not console.is_terminal:
        yield _Lines()
        return
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with RichProgress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield show


class _Lines:
    """Progress where there is no terminal to draw on."""

    def __init__(self):
        self._what, self._printed_at = "", 0.0

    def __call__(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if what == self._what and now - self._printed_at < _SECONDS_BETWEEN_LINES:
            return
        share = f" ({100 * done // total} %)" if total else ""
        print(f"{what}{share}", file=sys.stderr, flush=True)
        self._what, self._printed_at = what, now


def labelled(progress: Progress, what: str) -> Progress:
    """`progress` under one description, where the work itself would give hundreds (the names of weights)."""
    return lambda done, total, _: progress(done, total, what)
