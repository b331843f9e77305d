"""Plans that rebuild what went, in a model whose values say what they were made of: no arrays, no attention."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lragent_jax.adapter_registry import AdapterKeys
from lragent_jax.chunks import Chunk, plan_chunks
from lragent_jax.page_pool import PagePool
from lragent_jax.page_run import HOLE, PageRun
from lragent_jax.sharing import BASE_MODEL, SHARING_MODES, PageKey, Sharing, SharingMode

P = 2
PLAN, ACTION, REFLECT = AdapterKeys("plan", "a"), AdapterKeys("action", "a"), AdapterKeys("reflect", "b")
ADAPTERS = {None: BASE_MODEL, "plan": PLAN, "action": ACTION, "reflect": REFLECT}


@dataclasses.dataclass(eq=False)
class Reader:
    """What passes under one adapter read and write."""

    adapter: AdapterKeys
    writer_content: str | None
    keys: list[PageKey]
    written: list[PageRun]
    num_required: int

    @property
    def required(self) -> list[PageRun]:
        return self.written[: self.num_required]


class World:
    """One trajectory in one mode. The value of a token is its writer and everything that the writer saw."""

    def __init__(self, mode: SharingMode):
        self.sharing, self.length = Sharing(mode), 0
        self.loaded = [PLAN, ACTION]
        self.runs: dict[PageKey, PageRun] = {}
        self.pools = {name: PagePool(200) for name in ("base", "recomputed", "low_rank")}
        self.device: dict[tuple[PagePool, int, int], int] = {}
        self.truth: dict[tuple[PageKey, int], int] = {}  # what was written first
        self.num_run = 0

    def reader(self, adapter: AdapterKeys) -> Reader:
        rules = self.sharing
        recomputed, own = rules.recomputed_key(adapter), rules.low_rank_key(adapter)
        low_rank = rules.written_low_rank_keys(adapter, self.loaded)
        keys = [rules.base_key(adapter), *([recomputed] if recomputed else []), *low_rank]
        runs = [self.runs.setdefault(key, PageRun(self.pools[key.pool], P)) for key in keys]
        writer = None if rules.writes_without_adapter else adapter.content
        return Reader(adapter, writer, keys, runs, len(keys) - len(low_rank) + (own is not None))

    def read(self, adapter: AdapterKeys) -> None:
        reader = self.reader(adapter)
        writers = {
            content: self.reader(keys) for content, keys in ADAPTERS.items() if keys in (BASE_MODEL, *self.loaded)
        }
        apart = self.sharing.writes_without_adapter and adapter is not BASE_MODEL
        chunks = plan_chunks(self.length, reader, writers.get, (2, 4), read_apart=apart)
        for chunk in chunks:
            for run, start in zip(chunk.runs.written, chunk.write_from, strict=True):
                self._prepare(run, start, chunk.stop)
        for chunk in chunks:
            self._execute(chunk)
        assert not any(run.missing(self.length) for run in reader.required)
        assert chunks[-1].runs is reader
        assert chunks[-1].stop == self.length

    def truncate(self, length: int) -> None:
        self.length = length
        for run in self.runs.values():
            run.truncate(length)
        self.truth = {at: value for at, value in self.truth.items() if at[1] < length}

    def _prepare(self, run: PageRun, start: int, stop: int) -> None:
        taken = run.pages_to_write(start, stop)
        assert not run.prepare(start, stop), "nothing is shared here"
        for index in taken:
            for slot in range(P):
                self.device.pop((run.pool, run.pages[index], slot), None)

    def _execute(self, chunk: Chunk[Reader]) -> None:
        runs = chunk.runs
        key_of = dict(zip(map(id, runs.written), runs.keys, strict=True))
        as_writer = runs.writer_content if chunk.writes else runs.adapter.content
        read = self.reader(BASE_MODEL).required if as_writer is None else runs.required
        for position in range(chunk.start, chunk.stop):
            self.num_run += 1
            new = [run for run, start in zip(runs.written, chunk.write_from, strict=True) if position >= start]
            seen = [self._value(run, q) for q in range(position) for run in read]
            for run in read:
                beside = run.recorded(position, position + 1)
                if run not in new and beside[0].writer != as_writer:
                    seen.append(self._value(run, position))
            for run in new:
                assert not run.holds(position), "a slot is written once"
                value = hash((key_of[id(run)], position, as_writer, tuple(seen)))
                assert self.truth.setdefault((key_of[id(run)], position), value) == value, "rebuilt as something else"
                self.device[run.pool, run.pages[position // P], position % P] = value
        for run, start in zip(runs.written, chunk.write_from, strict=True):
            run.commit(start, chunk.stop, runs.writer_content)

    def _value(self, run: PageRun, position: int) -> int:
        return self.device[run.pool, run.pages[position // P], position % P]


TURN = st.tuples(
    st.integers(1, 5),  # tokens that come
    st.sampled_from([None, "plan", "action", "reflect"]),  # who reads them
    st.one_of(st.none(), st.just("all"), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=8)),
    st.integers(0, 3),  # tokens that are taken back
)


@pytest.mark.parametrize("mode", SHARING_MODES)
@settings(max_examples=60)
@given(st.lists(TURN, min_size=3, max_size=8), st.integers(0, 4), st.sampled_from(list(ADAPTERS)))
def test_what_went_is_made_of_the_same_again(mode, turns, loaded_late, last):
    """Beside a trajectory that lost nothing: equal records, so that what comes next has equal writers, too."""
    small, large = World(mode), World(mode)
    for i, (num_tokens, name, gone, num_back) in enumerate([*turns, (1, last, None, 0)]):
        for world in (small, large):
            if i == loaded_late:
                world.loaded.append(REFLECT)
            world.length += num_tokens
            world.read(ADAPTERS[name if name != "reflect" or i >= loaded_late else "plan"])
            world.truncate(max(world.length - num_back, 1))
        runs = list(small.runs.values())
        for which, index in [(i, j) for i in range(len(runs)) for j in range(40)] if gone == "all" else gone or ():
            run = runs[which % len(runs)]
            if run.page(index) != HOLE:
                run.give_up([index])
        recorded = [{key: run.spans for key, run in world.runs.items()} for world in (small, large)]
        assert recorded[0] == recorded[1]
        assert small.truth == large.truth
