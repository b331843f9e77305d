"""Whether Pallas kernels run interpreted: slowly, anywhere, with their memory and their waits watched. For tests."""

import contextlib
import contextvars
from collections.abc import Iterator

_INTERPRETED = contextvars.ContextVar("interpreted", default=False)


def is_interpreted() -> bool:
    """Read while a kernel is traced: a function that was jitted and traced before keeps what it had then."""
    return _INTERPRETED.get()


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels traced inside run in Pallas' interpret mode of their backend."""
    token = _INTERPRETED.set(True)
    try:
        yield
    finally:
        _INTERPRETED.reset(token)
