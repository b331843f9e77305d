"""A lock that whoever waits gets before whoever has just let it go."""

import threading


class FairLock:
    """A reentrant lock. Its holder, having let go, cannot take it again before another thread that waits for it.

    Safe where the garbage collector may run a finalizer that takes it: every lock inside is reentrant, and none is
    taken by a thread that waits for the holder to do anything but let go.
    """

    def __init__(self):
        self._door, self._lock = threading.RLock(), threading.RLock()

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread holds it."""
        return self._lock._is_owned()  # pyright: ignore[reportAttributeAccessIssue]

    def __enter__(self) -> "FairLock":
        if self.is_mine:
            self._lock.acquire()
            return self
        try:
            with self._door:  # one waits for the lock, the others for the door, where whoever comes back waits, too
                self._lock.acquire()
        except BaseException:  # Ctrl-C, which may have come right behind the lock
            if self.is_mine:
                self._lock.release()
            raise
        return self

    def __exit__(self, *exception) -> None:
        self._lock.release()
