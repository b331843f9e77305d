"""Calls that need the pages of others: what they may take, and that nobody can tell afterwards."""

from typing import Any

import jax
import numpy as np
import pytest
from engines import CONFIG, agents, tiny_engine
from tolerances import assert_close

from lragent_jax.engine import Engine
from lragent_jax.models.adapter import random_adapter
from lragent_jax.models.errors import OutOfPagesError
from lragent_jax.sampling import sampling_arrays
from lragent_jax.sampling_params import SamplingParams
from lragent_jax.sharing import PageKey
from lragent_jax.trajectory import Trajectory

QUESTION = [(7 * i + 3) % 128 for i in range(37)]  # five pages
TOUR = [("plan", [5, 9, 2, 77, 31]), ("reflect", [90] * 9), (None, [8, 8]), ("action", [4])]


def leave_free(engine: Engine, num_pages: int) -> int:
    """Takes base pages out of the pool for good; how many are taken."""
    pool = engine._cache.pools["base"]
    while pool.num_free > num_pages:
        pool.allocate()
    return pool.num_used


def toured(engine: Engine) -> Trajectory:
    """60 tokens on eight pages: plan ran those to 41, reflect to 52, the base model to 56, action to 59."""
    trajectory = engine.trajectory().append(QUESTION)
    for agent, ids in TOUR:
        engine.score(trajectory, ids, agent)
        trajectory.append([11, 12])
    return trajectory.rollback(2)


def lose_arrays(engine: Engine) -> None:
    with engine.batcher.exclusive():  # no program has them
        jax.tree.map(lambda pool: pool.delete(), engine._cache.arrays)


def held(trajectory: Trajectory) -> int:
    """Tokens on base pages."""
    return sum(stop - start for start, stop in trajectory._runs[PageKey("base", None)].held)


def test_open_trajectories_make_room_and_are_rebuilt():
    engine, roomy = tiny_engine("base_lr"), tiny_engine("base_lr")
    occupied = leave_free(engine, 17)
    first, second = toured(engine), toured(engine)
    stats = engine.cache_stats().base
    assert (stats.pages_used - occupied, stats.pages_idle, stats.pages_free) == (16, 16, 1)
    engine.generate([9] * 40, "plan", max_new_tokens=1)
    assert (held(first), held(second)) == (32, 59), "the end of the one that was not used for longer"
    want = roomy.score_output(toured(roomy), [1, 2], "reflect")
    for trajectory, num_lost in ((second, 0), (first, 27)):
        writers = trajectory.writers
        assert [span.stop for span in writers] == [41, 52, 56, 59]
        got = engine.score_output(trajectory, [1, 2], "reflect")
        assert_close(got.logits, want.logits, "equal")
        assert trajectory.writers[:4] == writers
        assert got.num_prefilled_tokens >= want.num_prefilled_tokens
        assert got.num_prefilled_tokens >= num_lost + 1


def test_running_calls_keep_their_pages():
    """Who does not fit beside them waits, and takes its turn when they are done."""
    engine, roomy = tiny_engine("base_lr"), tiny_engine("base_lr")
    expected = roomy.generate(toured(roomy), "plan", max_new_tokens=8, ignore_eos=True).token_ids
    leave_free(engine, 14)
    first, second = toured(engine), engine.trajectory().append(QUESTION)
    stream = engine.stream(first, "plan", max_new_tokens=8, ignore_eos=True)
    ids = next(stream).token_ids
    assert engine.cache_stats().base.pages_idle == 0
    out = engine.generate(second, "reflect", max_new_tokens=8, ignore_eos=True)
    ids = ids + [token for piece in stream for token in piece.token_ids]
    assert ids == expected
    assert out.token_ids == roomy.generate(QUESTION, "reflect", max_new_tokens=8, ignore_eos=True).token_ids


def test_lost_arrays_are_rebuilt_under_their_writers():
    """Also those of a stream that is left after the loss: it keeps what it gave."""
    engine, other = tiny_engine("pre_lr"), tiny_engine("pre_lr")
    lost, kept = toured(engine), toured(other)
    shown = []
    for each, trajectory in ((other, kept), (engine, lost)):
        stream: Any = each.stream(trajectory, "action", max_new_tokens=9, ignore_eos=True)
        shown.append(next(stream).token_ids)
        if each is engine:
            lose_arrays(engine)
            assert engine.cache_stats().base.pages_used == 0
        stream.close()
    assert shown[0] == shown[1]
    assert lost.token_ids == kept.token_ids
    assert lost.writers == kept.writers
    for agent in ("plan", "reflect", None):
        assert_close(engine.next_token_logits(lost, agent), other.next_token_logits(kept, agent), "equal")
    lost.close()
    assert engine.cache_stats().base.pages_used == 0


def test_what_an_unloaded_adapter_wrote_stays_and_is_read_anew_where_it_is_lost():
    engine = tiny_engine("base_lr", max_adapters=3)
    occupied = leave_free(engine, 12)
    trajectory = toured(engine)
    want = engine.next_token_logits(trajectory, "plan")
    engine.unload_adapter("reflect")
    engine.load_adapter("reflect", agents()["reflect"])
    stats = engine.cache_stats().base
    assert (stats.pages_used - occupied, stats.pages_idle) == (8, 6), "two with its tokens stay"
    with pytest.raises(OutOfPagesError, match="11 more base pages of 8 tokens, 10 of 48 are free"):
        engine.generate([9] * 88, "plan", max_new_tokens=1)
    engine.generate([9] * 73, "plan", max_new_tokens=1)
    assert engine.cache_stats().base.pages_used - occupied == 2
    assert_close(engine.next_token_logits(trajectory, "plan"), want, "equal")
    lose_arrays(engine)
    engine.next_token_logits(trajectory, "plan")
    plan, action = (agents()[name].content_hash for name in ("plan", "action"))
    assert [(span.start, span.stop, span.writer) for span in trajectory.writers] == [
        (0, 52, plan), (52, 56, None), (56, 59, action), (59, 60, plan),
    ]  # fmt: skip


def test_low_rank_pages_alone_are_rebuilt_beside_base_pages_that_stay_as_they_are():
    engine = tiny_engine("pre_lr")
    trajectory = toured(engine)
    want = {agent: engine.next_token_logits(trajectory, agent) for agent in ("plan", "reflect")}
    for key, run in trajectory._runs.items():
        if key.pool == "low_rank":
            run.give_up(range(len(run.pages)))
    base = jax.tree.map(np.array, engine._cache.arrays.base)
    for agent, logits in want.items():
        assert_close(engine.next_token_logits(trajectory, agent), logits, "equal")
    assert engine.cache_stats().low_rank.pages_used == 16
    jax.tree.map(np.testing.assert_array_equal, base, engine._cache.arrays.base)


def test_a_preempted_call_goes_on_as_if_nothing_had_been():
    engine, other = tiny_engine("base_lr"), tiny_engine("base_lr")
    want = other.generate(toured(other), "plan", max_new_tokens=9, ignore_eos=True).token_ids
    executor, trajectory = engine._executor, toured(engine)
    length, got = len(trajectory), []
    with trajectory.extending(), engine.batcher.exclusive():
        while len(got) < 9:
            row = executor.open_row(trajectory, engine._registry.find("plan"))
            executor.reserve([row], [4])
            sampling = sampling_arrays([SamplingParams(ignore_eos=True)], [5], (), 1)
            first = int(executor.begin(executor.prefill([row]), [0], [length], sampling, [0])[0])
            tokens = executor.decode(executor.decode_batch([row], [0], sampling, 1), 4)
            new = [first, *np.asarray(tokens)[0].tolist()][: 9 - len(got)]
            got += new
            trajectory.join(new)
            row.commit(length, len(trajectory) - 1)
            length = len(trajectory)
            row.preempt()
            assert engine.cache_stats().base.pages_used == 0
    assert got == want
    assert trajectory.writers[-1].stop == len(trajectory) - 1
    trajectory.close()
    assert engine.cache_stats().base.pages_used == 0


def test_an_adapter_that_left_and_came_back_is_nobody_else():
    """What it writes from then on counts as its own, and may go."""
    engine = tiny_engine("full", max_adapters=3)
    critic = random_adapter(CONFIG, rank=4, targets=("q", "k", "v"), seed=9)
    engine.unload_adapter("reflect")
    engine.load_adapter("critic", critic)
    trajectory = engine.trajectory().append(QUESTION)
    engine.next_token_logits(trajectory, "critic")
    engine.unload_adapter("critic")
    engine.load_adapter("critic", critic)
    engine.next_token_logits(trajectory.append([1] * 11), "critic")
    assert [span.rebuildable for span in trajectory.writers] == [False, True]
    assert engine.cache_stats().base.pages_idle == 1
    engine.load_adapter("twin", critic)
    engine.unload_adapter("critic")
    assert [span.rebuildable for span in trajectory.writers] == [False, True], "its content is still loaded"
