"""Notices when JAX compiles something: a time that was measured meanwhile means nothing."""

from jax import monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileWatch:
    """Counts the programs that are compiled, or fetched from the persistent cache, inside its `with` block."""

    def __init__(self):
        self.num_programs = 0

    def __enter__(self) -> "CompileWatch":
        monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *exception) -> None:
        monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.num_programs += event == _EVENT
