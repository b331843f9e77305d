"""A thread of its own for calls that give the device work and may return only when the work is done."""

import atexit
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any


class Dispatched:
    """A call on its way, and then what it returned or raised."""

    # C-level objects only: a finalizer may run while a thread is in the middle of them.

    def __init__(self, call: Callable[[], Any]):
        self._call: Callable[[], Any] | None = call
        self._value: Any = None
        self.error: BaseException | None = None
        self._under_way = threading.Lock()
        self._under_way.acquire()

    def wait(self) -> None:
        """Returns when the call is over, whatever came of it."""
        with self._under_way:
            pass

    def result(self) -> Any:
        """What the call returned, or raises what it raised."""
        self.wait()
        if self.error is not None:
            raise self.error
        return self._value

    def run(self) -> None:
        assert self._call is not None
        try:
            self._value = self._call()
        except BaseException as error:  # it is raised where the result is asked for
            self.error = error
        finally:
            self._call = None
            self._under_way.release()


class _Thread(threading.Thread):
    def __init__(self):
        super().__init__(name="lragent-dispatch", daemon=True)
        self.calls: queue.SimpleQueue[Dispatched | None] = queue.SimpleQueue()

    def run(self) -> None:
        while (call := self.calls.get()) is not None:
            call.run()
            del call  # what it returned belongs to others


class Dispatcher:
    """Runs calls one after the other, beside the threads that ask for them.

    XLA's GPU runtime reads the condition of a loop on the host, turn for turn: to dispatch a block of decode steps
    takes as long as the block. Whoever does that in this thread has its own free for what the device has done before.

    The collector may run anybody's finalizers in this thread. They may take the cache's lock: nobody who holds that
    waits for this thread.
    """

    def __init__(self):
        self._thread = _Thread()
        self._last: Dispatched | None = None
        _threads.add(self._thread)
        self._thread.start()
        weakref.finalize(self, self._thread.calls.put, None)

    @property
    def is_current(self) -> bool:
        """Whether the calling thread is this one."""
        return threading.get_ident() == self._thread.ident

    def submit(self, call: Callable[[], Any]) -> Dispatched:
        """Has the thread make the call, behind all others."""
        self._last = last = Dispatched(call)
        self._thread.calls.put(last)
        return last

    def wait(self) -> None:
        """Returns when all calls are over."""
        if self._last is not None:
            self._last.wait()

    def take_error(self) -> BaseException | None:
        """What the last call raised; told once."""
        last = self._last
        if last is None or last.error is None:
            return None
        self._last = None
        return last.error


_threads: weakref.WeakSet[_Thread] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """A thread that is inside the runtime when the interpreter goes would take the process down with it."""
    for thread in list(_threads):
        thread.calls.put(None)
        thread.join()
