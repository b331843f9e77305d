"""Requests, cancellations, loads and unloads in any order, in pools that are too small: nobody can tell afterwards."""

import contextlib
import functools
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from batches import (
    QUESTION,
    abandon,
    check_references,
    eight_agents,
    engine_for,
    fill,
    num_held,
    opened,
    run_to_the_end,
    step,
)
from dense_oracle import Context, DenseOracle, host_params
from engines import CONFIG, weights
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tolerances import TOKEN_MARGIN, assert_close, assert_greedy

from lragent_jax.calls import Call
from lragent_jax.engine import Engine
from lragent_jax.models.errors import AdapterError, TrajectoryBusyError
from lragent_jax.page_run import Span
from lragent_jax.request import Request
from lragent_jax.sharing import PageKey
from lragent_jax.trajectory import Trajectory

Writers = Mapping[PageKey, Sequence[Span]]

BEGINNINGS = [QUESTION[:16], QUESTION[:16] + [5] * 8, QUESTION[::-1][:10]]
actions = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, 2), st.integers(0, 5), st.integers(0, 7), st.integers(1, 30)),
        st.tuples(st.just("step"), st.integers(1, 3)),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
        st.tuples(st.just("load"), st.integers(0, 7)),
        st.tuples(st.just("unload"), st.integers(0, 7)),
    ),
    max_size=25,
)


class Stressed:
    """An engine with few pages, those that are out of reach, and who wrote what its finished requests read."""

    def __init__(self, mode: str):
        self.engine, self.writers = engine_for(mode, reserved_tokens=4), dict[int, Writers]()
        # What was written by another A-group may have to be rebuilt, with its pages.
        fill(self.engine, 10, num_low_rank=30)
        self.taken = num_held(self.engine)
        leave = self.engine.batcher._leave

        def noting(request: Request, *, ends: bool) -> None:
            if ends:
                self.writers[request.id] = writers_of(request.trajectory)
            leave(request, ends=ends)

        self.engine.batcher._leave = noting

    def load_all(self) -> None:
        for name, adapter in eight_agents().items():
            if name not in self.engine.agents:
                self.engine.load_adapter(name, adapter)


stressed = functools.cache(Stressed)


def writers_of(trajectory: Trajectory) -> Writers:
    return {key: list(run.spans) for key, run in trajectory._runs.items()}


@functools.cache
def oracle_of(mode: str) -> DenseOracle:
    adapters = eight_agents()
    groups = {name: str(adapter.a_group_hash) for name, adapter in adapters.items()}
    return DenseOracle(CONFIG, host_params(weights()[1]), adapters, groups, mode)


def serial_logits(mode: str, ids: Sequence[int], agent: str, writers: Writers, start: int) -> np.ndarray:
    """Logits behind tokens [start, len(ids)) of a run, token by token, in which every token has the same writers."""
    names: dict[str | None, str] = {adapter.content_hash: name for name, adapter in eight_agents().items()}
    oracle, context, rows = oracle_of(mode), Context(), []
    for position, token in enumerate(ids):
        context.ids.append(token)
        for key in sorted(writers, key=lambda key: key.pool != "base"):
            for span in writers[key]:
                if span.start <= position < span.stop:
                    oracle._run(context, position, names.get(span.writer))
        if position >= start:
            rows.append(oracle.logits(context, agent)[0])
    return np.stack(rows)


@pytest.mark.parametrize("mode", ["none", "base_lr"])
def test_anything_in_any_order_leaves_everything_consistent(mode):
    stress = stressed(mode)
    engine, num_preempted = stress.engine, 0

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(actions)
    @example([("submit", 0, i, i, 30) for i in range(5)])
    @example([("submit", 0, 0, i, 9) for i in (0, 3, 1)] + [("step", 3), ("unload", 4), ("submit", 0, 0, 6, 9)])
    def run(todo):
        nonlocal num_preempted
        calls = do(stress, todo)
        run_to_the_end(engine, *(call for call, _ in calls))
        for number, (call, (ids, name)) in enumerate(calls):
            call.check()
            call.end()
            output = call.requests[0].output().token_ids
            if mode == "none":
                assert_greedy(output, alone((*ids, *output), name, len(ids)))
            elif number == 0 and output:
                written = stress.writers[call.requests[0].id]
                assert_greedy(output, serial_logits(mode, [*ids, *output[:-1]], name, written, len(ids) - 1))
        assert num_held(engine) == stress.taken
        stress.load_all()
        for _, (ids, name) in calls[:1]:
            with engine.trajectory().append(ids) as trajectory:
                got = engine.next_token_logits(trajectory, name)
                want = serial_logits(mode, ids, name, writers_of(trajectory), len(ids) - 1)[0]
                assert_close(got, want, "oracle")
        assert num_held(engine) == stress.taken
        num_preempted = engine.metrics().num_preempted

    run()
    assert num_preempted > 0, "the pool is too large to test anything"


def do(stress: Stressed, todo) -> list[tuple[Call, tuple[list[int], str]]]:
    """The calls that were not cancelled, and what they asked for."""
    engine: Engine = stress.engine
    calls: list[tuple[Call, tuple[list[int], str]]] = []
    for what, *numbers in todo:
        name = f"agent{numbers[0]}"
        if what == "submit":
            beginning, end, agent, count = numbers
            ids, name = [*BEGINNINGS[beginning], end, end + 1, 9], f"agent{agent}"
            try:
                calls.append((opened(engine, ids, name, max_new_tokens=count), (ids, name)))
            except AdapterError:
                assert name not in engine.agents
        elif what == "step":
            for _ in range(numbers[0]):
                step(engine)
        elif what == "cancel" and calls:
            abandon(engine, calls.pop(numbers[0] % len(calls))[0])
        elif what == "load" and name not in engine.agents:
            engine.load_adapter(name, eight_agents()[name])
        elif what == "unload" and name in engine.agents:
            is_used = any(asked[1] == name and not call.is_over for call, asked in calls)
            with pytest.raises(TrajectoryBusyError) if is_used else contextlib.nullcontext():
                engine.unload_adapter(name)
        check_references(engine, stress.taken)
    return calls


@functools.cache
def calm_engine() -> Engine:
    return engine_for("none", prefix_cache=False)


@functools.cache
def alone(ids: tuple[int, ...], agent: str, num_prompt: int) -> np.ndarray:
    """The logits that the output behind a prompt is sampled from where nobody else is there."""
    calm = calm_engine()
    with calm.trajectory().append(ids[:num_prompt]) as trajectory:
        return calm.score(trajectory, ids[num_prompt:], agent)


def test_the_margin_rule_tells_a_lesser_token_from_a_tie():
    logits = np.zeros((2, 8))
    logits[:, 3], logits[0, 5] = 1.0, 1.0 - TOKEN_MARGIN / 2
    assert_greedy([5, 3], logits)
    with pytest.raises(AssertionError, match="lesser token"):
        assert_greedy([5, 5], logits)
    with pytest.raises(AssertionError, match="2 tokens and 1 rows"):
        assert_greedy([3, 3], logits[:1])
