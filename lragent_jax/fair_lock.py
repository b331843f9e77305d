"""A lock that whoever waits gets before whoever has just let it go."""

import _thread
import threading


class FairLock(_thread.RLock):  # pyright: ignore[reportGeneralTypeIssues] (final in stubs alone)
    """A reentrant lock. Its holder, having let go, cannot take it again before another thread that waits for it.

    Safe where the garbage collector may run a finalizer that takes it: every lock inside is reentrant, and none is
    taken by a thread that waits for the holder to do anything but let go. What lets go is not written in Python:
    Ctrl-C cannot come between.
    """

    def __init__(self):
        self._door = threading.RLock()

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread holds it."""
        return self._is_owned()  # pyright: ignore[reportAttributeAccessIssue]

    def __enter__(self) -> "FairLock":  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.is_mine:
            return super().__enter__()  # pyright: ignore[reportReturnType]
        try:
            with self._door:  # one waits for the lock, the others for the door, where whoever comes back waits, too
                self.acquire()
        except BaseException:  # Ctrl-C, which may have come right behind the lock
            if self.is_mine:
                self.release()
            raise
        return self
