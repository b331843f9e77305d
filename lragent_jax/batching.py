"""Continuous batching: all requests of an engine run together, join at any time and leave when they are done."""

import bisect
import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import numpy as np

from lragent_jax.adapter_registry import AdapterRegistry
from lragent_jax.awaited_pages import pages_needed_next, pages_written
from lragent_jax.device_work import DeviceWork, InFlight
from lragent_jax.dispatcher import may_wait
from lragent_jax.drivers import Drivers
from lragent_jax.executor import Executor, Row
from lragent_jax.fair_lock import FairLock
from lragent_jax.held_pages import add_pages, held_pages
from lragent_jax.metrics import EngineMetrics, Metrics
from lragent_jax.models.errors import AdapterError, EngineBusyError, OutOfPagesError, TrajectoryBusyError
from lragent_jax.paged_cache import Claim
from lragent_jax.request import Request
from lragent_jax.scheduler import Limits, Pages, RunningRequest, WaitingRequest, plan_step
from lragent_jax.sharing import PoolName
from lragent_jax.trajectory import LiveTrajectories

_UNKNOWN = -1
"""No number of losses: whatever it is, it is another one."""


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A waiting request's row, what its admission would claim, and for how many tokens."""

    row: Row
    claims: list[Claim]
    num_tokens: int


class Batcher:
    """The requests of one engine, and the steps that serve them.

    Whoever waits for a request drives: one thread at a time takes a step, which serves everybody, and the others sleep
    until it is done. A step gives the device its next work before it reads the results of the step before; `DeviceWork`
    says why, and when what is read.

    Everything with pages happens inside `exclusive`; `submit`, `defer` and `wake` may be called from anywhere.
    """

    def __init__(
        self,
        executor: Executor,
        registry: AdapterRegistry,
        trajectories: LiveTrajectories,
        limits: Limits,
        *,
        reserved_tokens: int,
        eos_token_ids: Sequence[int],
        scope: Callable[[], contextlib.AbstractContextManager],
    ):
        self._executor, self._registry, self._cache = executor, registry, executor.cache
        self._trajectories, self._limits, self._scope = trajectories, limits, scope
        # At least what the first step decodes, which is planned together with the admission.
        self._reserved_tokens = max(reserved_tokens, limits.decode_block)
        self._work = DeviceWork(executor, eos_token_ids, scope)
        self.metrics = Metrics()
        self._ids = itertools.count()
        self._arrivals: collections.deque[Request] = collections.deque()
        self._deferred: collections.deque[Callable[[], None]] = collections.deque()
        self._waiting: list[Request] = []  # by id
        self._running: dict[int, Request] = {}
        self._free_slots = list(range(limits.batch_size - 1, -1, -1))
        self._num_losses = self._cache.num_losses
        self._stuck = False  # whether nobody can be admitted before something has changed
        # Lies around the cache's lock, whose holder waits for nobody: a finalizer may want that in any thread.
        self._section = FairLock()
        self._drivers = Drivers()

    # Whoever calls.

    def submit(self, requests: Iterable[Request]) -> None:
        """From now on the requests take part; somebody has to drive until they are done."""
        self._arrivals.extend(requests)
        self.wake()

    def refuse_inside(self) -> None:
        """Raises `EngineBusyError` inside `exclusive`: a caller that has the engine would wait for itself."""
        if self._is_inside:
            raise EngineBusyError(
                "this thread is inside another call of the engine (a progress callback of warmup, or a finalizer): "
                "generate when that call is over"
            )

    @property
    def has_work(self) -> bool:
        return bool(self._arrivals or self._waiting or self._running or self._work.has_results or self._deferred)

    def drive(self, done: Callable[[], bool]) -> None:
        """Steps for everybody, in turns with other threads that do so, until `done`; asked after every step."""
        self._drivers.drive(done, lambda: self.has_work, self._step_alone)

    def wake(self) -> None:
        """Lets every driver look again."""
        self._drivers.wake()

    def _step_alone(self) -> None:
        # Not `exclusive`: its end is written in Python, and Ctrl-C at the beginning of that would leave its locks taken
        # for as long as somebody keeps the exception.
        with self._section:
            self._work.dispatcher.wait()
            with self._cache.lock, self._scope():
                self._clean_up()
                self._step_or_restart()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Pages and device to oneself; before that, what was left to do is done."""
        if self._is_inside:
            with self._cache.lock, self._scope():
                yield
            return
        with self._section:
            self._work.dispatcher.wait()  # in front of the cache's lock, which a finalizer in its thread may want
            with self._cache.lock, self._scope():
                self._clean_up()
                yield

    @property
    def _is_inside(self) -> bool:
        """Whether this thread may not wait: the collector runs somebody's finalizer in the middle of another call."""
        return self._cache.lock.is_mine or not may_wait()

    def defer(self, action: Callable[[], None]) -> None:
        """Has something done in the next exclusive section, whoever enters it."""
        self._deferred.append(action)
        self.wake()

    def finish(self, action: Callable[[], None]) -> None:
        """Does something exclusively, at once if it can be.

        The collector may close a forgotten stream in the middle of a step of the same thread. Then that step goes on
        undisturbed and the next one begins with it.
        """
        self.defer(action)  # first: whoever is interrupted while it waits leaves it to others
        if not self._is_inside:
            with self.exclusive():
                pass

    def _clean_up(self) -> None:
        """What earlier calls left behind."""
        while self._deferred:
            try:
                self._deferred[0]()
            except Exception:
                self._deferred.popleft()
                raise
            self._deferred.popleft()  # not before: one that was interrupted is done again
        self._trajectories.release_abandoned()
        if self._cache.recover():  # token ids and writers survive: it is rebuilt as it was when it is read next
            self._executor.forget_slots()
            for trajectory in self._trajectories:
                trajectory.pages_lost()
        if self._cache.num_losses != self._num_losses:
            failure = self._work.failure()  # of which `_restart` forgets
            self._num_losses = self._cache.num_losses
            self._restart()
            self._tell(failure)

    def snapshot(self) -> EngineMetrics:
        """Called inside `exclusive`."""
        num_waiting = len(self._waiting) + len(self._arrivals)
        return self.metrics.snapshot(self._running.values(), num_waiting, self._cache.stats())

    # Ends, inside `exclusive`.

    def cancel(self, request: Request, num_kept: int = 0) -> None:
        """Ends a request, whatever its state: its first `num_kept` tokens join, and its pages beyond them go."""
        request.generated.interrupt(num_kept)
        self._leave(request, ends=True)
        # Whether the request was done, or preempted and begun again, nobody could know: what it has run of its last
        # token, and of those that go, is not on record.
        request.trajectory.unwrite(request.start_length + request.generated.num_run)
        if not request.done:
            self.metrics.num_cancelled += 1
            request.state = "cancelled"

    def _fail(self, request: Request, error: BaseException) -> None:
        self.metrics.num_failed += 1
        request.generated.discard()
        self._leave(request, ends=True)
        request.state, request.error = "failed", error
        request.notify()

    def _leave(self, request: Request, *, ends: bool) -> None:
        """Lets a request's tokens join, and forgets what the device wrote, or is about to write, beyond them.

        Whoever has its pages and its slot next uses them behind that: the device works in order. If it `ends` here, its
        state says so afterwards and not before: whoever sees that has the trajectory.
        """
        trajectory, generated = request.trajectory, request.generated
        length, num_tokens = len(trajectory), len(generated.token_ids)
        if request.num_joined > num_tokens:
            trajectory.truncate(request.start_length + num_tokens)
        trajectory.join(generated.token_ids[request.num_joined :])
        if request.row is not None:
            request.row.commit(length, max(length, request.start_length + generated.num_run))
            request.row.release_unused()
            self._executor.share([request.row])
            assert request.slot is not None
            self._free_slots.append(request.slot)
            trajectory.let_go()
            request.row = request.slot = None
        self._running.pop(request.id, None)
        if ends and request in self._waiting:
            self._waiting.remove(request)
        if ends and request.is_private:
            trajectory.drop(lambda key: False)
        self._stuck = False

    def _restart(self) -> None:
        """Something went wrong on the device: everybody goes on from the tokens that are here."""
        self._work.forget()
        for request in list(self._running.values()):
            self._suspend(request)
        self._free_slots = list(range(self._limits.batch_size - 1, -1, -1))  # an interrupt may have lost one

    def _suspend(self, request: Request) -> None:
        """Takes a request out of the batch; it waits to go on, ahead of whoever came after it."""
        generated = request.generated
        generated.interrupt(len(generated.token_ids))
        request.state = "preempted"
        if request not in self._waiting:  # first: one that is interrupted here is in both lists, not in none
            bisect.insort(self._waiting, request, key=lambda other: other.id)
        self._leave(request, ends=False)

    def pause(self, *, without: str) -> None:
        """Takes everybody out of the batch, to go on in the next step; `TrajectoryBusyError` if agent `without` runs.

        Called inside `exclusive`, as is `make_room`.
        """
        undone = [request for request in (*self._arrivals, *self._waiting, *self._running.values()) if not request.done]
        if any(request.agent == without for request in undone):
            raise TrajectoryBusyError(f"a call of agent {without!r} is not done: wait for it, or end it")
        self._restart()

    def make_room(self) -> bool:
        """Preempts who came last, for a call that runs beside the batch; False if there is nobody."""
        if self._running:
            self._preempt(self._running[max(self._running)])
            return True
        return False

    def _preempt(self, request: Request) -> None:
        """Takes a request's pages for others."""
        self._suspend(request)
        request.trajectory.preempt()
        self.metrics.num_preempted += 1

    # A step.

    def _step_or_restart(self) -> None:
        if (failure := self._work.failure()) is not None:
            self._begin_anew()
            self._tell(failure)
            return
        try:
            self._step()
        except BaseException:  # Ctrl-C included: whoever drove has the error, the others their requests
            self._begin_anew()
            raise

    def _tell(self, failure: tuple[BaseException, InFlight] | None) -> None:
        """One of those whom it hit is told, the first; the others try again, and if it happens again one less does."""
        if failure is not None:
            error, block = failure
            told = next((request for request, _, _ in block.rows if not request.done), None)
            if told is not None:
                self._fail(told, error)

    def _begin_anew(self) -> None:
        """After an error: arrays are looked at in the next section, which does this again if it is interrupted."""
        self._cache.is_doubtful, self._num_losses = True, _UNKNOWN
        self._restart()

    def _step(self) -> None:
        while self._arrivals:
            request = self._arrivals[0]
            if request.id < 0:
                request.id = next(self._ids)
            if not request.done and request not in self._waiting[-1:]:  # nor cancelled already, nor interrupted here
                self._waiting.append(request)
            self._arrivals.popleft()
            self._stuck = False
        opened: dict[int, _Opened] = {}
        running = [self._description(request) for request in self._running.values()]
        is_full = self._stuck or len(running) >= self._limits.batch_size or not self._waiting
        tight = not is_full or any(count for request in running for count in request.growth.values())
        try:
            held = held_pages(self._running.values(), self._cache.pools) if tight else {}
            free: Pages = {name: self._cache.pools[name].num_pages - len(pages) for name, pages in held.items()}
            written = frozenset[Hashable]().union(*(request.writes for request in running if request.chunks))
            candidates = () if is_full else self._candidates(opened, held, written)
            plan = plan_step(candidates, running, free, self._limits)
            # Those who have to wait hold nothing, or what was counted on could not be had.
            for id in opened.keys() - set(plan.admitted):
                self._close(opened.pop(id))
            for id in plan.preempted:
                self._preempt(self._running[id])
            # Those who run come first here, too, or who is admitted would take what they need, again and again.
            for id in plan.decoded:
                if id in self._running:
                    self._grow(self._running[id], plan.num_steps, opened)
            for id in plan.admitted:
                if id in opened:
                    self._admit(self._by_id(id), opened)
        finally:
            for left in opened.values():
                self._close(left)
        self._stuck = self._stuck or (not is_full and not plan.admitted and bool(self._running))
        for ids in plan.prefill:
            self._prefill([self._running[id] for id in ids if id in self._running])
        if decoded := [self._running[id] for id in plan.decoded if id in self._running]:
            self._work.decode(decoded, plan.num_steps, len(self._running))
        self.metrics.count_step(len(plan.decoded))
        for result in self._work.results():
            self._hand_out(result)
        if not self._running:
            self._work.shrink()

    def _by_id(self, id: int) -> Request:
        return self._waiting[bisect.bisect_left(self._waiting, id, key=lambda request: request.id)]

    def _description(self, request: Request) -> RunningRequest:
        row = request.row
        assert row is not None
        chunks = row.chunks[request.next_chunk :]
        next_length = self._length_after(request, min(self._limits.decode_block, request.max_steps))
        growth: Pages = {}
        shares = self._executor.prefix_cache and chunks and self._waiting
        if not chunks and request.steps_left and next_length > request.num_reserved:
            growth = self._cache.pages_needed(self._growth(request, next_length))
        return RunningRequest(
            id=request.id,
            chunks=tuple(map(self._executor.padded_length, chunks)),
            steps_left=request.steps_left,
            max_steps=request.max_steps,
            growth=growth,
            to_come=row.num_new_pages(request.num_reserved, request.longest),
            writes=pages_written(request, row) if shares else frozenset(),
        )

    def _length_after(self, request: Request, num_steps: int) -> int:
        """Tokens in the cache after so many more steps, at most."""
        return min(request.longest, request.start_length + request.num_dispatched - 1 + num_steps)

    def _growth(self, request: Request, length: int) -> list[Claim]:
        """Claims for pages up to `length`, and some more, so that this is seldom done."""
        assert request.row is not None
        stop = min(request.longest, max(length, request.num_reserved + self._reserved_tokens))
        return [Claim(run, request.num_reserved, stop) for run in request.row.written]

    # Admission.

    def _candidates(
        self, opened: dict[int, _Opened], held: dict[PoolName, set[int]], written: frozenset[Hashable]
    ) -> Iterator[WaitingRequest]:
        """The first waiting requests, opened one after the other as the plan asks for them; `held` grows with them.

        Not opened again is who is known to wait for pages that are still being `written`.
        """
        shares = self._executor.prefix_cache
        for request in self._waiting[: 2 * self._limits.batch_size]:
            if request.awaits & written:
                continue
            try:
                opened[request.id] = row = self._open(request)
            except AdapterError as error:  # unloaded while it waited
                self._fail(request, error)
                continue
            request.awaits = pages_needed_next(request, row.row) if shares else frozenset()
            pages = self._cache.pages_needed(row.claims)
            for pool, count in add_pages(row.row, held).items():
                pages[pool] += count
            yield WaitingRequest(
                id=request.id,
                pages=pages,
                chunks=tuple(map(self._executor.padded_length, row.row.chunks)),
                steps_left=request.steps_left,
                max_steps=request.max_steps,
                needs=request.awaits,
                writes=pages_written(request, row.row) if shares else frozenset(),
            )

    def _open(self, request: Request) -> _Opened:
        row = self._executor.open_row(request.trajectory, self._registry.find(request.agent))
        # Whoever is alone has all it may need from the start, and no reason to fail on the way.
        num_tokens = request.longest - len(request.trajectory)
        if self._running or self._waiting[0] is not request:
            num_tokens = min(num_tokens, self._reserved_tokens)
        return _Opened(row, self._executor.plan(row, num_tokens), num_tokens)

    def _close(self, opened: _Opened) -> None:
        opened.row.give_up_reused()
        opened.row.trajectory.let_go()

    def _admit(self, request: Request, opened: dict[int, _Opened]) -> None:
        entry = opened[request.id]
        self._cache.note_calls([entry.row.required_keys])
        try:
            self._cache.reserve(entry.claims)
        except OutOfPagesError as error:
            self._stuck = True
            for id in (later := opened.keys() - {request.id}):  # they keep pages that this one can have
                self._close(opened.pop(id))
            if later:
                self._admit(request, opened)
            elif not self._running:
                del opened[request.id]
                self._close(entry)
                self._fail(request, error)
            return
        del opened[request.id]
        entry.row.visit()
        self._running[request.id] = request
        self._waiting.remove(request)
        request.row, request.slot = entry.row, self._free_slots.pop()
        request.state, request.next_chunk = "prefilling", 0
        request.num_reserved = len(request.trajectory) + entry.num_tokens
        request.num_dispatched = len(request.generated.token_ids)
        request.num_admissions += 1
        self.metrics.count_admission(request, entry.row)

    # Work for the device.

    def _prefill(self, requests: list[Request]) -> None:
        """Runs the next chunk of each."""
        if not requests:
            return
        rows = [request.row for request in requests if request.row is not None]
        for request, row in zip(requests, rows, strict=True):
            self.metrics.count_prefill(request, row.chunks[request.next_chunk].num_tokens)
        ended = self._work.prefill(requests)
        if self._waiting or ended:
            self._executor.share(rows)
            self._stuck = False

    def _grow(self, request: Request, num_steps: int, opened: dict[int, _Opened]) -> None:
        """Gets a row pages for its next tokens if it has none.

        Nobody is admitted, and who came last is preempted, until they can be had.
        """
        length = self._length_after(request, num_steps)
        while request.row is not None and request.num_reserved < length:
            claims = self._growth(request, length)
            try:
                self._cache.reserve(claims)
                request.num_reserved = claims[0].stop
            except OutOfPagesError as error:
                if opened:
                    while opened:
                        self._close(opened.popitem()[1])
                elif len(self._running) == 1:
                    self._fail(request, error)
                else:
                    self._preempt(self._running[max(self._running)])

    # Results.

    def _hand_out(self, result: InFlight) -> None:
        """Gives the tokens to those who still want them: whoever left or was preempted meanwhile does not."""
        tokens = result.read()
        now = time.perf_counter()
        for request, row, b in result.rows:
            if request.row is not row:
                continue
            new = np.atleast_1d(tokens[b])
            new = new[new >= 0]
            if not len(new):
                continue
            for token in new:
                request.generated.push(int(token))
            self.metrics.count_tokens(request, len(new), now)
            if request.generated.finish_reason is None:
                request.take_pieces()
            else:
                self._leave(request, ends=True)
                self.metrics.num_finished += 1
                request.state = "finished"  # before the last piece: whoever has taken that has the trajectory
                request.take_pieces(ends=True)
            request.notify()
