"""The `lragent` command. Its modules import what they need when a command runs, so that `--help` is quick."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator


def main() -> None:
    """Runs the command line: exit code 0, 1 for an error of ours (one message on standard error), 2 for wrong usage.

    128 + n if signal n ends it.
    """
    from lragent_jax.cli.app import app

    _write_whatever_comes()
    with _signals_exit():
        app()


def _write_whatever_comes() -> None:
    """What the output's encoding lacks becomes a question mark: an error there would lose all that was generated."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)  # whoever replaced the stream need not have it
    if reconfigure is not None:
        reconfigure(errors="replace")


@contextlib.contextmanager
def _signals_exit() -> Iterator[None]:
    """Being terminated is an exit, which deletes half-written folders on its way, where Python would end on the spot.

    Only by signals that nobody handles or ignores (`nohup`), and in the main thread, which alone may ask for that.
    """
    handled = []
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        handled = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]

    def leave(number: int, frame: object) -> None:
        for other in handled:
            signal.signal(other, signal.SIG_IGN)  # a terminal that closes sends both: the first one's exit goes on
        sys.exit(128 + number)

    for number in handled:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)
