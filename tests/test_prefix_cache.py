"""Contexts that begin alike: what is read once, who wrote it, and that writers alone decide an answer."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from dense_oracle import Context, DenseOracle, host_params
from engines import CONFIG, agents, tiny_engine, weights
from tolerances import assert_close

from lragent_jax.engine import Engine
from lragent_jax.models.adapter import random_adapter
from lragent_jax.models.errors import InputError, OutOfPagesError
from lragent_jax.sharing import SHARING_MODES, PageKey
from lragent_jax.trajectory import Trajectory

GROUPS = {"plan": "a", "action": "a", "reflect": "b"}
QUESTION = [(7 * i + 3) % 128 for i in range(37)]  # four full pages of 8 and a piece
REST = [90, 5, 44, 17, 61]
POOLS = ("base", "low_rank", "recomputed")


def warm_engine(mode: str, adapters=None, **options) -> Engine:
    return tiny_engine(mode, adapters, prefix_cache=True, **options)


def read(engine: Engine, ids: list[int], agent: str | None) -> tuple[np.ndarray, int, int]:
    """Logits behind a context that is closed again, and how many tokens were prefilled and cached."""
    with engine.trajectory() as trajectory:
        out = engine.score_output(trajectory.append(ids), [1], agent)
    return out.logits[0], out.num_prefilled_tokens, out.num_cached_tokens


def pages(engine: Engine) -> dict[str, tuple[int, int]]:
    """(used, cached) of every pool."""
    stats = engine.cache_stats()
    return {name: (getattr(stats, name).pages_used, getattr(stats, name).pages_cached) for name in POOLS}


@pytest.mark.parametrize("mode", SHARING_MODES)
def test_a_beginning_that_was_read_is_read_from_the_cache(mode):
    """Whoever goes on behind it gets what a trajectory that holds the first one's pages gives."""
    engine, cold = warm_engine(mode), tiny_engine(mode)
    extra = mode == "rebase"  # the last token again, as a query
    assert read(engine, QUESTION, "plan")[1:] == (37 + extra, 0)
    assert all(used == 0 for used, _ in pages(engine).values())
    for agent in ("plan", "reflect"):
        with cold.trajectory() as holder:
            cold.next_token_logits(holder.append(QUESTION), "plan")
            want = cold.score_output(holder.rollback(5).append(REST), [1], agent)
        logits, *counts = read(engine, QUESTION[:32] + REST, agent)
        assert counts == [want.num_prefilled_tokens, want.num_cached_tokens]
        assert_close(logits, want.logits[0], "equal")
        if agent == "plan":
            assert counts == [5 + extra, 32]
        if mode == "none":
            assert_close(logits, read(cold, QUESTION[:32] + REST, agent)[0], "equal")
    assert read(engine, [*QUESTION[:31], 99, *REST], "plan")[2] == 24, "one other token on the fourth page"


def test_generated_tokens_are_reused_and_a_prompt_needs_no_trajectory():
    engine = warm_engine("base_lr")
    out = engine.generate(QUESTION, "plan", max_new_tokens=12, ignore_eos=True)
    again = engine.generate(QUESTION + out.token_ids, "action", max_new_tokens=1)
    assert (again.num_prefilled_tokens, again.num_cached_tokens) == (1, 48), "of 49, the last one was not run"
    assert engine.generate(QUESTION, "plan", max_new_tokens=12, ignore_eos=True).token_ids == out.token_ids
    with engine.trajectory() as trajectory:
        trajectory.append(QUESTION + out.token_ids + [1])
        assert engine.score_output(trajectory, [2], "plan").num_cached_tokens == 48
        plan, action = (agents()[name].content_hash for name in ("plan", "action"))
        assert [(span.start, span.stop, span.writer) for span in trajectory.writers] == [(0, 50, plan)]
        assert action != plan


class RecordedOracle(DenseOracle):
    """Runs each token under the writers that a trajectory has on record, and lets each write what it is said to."""

    def logits_of(self, engine: Engine, trajectory: Trajectory, agent: str | None) -> np.ndarray:
        context = Context(trajectory.token_ids)
        names = {adapter.content_hash: name for name, adapter in self.agents.items()} | {None: None}
        record: dict[int, dict] = {position: {} for position in range(len(trajectory))}
        for key, run in trajectory._runs.items():
            for span in run.spans:
                for position in range(span.start, span.stop):
                    record[position][self._name(key, names)] = names[span.writer]
        for position, writer_of in record.items():
            base_first = sorted(writer_of, key=lambda key: key[0] != "base")
            for writer in dict.fromkeys(writer_of[key] for key in base_first):
                self._others = {key for key, by in writer_of.items() if by != writer}
                self._run(context, position, writer)
        return self._run(context, len(trajectory) - 1, agent, writes=False)

    def _name(self, key: PageKey, names: dict):
        if key.pool == "base":
            return ("base", names[key.owner] if self.mode == "none" else "all")
        if key.pool == "recomputed":
            return ("own", names[key.owner])
        groups = {self.agents[member].a_group_hash: group for group, member in self.group_members.items()}
        return ("low_rank", names[key.owner] if self.mode == "base" else groups[key.owner])

    def _written_keys(self, agent):
        return [key for key in super()._written_keys(agent) if key not in self._others]


def fill(engine: Engine, num_left: int) -> None:
    """Takes pages out of every pool for good: a small pool under the programs of a large one."""
    for pool in engine._cache.pools.values():
        while pool.num_free > num_left:
            pool.allocate()


def contexts(rng: np.random.Generator) -> Iterator[tuple[list[int], str | None]]:
    """Three beginnings, each in two lengths and with two ends, in any order, by anybody."""
    begin = [QUESTION, [*QUESTION[:8], *QUESTION[:9], *QUESTION[:8]], REST * 4]
    for _ in range(8):
        ids = [*begin[rng.integers(3)][: rng.choice([16, 32])], int(rng.integers(2)), 7, 8, 9]
        yield ids, [*GROUPS, None][rng.integers(4)]


@pytest.mark.parametrize("mode", SHARING_MODES)
def test_writers_on_record_decide_whatever_is_reused_and_evicted(mode):
    """In `none`, where everybody reads what they wrote, that is: nothing ever shows."""
    engine, rng = warm_engine(mode, recompute_layers=(0,), num_recomputed_pages=144), np.random.default_rng(4)
    oracle = RecordedOracle(CONFIG, host_params(weights()[1]), agents(), GROUPS, mode)
    fill(engine, num_left={"base": 14, "full": 5}.get(mode, 10))
    num_cached, num_evictions, remove = 0, 0, engine._cache.prefixes.remove
    opened: list[Trajectory] = []

    def counted(node, key):
        nonlocal num_evictions
        num_evictions += 1
        remove(node, key)

    engine._cache.prefixes.remove = counted  # type: ignore[method-assign]
    for ids, agent in contexts(rng):
        opened.append(engine.trajectory().append(ids))
        if len(opened) > 3:
            opened.pop(0).close()
        for trajectory, reader in ((opened[-1], agent), (opened[0], "action"), (opened[-1], "reflect")):
            before = trajectory.writers
            out = engine.score_output(trajectory, [3, 1], reader)
            num_cached += out.num_cached_tokens
            trajectory.rollback(1)
            assert_close(out.logits[1], oracle.logits_of(engine, trajectory, reader), "oracle")
            assert [s.writer for s in trajectory.writers][: len(before)] == [s.writer for s in before]
    assert num_cached > 100
    assert num_evictions > 2
    assert all(used + cached <= 144 for used, cached in pages(engine).values())


@pytest.mark.parametrize("mode", ["none", "base", "droidspeak"])
def test_another_adapter_under_an_old_name_meets_no_old_page(mode):
    engine = warm_engine(mode, max_adapters=4)
    read(engine, QUESTION, "plan")
    cached = pages(engine)
    engine.unload_adapter("plan")
    own = {"none": "base", "base": "low_rank", "droidspeak": "recomputed"}[mode]
    assert pages(engine) == cached | {own: (0, 0)}, "nobody can read them any more"
    other = random_adapter(CONFIG, rank=4, targets=("q", "k", "v"), seed=77, scale=0.3)
    engine.load_adapter("plan", other)
    logits, num_prefilled, _ = read(engine, QUESTION, "plan")
    assert num_prefilled == 37
    if mode == "none":
        assert_close(logits, read(tiny_engine(mode, {"plan": other}), QUESTION, "plan")[0], "equal")


def test_keys_hold_content_so_that_a_name_alone_finds_nothing():
    """The tree is not told that the adapter went: the key by itself keeps the pages apart."""
    engine = warm_engine("none", max_adapters=4)
    read(engine, QUESTION, "plan")
    engine._cache.prefixes.drop = lambda keys_in_use: None  # type: ignore[method-assign]
    engine.unload_adapter("plan")
    engine.load_adapter("plan", random_adapter(CONFIG, rank=4, targets=("q", "k", "v"), seed=77, scale=0.3))
    assert read(engine, QUESTION, "plan")[1] == 37
    engine.load_adapter("old", agents()["plan"])
    assert read(engine, QUESTION, "old")[1] == 5


def test_kept_pages_can_be_had_again_and_go_only_when_needed():
    engine = warm_engine("full")
    fill(engine, num_left=10)
    pinned = engine.cache_stats().base.pages_used
    read(engine, QUESTION, "plan")
    base = engine.cache_stats().base
    assert (base.pages_used - pinned, base.pages_cached, base.pages_free) == (0, 4, 6)
    read(engine, REST * 8, "plan")  # five full pages of six
    assert engine.cache_stats().base.pages_cached == 9, "there was room: nothing went"
    before = engine.cache_stats()
    with pytest.raises(OutOfPagesError, match="16 more base pages of 8 tokens, 5 of 48 are free"):
        engine.generate(REST * 20, "plan")
    with pytest.raises(OutOfPagesError):
        engine.generate(QUESTION[:32] + [0] * 80, "plan", max_new_tokens=1)
    assert engine.cache_stats() == before, "a call that does not fit evicts nothing, and keeps nothing"
    assert read(engine, QUESTION, "plan")[2] == 32
    assert read(engine, [9] * 79, "plan")[1:] == (79, 0), "everything goes for a call that needs it"
    assert engine.cache_stats().base.pages_cached == 9


def test_what_fits_without_the_cache_fits_with_it():
    """A full page is written again behind a rollback: the cache gives it up where there is no room for a copy."""
    engine, cold = warm_engine("full"), tiny_engine("full")
    fill(engine, num_left=2)
    want = cold.score(cold.trajectory().append(QUESTION[:12]), [1, 2], "plan")
    with engine.trajectory() as trajectory:
        engine.next_token_logits(trajectory.append(QUESTION[:16]), "plan")
        assert_close(engine.score(trajectory.rollback(4), [1, 2], "plan"), want, "equal")


def test_writing_behind_a_rollback_leaves_kept_pages_alone():
    engine = warm_engine("full")
    want = read(engine, QUESTION, "plan")[0]
    with engine.trajectory() as trajectory:
        engine.score(trajectory.append(QUESTION).rollback(10), [5, 6, 7, 8, 9], "plan")
        engine.score(trajectory, [5] * 9, "plan")
    assert_close(read(engine, QUESTION, "plan")[0], want, "equal")


@pytest.mark.parametrize("mode", ["base_lr", "droidspeak"])
def test_interrupted_calls_leave_nothing_wrong(mode, monkeypatch):
    engine, cold = warm_engine(mode), tiny_engine(mode)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._executor, "decode", fail)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(QUESTION, "plan", max_new_tokens=30)
        patch.setattr(engine._executor, "unembed", fail)
        with engine.trajectory() as trajectory, pytest.raises(KeyboardInterrupt):
            engine.score(trajectory.append(QUESTION), REST * 4, "plan")
    assert {name: cached for name, (_, cached) in pages(engine).items() if cached} == {
        "base": 4, {"base_lr": "low_rank", "droidspeak": "recomputed"}[mode]: 4,
    }, "what was prefilled before the failure, nothing of the rest"  # fmt: skip
    want = read(cold, QUESTION + REST * 4, "plan")[0]
    assert_close(read(engine, QUESTION + REST * 4, "plan")[0], want, "equal")
    jax.tree.map(lambda pool: pool.delete(), engine._cache.arrays)
    logits, num_prefilled, _ = read(engine, QUESTION + REST * 4, "plan")
    assert num_prefilled == 57, "what is on no page any more is not found"
    assert_close(logits, want, "equal")


def test_a_stream_that_is_left_shares_what_joined():
    engine = warm_engine("base_lr")
    stream: Any = engine.stream(QUESTION, "plan", max_new_tokens=30, ignore_eos=True)
    shown = next(stream).token_ids + next(stream).token_ids + next(stream).token_ids
    assert engine.generate(QUESTION, "plan", max_new_tokens=1).num_cached_tokens == 32, "beside a running stream"
    stream.close()
    again = engine.generate(QUESTION + shown, "plan", max_new_tokens=1)
    assert again.num_cached_tokens == (37 + len(shown) - 1) // 8 * 8


def test_the_switch():
    engine = tiny_engine("base_lr", prefix_cache=False)
    for each in (engine, engine.with_sharing("none")):
        assert [read(each, QUESTION, "plan")[2] for _ in range(2)] == [0, 0]
        assert all(cached == 0 for _, cached in pages(each).values())
    with pytest.raises(InputError, match="prefix_cache"):
        tiny_engine("base_lr", prefix_cache="yes")
