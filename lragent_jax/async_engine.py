"""The engine for servers: requests come and go on an event loop, a thread of its own drives them."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from lragent_jax.call_arguments import Prompt, one_params
from lragent_jax.calls import Call
from lragent_jax.engine import Engine
from lragent_jax.models.errors import LRAgentError
from lragent_jax.outputs import GenerationOutput, StreamPiece
from lragent_jax.request import Request
from lragent_jax.sampling_params import SamplingParams

_SECONDS_AFTER_ERROR = 0.01


@dataclasses.dataclass(eq=False)
class _Pending:
    """A call that a task waits for. `error`: what the thread met, or that the engine was closed, which ended it.

    `gone`: done when the call was abandoned, if it is; whoever finds it waits for it, on whatever loop.
    """

    call: Call
    loop: asyncio.AbstractEventLoop
    news: asyncio.Event
    error: BaseException | None = None
    gone: concurrent.futures.Future[None] | None = None

    @property
    def request(self) -> Request:
        return self.call.requests[0]

    def fail(self, error: BaseException) -> None:
        self.error = self.error or error
        _tell(self.loop, self.news)

    def check(self) -> None:
        self.call.check()
        if self.error is not None and self.request.state != "finished":  # that of others is none of its business
            raise self.error


class AsyncEngine:
    """`stream` and `generate` of an `Engine` for tasks, any number of them at a time; all share its batches.

    The engine stays usable as it is, from other threads, too. Use it as `async with AsyncEngine(engine) as server:`;
    closing it fails what is still under way.

    A task that is cancelled, and a loop over `stream` that is left, cancel their request: its pages are free a moment
    later, and of a stream what its reader was given stays in the trajectory.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._batcher = engine.batcher
        self._pending: set[_Pending] = set()
        self._closing = self._closed = False
        self._thread = threading.Thread(target=self._serve, name="lragent-engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> "AsyncEngine":
        return self

    async def __aexit__(self, *exception) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Fails what is under way with `LRAgentError` and ends the thread; closing twice is allowed.

        What a reader of a stream was given stays in the trajectory, whether or not it ever comes back for more.
        """
        self._closing = True
        ended: set[_Pending] = set()
        while left := self._pending - ended:
            ended.add(pending := left.pop())
            if pending.request.state == "finished":
                pending.call.end()
            else:
                pending.fail(LRAgentError("the engine was closed before this request was done"))
                await self._abandon(pending, keep_taken=True)
        self._closed = True
        self._batcher.wake()
        await asyncio.to_thread(self._thread.join)

    async def generate(
        self, prompt: Prompt, agent: str | None = None, params: SamplingParams | None = None, **sampling: Any
    ) -> GenerationOutput:
        """`Engine.generate` for one prompt; gather several to have them run together."""
        async with self._call(prompt, agent, one_params(params, sampling), streams=False) as pending:
            await self._wait(pending, lambda: pending.call.is_over)
            return pending.request.output()

    async def stream(
        self, prompt: Prompt, agent: str | None = None, params: SamplingParams | None = None, **sampling: Any
    ) -> AsyncIterator[StreamPiece]:
        """`Engine.stream`: the pieces as they come, the last one with the output. All is checked at the first one."""
        async with self._call(prompt, agent, one_params(params, sampling), streams=True) as pending:
            pieces = pending.request.pieces
            assert pieces is not None
            piece = StreamPiece("", [])
            while piece.output is None:
                if piece.text or piece.token_ids:
                    yield piece
                await self._wait(pending, lambda: bool(pieces))
                piece = pieces.popleft()
        yield piece

    async def _wait(self, pending: _Pending, done: Callable[[], bool]) -> None:
        while not done():
            pending.check()
            await pending.news.wait()
            pending.news.clear()
        pending.check()

    @contextlib.asynccontextmanager
    async def _call(
        self, prompt: Prompt, agent: str | None, params: SamplingParams, streams: bool
    ) -> AsyncIterator[_Pending]:
        if self._closing:
            raise LRAgentError("this engine was closed")
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        call = self.engine.caller.open(
            [prompt], [agent], [params], streams=streams, listener=functools.partial(_tell, loop, news)
        )
        pending = _Pending(call, loop, news)
        self._pending.add(pending)
        was_left = False
        try:
            yield pending
        except (GeneratorExit, asyncio.CancelledError):
            was_left = True
            raise
        finally:
            try:
                if pending.gone is None and pending.request.state == "finished" and not was_left:
                    call.end()
                elif pending.gone is not None or not call.was_ended:
                    await self._abandon(pending, keep_taken=was_left or self._closing)
            finally:
                self._pending.discard(pending)

    async def _abandon(self, pending: _Pending, keep_taken: bool) -> None:
        """Ends a call between two steps, once, and waits for that: the trajectory is its owner's again behind it."""
        if pending.gone is None:
            pending.gone = gone = concurrent.futures.Future()
            gone.set_running_or_notify_cancel()  # a task that waits for it may be cancelled, it may not

            def abandon() -> None:
                try:
                    pending.call.abandon(keep_taken)
                finally:
                    if not gone.done():  # what was interrupted is done again
                        gone.set_result(None)

            self._batcher.defer(abandon)
        if not pending.gone.done():
            await asyncio.wrap_future(pending.gone)

    def _serve(self) -> None:
        """The thread: takes its turns with whoever else drives."""
        while not self._closed:
            try:
                self._batcher.drive(lambda: self._closed)
            except Exception as error:  # whatever it is, it belongs to those who wait, and the thread goes on
                for pending in list(self._pending):
                    pending.fail(error)
                time.sleep(_SECONDS_AFTER_ERROR)


def _tell(loop: asyncio.AbstractEventLoop, news: asyncio.Event) -> None:
    """Sets an event from any thread; a loop that has ended does not care any more."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(news.set)
