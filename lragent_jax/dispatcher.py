"""A thread of its own for calls that give the device work and may return only when the work is done."""

import atexit
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

_this_thread = threading.local()


def wait_for_nobody() -> None:
    """Says of the calling thread that somebody waits for it who may hold any lock of any engine.

    The collector runs finalizers in whatever thread it likes. In such a one they leave to others what needs an engine.
    """
    _this_thread.waits_for_nobody = True


def may_wait() -> bool:
    """Whether the calling thread may wait for an engine."""
    return not getattr(_this_thread, "waits_for_nobody", False)


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
        call, self._call, under_way = self._call, None, self._under_way
        try:
            self._value = call()
        except BaseException as error:  # it is raised where the result is asked for
            self.error = error
        finally:
            del self  # an error remembers this frame: nothing that holds the error may be in it
            under_way.release()


class _Thread(threading.Thread):
    def __init__(self):
        super().__init__(name="lragent-dispatch", daemon=True)
        self.calls: queue.SimpleQueue[Dispatched | None] = queue.SimpleQueue()

    def run(self) -> None:
        wait_for_nobody()
        while (call := self.calls.get()) is not None:
            call.run()
            del call  # what it returned belongs to others
        while not self.calls.empty():  # given out while the end was
            if (call := self.calls.get()) is not None:
                call.run()


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

    def submit(self, call: Callable[[], Any]) -> Dispatched:
        """Has the thread make the call, behind all others; at the interpreter's end, when it is gone, the caller's."""
        self._last = last = Dispatched(call)
        if self._thread.is_alive():
            self._thread.calls.put(last)
        else:
            last.run()
        return last

    def wait(self) -> None:
        """Returns when all calls are over."""
        if self._last is not None:
            self._last.wait()


_threads: weakref.WeakSet[_Thread] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """A thread that is inside the runtime when the interpreter goes would take the process down with it."""
    for thread in list(_threads):
        thread.calls.put(None)
        thread.join()
