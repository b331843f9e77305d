"""Notices when JAX compiles something: a time that was measured meanwhile means nothing."""

import threading

from jax import monitoring

_STAGES = "/jax/core/compile/"
_EVENT = f"{_STAGES}backend_compile_duration"


class CompileWatch:
    """Counts the programs that are compiled, or fetched from the persistent cache, inside its `with` block.

    `seconds` is what that took, tracing included; of compilations side by side, the sum.
    """

    def __init__(self):
        self.num_programs, self.seconds = 0, 0.0
        self._lock = threading.Lock()

    def __enter__(self) -> "CompileWatch":
        monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *exception) -> None:
        monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        with self._lock:  # programs are compiled in several threads
            self.num_programs += event == _EVENT
            if event.startswith(_STAGES):
                self.seconds += duration_secs
