"""How calls end: left, closed, failed or done, at whatever moment."""

import asyncio
import gc
import threading
import time
import weakref
from typing import Any

import jax
import pytest
from batches import run_to_the_end
from engines import CONFIG, OPTIONS, agents, tiny_engine, weights

from lragent_jax.async_engine import AsyncEngine
from lragent_jax.engine import Engine
from lragent_jax.models.errors import LRAgentError
from lragent_jax.outputs import GenerationOutput
from lragent_jax.request import Request
from lragent_jax.sampling_params import SamplingParams

CONTEXT = [(7 * i + 3) % 128 for i in range(21)]
LONG = {"max_new_tokens": 200, "ignore_eos": True}


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_pages_of_a_trajectory_that_goes_during_a_step_can_be_had(how, monkeypatch):
    engine = tiny_engine("base_lr", num_pages=14, num_low_rank_pages=42)
    idle = [engine.trajectory().append([(3 * i) % 128 for i in range(80)])]  # 10 of 14 pages
    engine.next_token_logits(idle[0], "plan")
    reserve = engine._cache.reserve

    def during(claims):
        if idle and how == "closed":
            threading.Thread(target=idle.pop().close).start()
            time.sleep(0.1)
        elif idle:
            idle.pop()
            gc.collect()
        return reserve(claims)

    monkeypatch.setattr(engine._cache, "reserve", during)
    output = engine.generate([7] * 70, "plan", max_new_tokens=2, ignore_eos=True)  # needs 9
    assert len(output.token_ids) == 2


def test_a_dropped_engine_gives_its_pages_back_without_the_collector():
    engine = tiny_engine("base_lr")
    engine.generate(CONTEXT, "plan", max_new_tokens=3)
    pages = weakref.ref(engine._cache)
    gc.collect()
    gc.disable()
    try:
        del engine
        assert pages() is None
    finally:
        gc.enable()


def test_whoever_has_the_last_piece_has_the_trajectory(monkeypatch):
    states = []
    take_pieces = Request.take_pieces

    def take(request, *, ends=False):
        states.extend([request.state] * ends)
        take_pieces(request, ends=ends)

    monkeypatch.setattr(Request, "take_pieces", take)
    list(tiny_engine("base_lr").stream(CONTEXT, "plan", max_new_tokens=3, ignore_eos=True))
    assert states == ["finished"]


def test_a_call_is_abandoned_once():
    engine = tiny_engine("base_lr")
    trajectory = engine.trajectory().append(CONTEXT)
    call = engine.caller.open([trajectory], ["plan"], [SamplingParams(max_new_tokens=3, ignore_eos=True)])
    run_to_the_end(engine, call)
    engine.batcher.finish(call.abandon)
    trajectory.append([1, 2, 3])
    engine.batcher.finish(call.abandon)
    assert trajectory.token_ids == [*CONTEXT, 1, 2, 3]


@pytest.mark.parametrize("meanwhile", ["nothing", "done", "preempted"])
def test_the_last_token_of_a_stream_that_was_left_is_written_by_its_next_reader(meanwhile):
    engine = tiny_engine("base_lr")
    trajectory = engine.trajectory().append(CONTEXT)
    stream: Any = engine.stream(trajectory, "plan", max_new_tokens=9, ignore_eos=True)
    given = []
    while len(given) < 5:
        given += next(stream).token_ids
    if meanwhile == "preempted":
        with engine.batcher.exclusive():
            engine.batcher.make_room()
    if meanwhile != "nothing":  # others drive
        engine.generate(CONTEXT[:5], "plan", max_new_tokens=40, ignore_eos=True)
    stream.close()
    assert trajectory.token_ids == [*CONTEXT, *given]
    engine.next_token_logits(trajectory, "reflect")
    assert [(span.start, span.stop) for span in trajectory.writers] == [(0, 25), (25, 26)]


def test_what_a_reader_was_given_stays_when_ctrl_c_ends_the_stream(monkeypatch):
    engine = tiny_engine("base_lr")
    trajectory = engine.trajectory().append(CONTEXT)
    given, drive = [], engine.batcher.drive

    def interrupted(done):
        if len(given) >= 2:
            raise KeyboardInterrupt
        drive(done)

    monkeypatch.setattr(engine.batcher, "drive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        given.extend(piece.token_ids for piece in engine.stream(trajectory, "plan", **LONG))
    assert len(given) == 2
    assert trajectory.token_ids == [*CONTEXT, *given[0], *given[1]]


@pytest.mark.parametrize("arrays", ["stay", "go, too"])
def test_an_error_of_every_block_ends_the_call(arrays, monkeypatch):
    engine = tiny_engine("base_lr")
    tried = []

    def fail(batch, num_steps):
        tried.append(num_steps)
        if arrays != "stay":
            for array in jax.tree.leaves(engine._cache.arrays):
                array.delete()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._executor, "decode", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.generate(CONTEXT, "plan", max_new_tokens=9, ignore_eos=True)
    assert len(tried) == 1


def test_recomputed_pages_suffice_for_what_the_model_and_an_adapter_wrote_by_turns():
    options = {**OPTIONS, "num_pages": 12, "num_low_rank_pages": None}
    engine = Engine(CONFIG, *weights(), {"plan": agents()["plan"]}, sharing="droidspeak", **options)
    trajectory = engine.trajectory()
    for i, agent in enumerate((None, "plan", None, "plan")):
        trajectory.append([(5 * j + 23 * i) % 128 for j in range(23)])
        engine.next_token_logits(trajectory, agent)
    before = [engine.next_token_logits(trajectory, agent).argmax() for agent in ("plan", None)]
    engine.generate([3] * 90, "plan", max_new_tokens=7, ignore_eos=True)  # needs all pages
    assert [engine.next_token_logits(trajectory, agent).argmax() for agent in ("plan", None)] == before


def test_a_finished_call_does_not_get_the_error_of_another(monkeypatch):
    engine = tiny_engine("base_lr", max_batch_size=1)
    run_chunks = engine._executor.run_chunks

    def fail(rows, chunks):
        if len(rows[0].trajectory) == 9:
            raise RuntimeError("the other goes wrong")
        return run_chunks(rows, chunks)

    monkeypatch.setattr(engine._executor, "run_chunks", fail)

    async def calls():
        async with AsyncEngine(engine) as server:
            one = asyncio.create_task(server.generate(CONTEXT, "plan", max_new_tokens=5, ignore_eos=True))
            other = asyncio.create_task(server.generate([5] * 9, "plan", max_new_tokens=5))
            await asyncio.sleep(0)  # both are submitted
            while not engine.metrics().num_finished:  # the loop is busy with something else
                time.sleep(0.01)
            time.sleep(0.2)
            return await asyncio.gather(one, other, return_exceptions=True)

    one, other = asyncio.run(calls())
    assert isinstance(one, GenerationOutput)
    assert isinstance(other, RuntimeError)
    assert len(one.token_ids) == 5


def test_the_trajectory_is_its_owners_when_closing_tells_the_task():
    engine = tiny_engine("base_lr")

    async def one(server, trajectory):
        try:
            await server.generate(trajectory, "plan", **LONG)
        except LRAgentError:
            trajectory.append([1, 2, 3])

    async def close():
        server = AsyncEngine(engine)
        with engine.trajectory() as trajectory:
            task = asyncio.create_task(one(server, trajectory.append(CONTEXT)))
            await asyncio.sleep(0.02)
            await server.aclose()
            await task
            assert trajectory.token_ids == [*CONTEXT, 1, 2, 3]

    for _ in range(5):
        asyncio.run(close())


def test_closing_does_not_wait_for_a_loop_that_has_ended():
    server = AsyncEngine(tiny_engine("base_lr"))
    loop, tasks = asyncio.new_event_loop(), []

    async def leave():
        tasks.append(loop.create_task(server.generate(CONTEXT, "plan", **LONG)))
        await asyncio.sleep(0.01)

    loop.run_until_complete(leave())
    loop.close()
    asyncio.run(asyncio.wait_for(server.aclose(), 30))
    tasks[0].get_coro().close()
    tasks[0]._log_destroy_pending = False
