"""An append-only context that every agent reads."""

import collections
import contextlib
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np

from lragent_jax.models.errors import InputError, TrajectoryBusyError, TrajectoryClosedError
from lragent_jax.page_run import HOLE, PageRun, Span
from lragent_jax.paged_cache import PagedCache
from lragent_jax.prefix_tree import Path, Reused
from lragent_jax.sharing import PageKey

Encode = Callable[[str, bool], list[int]]
"""(text, whether it opens a context) to token ids."""


class LiveTrajectories:
    """An engine's trajectories while somebody holds them, and the page runs of those dropped without `close`."""

    # Without a lock: the collector may end another call in the middle of these, and that one waits for the engine's,
    # whose holder may be here. Every step on the dictionary is a single one of the interpreter's.

    def __init__(self):
        self._live: dict[int, weakref.ref[Trajectory]] = {}
        self._abandoned: collections.deque[dict[PageKey, PageRun]] = collections.deque()

    def __iter__(self) -> Iterator["Trajectory"]:
        found = (reference() for reference in list(self._live.values()))
        return iter([trajectory for trajectory in found if trajectory is not None])

    def add(self, trajectory: "Trajectory", runs: dict[PageKey, PageRun]) -> weakref.finalize:
        self._live[id(trajectory)] = weakref.ref(trajectory)
        return weakref.finalize(trajectory, self._abandon, id(trajectory), runs)

    def discard(self, trajectory: "Trajectory") -> None:
        self._live.pop(id(trajectory), None)

    def _abandon(self, key: int, runs: dict[PageKey, PageRun]) -> None:
        # The collector may run in the middle of an allocation: pages are only put aside here.
        self._live.pop(key, None)
        self._abandoned.append(runs)

    def release_abandoned(self) -> bool:
        """Returns the pages of whoever was dropped since the last time; whether there was anybody."""
        found = bool(self._abandoned)
        while self._abandoned:
            for run in self._abandoned.popleft().values():
                run.truncate(0)
        return found


class Trajectory:
    """Token ids, and the pages that hold them under each key. Made by `Engine.trajectory`.

    Ids, not text, are the truth: a piece of text is tokenised on its own when it is appended, with BOS on the first
    piece alone. One call at a time may extend a trajectory; agents that run side by side take forks.
    """

    def __init__(
        self,
        cache: PagedCache,
        encode: Encode,
        vocab_size: int,
        context_length: int,
        live: LiveTrajectories,
    ):
        self._cache, self._encode = cache, encode
        self._vocab_size, self._context_length = vocab_size, context_length
        self._ids: list[int] = []
        self._runs: dict[PageKey, PageRun] = {}
        self._path = Path()
        self._reading: set[PageKey] = set()
        self.visits, self.last_used = 1, cache.prefixes.clock()
        self._extending = threading.Lock()
        self._closed = False
        self._live = live
        self._finalizer = live.add(self, self._runs)

    @property
    def token_ids(self) -> list[int]:
        """All token ids, a copy."""
        return list(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self._cache.page_size

    @property
    def writers(self) -> list[Span]:
        """Who ran which tokens of the base cache, where it is shared; those whose pages went are rebuilt like that.

        See `PageRun.spans`.
        """
        run = self._runs.get(PageKey("base", None))
        return [] if run is None else list(run.spans)

    def append(self, piece: str | Sequence[int] | np.ndarray) -> "Trajectory":
        """Adds text or token ids to the end; nothing runs until an agent reads it. Returns itself."""
        with self.extending():
            self._ids += self.checked_ids(piece)
        return self

    def checked_ids(self, piece: str | Sequence[int] | np.ndarray) -> list[int]:
        """The ids that `piece` would add, or `InputError` if they cannot be added."""
        ids = token_ids(self._encode(piece, not self._ids) if isinstance(piece, str) else piece, self._vocab_size)
        if len(self._ids) + len(ids) > self._context_length:
            if not self._ids:
                raise InputError(f"{len(ids)} tokens do not fit the model's context of {self._context_length}")
            raise InputError(
                f"{len(self._ids)} tokens and {len(ids)} more do not fit the model's context of "
                f"{self._context_length}; start a new trajectory or roll this one back"
            )
        return ids

    def fork(self) -> "Trajectory":
        """A second trajectory with the same tokens and pages; the first write to a shared page copies it."""
        with self.extending():
            other = Trajectory(self._cache, self._encode, self._vocab_size, self._context_length, self._live)
            other._ids, other._path = list(self._ids), Path(self._path)
            with self._cache.lock:
                other._runs.update({key: run.fork() for key, run in self._runs.items()})
            return other

    def rollback(self, num_tokens: int) -> "Trajectory":
        """Takes the last `num_tokens` tokens off, and their pages. Returns itself."""
        with self.extending():
            if not isinstance(num_tokens, int | np.integer) or not 0 <= num_tokens <= len(self._ids):
                raise InputError(f"cannot roll back {num_tokens} tokens of a trajectory of {len(self._ids)}")
            self.truncate(len(self._ids) - num_tokens)
        return self

    def close(self) -> None:
        """Returns the pages. A closed trajectory cannot be read or extended; closing twice is allowed."""
        if self._closed:
            return
        with self.extending():
            self._closed = True
            with self._cache.lock:  # not in the middle of a step, which could not have pages that nobody holds
                self._live.discard(self)
                self._finalizer.detach()
                self.drop(lambda key: False)

    def __enter__(self) -> "Trajectory":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    # What follows is the engine's side.

    @contextlib.contextmanager
    def extending(self) -> Iterator[None]:
        """Holds the trajectory for one call; raises `TrajectoryBusyError` if another call has it."""
        if self._closed:
            raise TrajectoryClosedError("this trajectory was closed; its pages are gone")
        if not self._extending.acquire(blocking=False):
            raise TrajectoryBusyError("another call is extending this trajectory; give each caller a fork()")
        try:
            yield
        finally:
            self._reading = set()
            self._extending.release()

    def is_in(self, cache: PagedCache) -> bool:
        """Whether its pages are those of `cache`."""
        return self._cache is cache

    def run(self, key: PageKey) -> PageRun:
        """The pages under `key`, an empty run at first."""
        if key not in self._runs:
            self._runs[key] = self._cache.new_run(key)
        return self._runs[key]

    @property
    def reading(self) -> Collection[PageKey]:
        """The keys that a call has open at the moment; eviction leaves their pages alone."""
        return self._reading

    @property
    def idle_runs(self) -> Mapping[PageKey, PageRun]:
        """The runs whose pages may go when others need them."""
        return {key: run for key, run in self._runs.items() if key not in self._reading}

    def open(self, runs: Mapping[PageKey, PageRun], beside: bool) -> list[Reused]:
        """Gives its runs what others have written of its beginning, and keeps their pages until the call ends.

        `beside`: whether what is written under one key may rest on others. See `PrefixTree.reuse`.
        """
        self._reading = {*self._reading, *runs}
        return self._cache.prefixes.reuse(self._path, self._ids, runs, self.run if beside else None)

    def visit(self, runs: Mapping[PageKey, PageRun]) -> None:
        """A call that reads these runs has begun; who waits for its turn does not count."""
        self.visits, self.last_used = self.visits + 1, self._cache.prefixes.clock()
        self._cache.prefixes.visit(self._path, runs)

    def share(self) -> None:
        """Lets others have the full pages of its runs; see `PrefixTree.insert`."""
        self._cache.prefixes.insert(self._path, self._ids, self._runs)

    def preempt(self) -> None:
        """Lets all pages go, those of a running call too: it has to open the trajectory again before it goes on.

        Who wrote what stays on record, and is rebuilt like that; only pages that nobody could write again stay here.
        """
        with self._cache.lock:
            self._reading = set()
            for run in self._runs.values():
                run.truncate(len(self._ids))
                run.give_up([i for i, page in enumerate(run.pages) if page != HOLE and run.can_rebuild(i)])

    def let_go(self) -> None:
        """The call that holds it does not read it for now: eviction may have its pages."""
        self._reading = set()

    def pages_lost(self) -> None:
        """The arrays are gone, and with them what is on every page."""
        with self._cache.lock:
            self._reading = set()
            for run in self._runs.values():
                run.give_up([i for i, page in enumerate(run.pages) if page != HOLE])

    def writer_unloaded(self, writer: str) -> None:
        """From now on nobody can write again what `writer` wrote; see `Span.rebuildable`."""
        with self._cache.lock:
            for run in self._runs.values():
                run.writer_unloaded(writer)

    def release_unused(self) -> None:
        """Returns pages that were reserved and not needed."""
        with self._cache.lock:
            for run in self._runs.values():
                run.truncate(len(self._ids))

    def ids_between(self, start: int, stop: int) -> list[int]:
        return self._ids[start:stop]

    def join(self, ids: Sequence[int]) -> None:
        """Adds ids that were checked before or came from the model."""
        self._ids += ids

    def truncate(self, length: int) -> None:
        """Keeps the first `length` tokens and releases every page that holds none of them."""
        del self._ids[length:]
        self.unwrite(length)

    def unwrite(self, length: int) -> None:
        """Forgets who has written tokens from `length` on: whoever reads them next does."""
        del self._path[length // self._cache.page_size :]
        with self._cache.lock:
            for run in self._runs.values():
                run.truncate(length)

    def drop(self, keys_in_use: Callable[[PageKey], bool]) -> None:
        """Releases the pages of every key that is out of use."""
        with self._cache.lock:
            for key in [key for key in self._runs if not keys_in_use(key)]:
                self._runs.pop(key).truncate(0)
                self._path.known = None


def token_ids(piece: Sequence[int] | np.ndarray, vocab_size: int) -> list[int]:
    """Checks token ids from outside: integers of [0, vocab_size), in one dimension."""
    try:
        array = np.asarray(piece)
    except ValueError as error:
        raise InputError(f"token ids must be a flat sequence of integers: {error}") from error
    if array.size == 0:
        return []
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"token ids must be a flat sequence of integers, not {array.dtype} of shape {array.shape}")
    outside = array[(array < 0) | (array >= vocab_size)]
    if outside.size:
        raise InputError(f"token id {outside[0]} is outside the vocabulary of {vocab_size}")
    return [int(i) for i in array]
