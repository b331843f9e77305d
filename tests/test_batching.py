"""Requests that run together: who joins and leaves when, what is never lost, and that nobody notices the others."""

import asyncio
import functools
import random

import jax
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
from engines import ascii_tokenizer
from tolerances import assert_close

from lragent_jax.async_engine import AsyncEngine
from lragent_jax.models.errors import OutOfPagesError, TrajectoryBusyError
from lragent_jax.sampling_params import SamplingParams

# Joining and leaving.


def test_whoever_drives_drives_for_all_and_late_comers_join():
    engine = engine_for("base_lr")
    alone = [engine.generate(QUESTION[:n], "agent0", max_new_tokens=12).token_ids for n in (20, 30)]
    first = opened(engine, QUESTION[:20], "agent0", max_new_tokens=12)
    step(engine)
    second = opened(engine, QUESTION[:30], "agent0", max_new_tokens=12)
    run_to_the_end(engine, second)
    assert first.is_over, "it began before and is no longer"
    assert [call.requests[0].generated.token_ids for call in (first, second)] == alone
    assert engine.metrics().mean_batch_size > 1
    first.end()
    second.end()


def test_the_device_has_its_next_work_before_the_host_reads(monkeypatch):
    """And a lone prompt takes one program per chunk and one for its first token, which is read at once."""
    engine, log = engine_for("base_lr"), []
    for name in ("run_chunks", "begin"):
        monkeypatch.setattr(engine._executor, name, logged(log, name, getattr(engine._executor, name)))
    dispatcher = engine.batcher._work.dispatcher
    monkeypatch.setattr(dispatcher, "submit", logged(log, "decode", dispatcher.submit))
    monkeypatch.setattr(engine.batcher, "_hand_out", logged(log, "read", engine.batcher._hand_out))
    engine.generate(QUESTION, "agent0", max_new_tokens=10)
    assert log == [
        *["run_chunks"] * 6, "begin", "decode", "read",
        "decode", "read", "decode", "read", "read",
    ]  # fmt: skip


def logged(log: list, name: str, function):
    @functools.wraps(function)
    def call(*args):
        log.append(name)
        return function(*args)

    return call


def test_a_stop_string_ends_a_row_while_the_next_block_is_under_way():
    engine = engine_for("base_lr", tokenizer=ascii_tokenizer())
    free, other = engine.generate([QUESTION, QUESTION[::-1]], "agent0", max_new_tokens=24)
    assert free.text is not None
    prompts = [engine.trajectory().append(ids) for ids in (QUESTION, QUESTION[::-1])]
    params = [SamplingParams(max_new_tokens=24, stop=[free.text[5:7]]), SamplingParams(max_new_tokens=24)]
    outs = engine.generate(prompts, "agent0", params)
    assert outs[0].text == free.text[: free.text.index(free.text[5:7])]
    assert prompts[0].token_ids == QUESTION + outs[0].token_ids
    assert outs[1].token_ids == other.token_ids
    # What was written beyond the stop is written again by whoever goes on.
    cold = engine_for("base_lr", prefix_cache=False)
    want = cold.next_token_logits(cold.trajectory().append(prompts[0].token_ids), "agent0")
    assert_close(engine.next_token_logits(prompts[0], "agent0"), want, "equal")


def test_a_list_longer_than_the_batch_and_the_pool_takes_turns():
    engine = engine_for("none")
    fill(engine, 24)
    seen = []
    prompts = [[i, *QUESTION[:20]] for i in range(30)]
    outs = engine.generate(prompts, "agent0", max_new_tokens=5, progress=lambda *at: seen.append(at))
    assert [out.token_ids for out in outs[::7]] == [
        engine.generate(prompt, "agent0", max_new_tokens=5).token_ids for prompt in prompts[::7]
    ]
    assert seen[0] == (0, 30, "generating")
    assert seen[-1] == (30, 30, "generating")
    assert [done for done, _, _ in seen] == sorted({done for done, _, _ in seen})


def test_who_has_to_wait_keeps_no_pages_from_who_is_admitted():
    """The idle pages of a trajectory that is next in the queue are to be had like any others."""
    engine = engine_for("base")
    fill(engine, 16, 64)
    with engine.trajectory() as idle:
        engine.next_token_logits(idle.append([5] * 80), "agent0")
        expected = engine.next_token_logits(idle, "agent1")
        long = [(5 * i + 1) % 128 for i in range(90)]
        outputs = engine.generate([long, idle], "agent0", max_new_tokens=2, ignore_eos=True)
        assert [len(out.token_ids) for out in outputs] == [2, 2]
        idle.rollback(2)
        assert_close(engine.next_token_logits(idle, "agent1"), expected, "equal")


def test_a_block_shorter_than_a_look_loses_no_step():
    """A row that is read along decodes while another is prefilled chunk by chunk."""
    engine = engine_for("none", decode_block=2)
    stream = engine.stream(QUESTION, "agent0", max_new_tokens=12, ignore_eos=True)
    first = next(stream)
    call = opened(engine, [(3 * i + 1) % 128 for i in range(200)], "agent1", max_new_tokens=2, ignore_eos=True)
    ids = first.token_ids + [token for piece in stream for token in piece.token_ids]
    assert ids == engine.generate(QUESTION, "agent0", max_new_tokens=12, ignore_eos=True).token_ids
    run_to_the_end(engine, call)
    call.end()


def test_what_can_never_fit_is_refused_before_the_rest_is_run():
    engine = engine_for("none")
    good = engine.trajectory().append(QUESTION)
    with pytest.raises(OutOfPagesError, match="193 base pages of 8 tokens, there are 192"):
        engine.generate([good, [1] * 1500], "agent0", max_new_tokens=40)
    assert good.token_ids == QUESTION
    assert engine.metrics().num_steps == 0


def test_a_list_in_which_one_fails_leaves_nothing():
    """A prompt fits the pool, but not what others leave of it, and the rest has ended when that turns out."""
    engine = engine_for("none")
    fill(engine, 20)
    good, taken = engine.trajectory().append(QUESTION), num_held(engine)
    with pytest.raises(OutOfPagesError, match="32 more base pages of 8 tokens, 20 of 192 are free: close trajectories"):
        engine.generate([good, [1] * 250], "agent0", max_new_tokens=3)
    assert good.token_ids == QUESTION
    assert engine.metrics().num_finished == 1
    assert len(engine.generate(good, "agent0", max_new_tokens=3).token_ids) == 3
    good.close()
    assert num_held(engine) == taken


# A prefix that is just being read.


@pytest.mark.parametrize(
    ("mode", "names", "num_prefilled"),
    [
        ("base_lr", ["agent0"], 43 + 63 * 3),
        ("none", ["agent0"], 43 + 63 * 3),
        ("none", ["agent0", "agent3"], 2 * 43 + 62 * 3),
        ("base_lr", ["agent0", "agent3"], 43 + 63 * 3),  # one A-group
        ("base", ["agent0", "agent3"], 2 * 43 + 62 * 3),  # each its own low-rank pages
    ],
)
def test_simultaneous_requests_read_a_common_prefix_once(mode, names, num_prefilled):
    engine = engine_for(mode)
    prompts = [[*QUESTION[:40], i, i, i] for i in range(64)]
    outs = engine.generate(prompts, [names[i % len(names)] for i in range(64)], max_new_tokens=1)
    assert sum(out.num_prefilled_tokens for out in outs) == num_prefilled
    assert engine.metrics().num_prefilled_tokens == num_prefilled


def test_a_reader_that_is_cancelled_is_not_waited_for():
    engine = engine_for("base_lr", prefill_tokens=8)
    reader, waiter = (opened(engine, [*QUESTION, i], "agent0", max_new_tokens=2) for i in range(2))
    step(engine)
    step(engine)
    assert (reader.requests[0].state, waiter.requests[0].state) == ("prefilling", "waiting")
    abandon(engine, reader)
    run_to_the_end(engine, waiter)
    out = waiter.requests[0].output()
    assert out.num_prefilled_tokens + out.num_cached_tokens == 44
    assert out.num_cached_tokens in (16, 24), "what had been read when the reader left"
    waiter.end()
    check_references(engine)


# Memory.


@pytest.mark.parametrize("mode", ["none", "base_lr"])
def test_a_preempted_request_goes_on_where_it_was(mode):
    engine = engine_for(mode, reserved_tokens=4)
    prompts = [[i, *QUESTION[:9]] for i in range(4)]
    alone = [engine.generate(prompt, "agent0", max_new_tokens=40).token_ids for prompt in prompts]
    tight = engine_for(mode, reserved_tokens=4)
    fill(tight, 16)  # each needs seven in the end
    taken = num_held(tight)
    trajectories = [tight.trajectory().append(prompt) for prompt in prompts]
    outs = tight.generate(trajectories, "agent0", max_new_tokens=40)
    assert [out.token_ids for out in outs] == alone
    metrics = tight.metrics()
    assert 0 < metrics.num_preempted <= 8
    assert metrics.num_recomputed_tokens > 0
    assert [out.num_prefilled_tokens for out in outs] == [10] * 4
    check_references(tight, taken)


def test_a_cancelled_request_frees_its_pages_whatever_its_state():
    engine = engine_for("base_lr", prefill_tokens=8)
    trajectory = engine.trajectory().append(QUESTION)
    waiting, cold = opened(engine, trajectory, "agent0", max_new_tokens=30), num_held(engine)
    for num_steps, state in ((0, "waiting"), (2, "prefilling"), (7, "decoding")):
        if num_steps:
            waiting = opened(engine, trajectory, "agent0", max_new_tokens=30)
        for _ in range(num_steps):
            step(engine)
        assert waiting.requests[0].state == state
        abandon(engine, waiting)
        assert waiting.requests[0].state == "cancelled"
        assert trajectory.token_ids == QUESTION
        check_references(engine)
        if state == "prefilling":
            trajectory.drop(lambda key: False)
    trajectory.close()
    assert num_held(engine) == cold
    assert engine.metrics().num_cancelled == 3


def test_an_error_is_its_drivers_and_others_go_on(monkeypatch):
    engine = engine_for("none")
    want = engine.generate(QUESTION, "agent0", max_new_tokens=12).token_ids
    bystander = opened(engine, QUESTION, "agent0", max_new_tokens=12)
    step(engine)
    step(engine)

    def fail(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._executor, "run_chunks", fail)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(QUESTION[::-1], "agent3", max_new_tokens=9)
    jax.tree.map(lambda pool: pool.delete(), engine._cache.arrays)  # as an interrupted program leaves them
    run_to_the_end(engine, bystander)
    assert bystander.requests[0].output().token_ids == want
    bystander.end()
    check_references(engine)


def test_an_adapter_is_unloaded_beside_those_that_run():
    """Rows of the bank are numbered anew, and whoever was in the batch goes on as if nothing had been."""
    engine = engine_for("none")
    want = [engine.generate(QUESTION, name, max_new_tokens=20).token_ids for name in ("agent3", "agent5")]
    calls = [opened(engine, QUESTION, name, max_new_tokens=20) for name in ("agent3", "agent5")]
    while not calls[1].requests[0].generated.token_ids:
        step(engine)
    with pytest.raises(TrajectoryBusyError, match="'agent5' is not done"):
        engine.unload_adapter("agent5")
    engine.unload_adapter("agent1")
    run_to_the_end(engine, *calls)
    assert [call.requests[0].output().token_ids for call in calls] == want
    for call in calls:
        call.end()
    engine.unload_adapter("agent5")
    check_references(engine)


def test_scoring_takes_pages_from_who_runs_and_that_one_goes_on():
    engine, roomy = engine_for("none"), engine_for("none")
    want = roomy.generate(QUESTION, "agent0", max_new_tokens=30).token_ids
    fill(engine, 12)  # ten for the one, seven for the other
    taken = num_held(engine)
    call = opened(engine, QUESTION, "agent0", max_new_tokens=30)
    step(engine)
    step(engine)
    with engine.trajectory().append(QUESTION[::-1]) as other, roomy.trajectory().append(QUESTION[::-1]) as same:
        got, expected = engine.score(other, [1, 2, 3], "agent3"), roomy.score(same, [1, 2, 3], "agent3")
        assert_close(got, expected, "equal")
        assert engine.metrics().num_preempted == 1
        step(engine)
        assert call.requests[0].row is not None
        with pytest.raises(OutOfPagesError, match="need 193 base pages of 8 tokens, there are 192"):
            engine.next_token_logits(other.append([1] * 1491), "agent3")
        assert engine.metrics().num_preempted == 1, "in vain for anybody"
    run_to_the_end(engine, call)
    assert call.requests[0].output().token_ids == want
    call.end()
    check_references(engine, taken)


def test_arrays_that_a_failed_program_left_are_made_anew(monkeypatch):
    """They are there, and whoever waits for them has the program's error."""
    engine = engine_for("none")
    want = engine.generate(QUESTION, "agent0", max_new_tokens=12).token_ids
    failed, wait = engine._cache.arrays, jax.block_until_ready

    def block_until_ready(tree):
        if tree is failed:
            raise jax.errors.JaxRuntimeError("INTERNAL: the device gave up")
        return wait(tree)

    def fail(*args):
        engine._cache.arrays = failed
        raise jax.errors.JaxRuntimeError("INTERNAL: the device gave up")

    call, slots = opened(engine, QUESTION, "agent0", max_new_tokens=12), engine._executor.slots
    monkeypatch.setattr(jax, "block_until_ready", block_until_ready)
    with monkeypatch.context() as patch:
        patch.setattr(engine._executor, "run_chunks", fail)
        with pytest.raises(jax.errors.JaxRuntimeError, match="gave up"):
            engine.generate(QUESTION, "agent3", max_new_tokens=3)
    run_to_the_end(engine, call)
    assert engine._cache.num_losses == 1
    assert engine._executor.slots is not slots
    assert call.requests[0].output().token_ids == want
    call.end()


# A real load.


def test_two_thousand_requests_of_sixty_trajectories_and_eight_agents():
    engine = engine_for("base_lr")
    taken, names = num_held(engine), list(eight_agents())
    given_out: list[int] = []

    async def user(server: AsyncEngine, number: int, num_requests: int) -> None:
        rng = random.Random(number)
        trajectory, expected = engine.trajectory(), []
        for turn in range(num_requests):
            if turn % 6 == 0:
                trajectory.close()
                trajectory, expected = engine.trajectory().append([7, 8, 9] * 3), [7, 8, 9] * 3
            ids = [rng.randrange(128) for _ in range(rng.randrange(1, 3))]
            trajectory.append(ids)
            count = rng.randrange(1, 4)
            out = await server.generate(trajectory, rng.choice(names), max_new_tokens=count)
            assert len(out.token_ids) == count
            expected += ids + out.token_ids
            assert trajectory.token_ids == expected, "lost, or twice"
            given_out.append(count)
        trajectory.close()

    async def all_users() -> None:
        async with AsyncEngine(engine) as server:
            await asyncio.gather(*(user(server, i, 34 if i < 20 else 33) for i in range(60)))

    asyncio.run(all_users())
    metrics = engine.metrics()
    assert (metrics.num_finished, metrics.num_waiting, metrics.num_decoding) == (2000, 0, 0)
    assert len(given_out) == 2000
    assert metrics.num_generated_tokens == sum(given_out)
    assert metrics.mean_batch_size > 2
    assert num_held(engine) == taken
    check_references(engine, taken)
