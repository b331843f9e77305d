"""Who drives: of the threads that wait for requests one at a time steps, for everybody."""

import queue
import threading
from collections.abc import Callable


class Drivers:
    """The threads that wait, and whose turn it is to step."""

    def __init__(self):
        # C-level objects only: a finalizer may run while a thread is in the middle of them.
        self._turn = threading.RLock()
        self._asleep: list[queue.SimpleQueue[None]] = []

    def drive(self, done: Callable[[], bool], has_work: Callable[[], bool], step: Callable[[], None]) -> None:
        """Calls `step` while there is work, in turns with other threads that do so, until `done`; asked behind it."""
        asleep: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._asleep.append(asleep)
        try:
            while not done():
                if not (has_work() and self._take_turn(step)):
                    asleep.get()
        finally:
            self._asleep.remove(asleep)
            self.wake()

    def wake(self) -> None:
        """Lets every driver look again."""
        for asleep in list(self._asleep):
            if asleep.empty():  # a driver asks whether it is done after taking what is there
                asleep.put(None)

    def _take_turn(self, step: Callable[[], None]) -> bool:
        """Steps once, unless another thread is at it."""
        try:  # before the lock is taken: Ctrl-C may come right behind that
            if not self._turn.acquire(blocking=False):
                return False
            step()
            return True
        finally:
            if self._turn._is_owned():  # pyright: ignore[reportAttributeAccessIssue]
                self._turn.release()
                self.wake()
