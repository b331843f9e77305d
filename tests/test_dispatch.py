"""A device whose decode blocks take as long to dispatch as to run: what has come before is not held up by them."""

import asyncio
import gc
import subprocess
import sys
import threading
import weakref

import jax
import pytest
from engines import tiny_engine

from lragent_jax.async_engine import AsyncEngine
from lragent_jax.dispatcher import Dispatcher, may_wait
from lragent_jax.engine import Engine
from lragent_jax.models.errors import EngineBusyError
from lragent_jax.sampling_params import SamplingParams

QUESTION = [(7 * i + 3) % 128 for i in range(21)]
SECONDS = 60
"""Nothing waits so long unless it hangs."""


class BlockingDevice:
    """Has `executor.decode` return only when a block was let through, as XLA's GPU runtime does."""

    def __init__(self, engine: Engine, monkeypatch):
        self.num_returned = 0
        self.is_at_work = threading.Event()
        self.during = lambda: None  # in the dispatching thread, while a block is under way
        self._blocks = threading.Semaphore(0)
        decode = engine._executor.decode

        def blocking(*args):
            self.is_at_work.set()
            self.during()
            tokens = decode(*args)
            assert self._blocks.acquire(timeout=SECONDS), "nobody lets the block through"
            self.is_at_work.clear()
            self.num_returned += 1
            return tokens

        monkeypatch.setattr(engine._executor, "decode", blocking)

    def let_through(self, num_blocks: int = 1000) -> None:
        for _ in range(num_blocks):
            self._blocks.release()


@pytest.fixture
def engine() -> Engine:
    return tiny_engine("base_lr")


@pytest.fixture
def want(engine) -> list[int]:
    return engine.generate(QUESTION, "plan", max_new_tokens=13, ignore_eos=True).token_ids


@pytest.fixture
def device(engine, want, monkeypatch):
    device = BlockingDevice(engine, monkeypatch)
    yield device
    device.let_through()


def opened(engine: Engine, prompt, agent="plan", count=13):
    return engine.caller.open([prompt], [agent], [SamplingParams(max_new_tokens=count, ignore_eos=True)])


def step(engine: Engine) -> None:
    asked = iter((False, True))
    engine.batcher.drive(lambda: next(asked))


def test_a_first_token_does_not_wait_for_the_block_behind_it(engine, device, want):
    call = opened(engine, QUESTION)
    step(engine)
    assert device.num_returned == 0
    (request,) = call.requests
    assert request.generated.token_ids == want[:1]
    assert request.first_token_at is not None
    device.let_through()
    engine.batcher.drive(lambda: call.is_over)
    assert request.output().token_ids == want
    call.end()


def test_a_stream_is_not_a_block_behind(engine, device, want):
    pieces = engine.stream(QUESTION, "plan", max_new_tokens=13, ignore_eos=True)
    for num_blocks, num_new in enumerate((1, 4, 4)):
        assert len(next(pieces).token_ids) == num_new
        assert device.num_returned == num_blocks, "what came of these blocks is there"
        assert device.is_at_work.wait(SECONDS), "the device has its next block"
        device.let_through(1)
    device.let_through()
    assert list(pieces)[-1].output.token_ids == want


def test_a_late_comers_first_token_comes_while_the_others_decode(engine, device, want):
    early = opened(engine, QUESTION[::-1], "reflect", count=40)
    step(engine)
    late = opened(engine, QUESTION)
    device.let_through(1)
    step(engine)
    assert device.num_returned == 1
    assert late.requests[0].generated.token_ids == want[:1], "it was in the step behind the first block"
    device.let_through()
    engine.batcher.drive(lambda: early.is_over and late.is_over)
    assert late.requests[0].output().token_ids == want
    early.end()
    late.end()


def test_tasks_have_their_first_tokens_while_a_block_is_under_way(engine, device, want):
    async def main() -> None:
        async with AsyncEngine(engine) as server:
            pieces = server.stream(QUESTION, "plan", max_new_tokens=13, ignore_eos=True)
            first = await asyncio.wait_for(anext(pieces), SECONDS)
            assert first.token_ids == want[:1]
            assert device.num_returned == 0
            device.let_through()
            assert first.token_ids + [token async for piece in pieces for token in piece.token_ids] == want

    asyncio.run(main())


def test_nobody_touches_the_caches_while_they_are_away(engine, device, want, monkeypatch):
    call, run_chunks = opened(engine, QUESTION), engine._executor.run_chunks
    step(engine)
    assert device.is_at_work.wait(SECONDS)

    def checked(*args):
        assert not device.is_at_work.is_set()
        return run_chunks(*args)

    monkeypatch.setattr(engine._executor, "run_chunks", checked)
    trajectory, logits = engine.trajectory().append(QUESTION), []
    scorer = threading.Thread(target=lambda: logits.append(engine.next_token_logits(trajectory, "plan")))
    scorer.start()
    engine.trajectory().append(QUESTION).fork().close()  # what concerns the host alone goes on
    device.let_through()
    scorer.join(SECONDS)
    assert int(logits[0].argmax()) == want[0]
    engine.batcher.drive(lambda: call.is_over)
    assert call.requests[0].output().token_ids == want
    call.end()


def test_an_error_of_a_dispatch_is_told_once_and_to_those_it_concerns(engine, device, want):
    def fail() -> None:
        raise RuntimeError("no memory")

    device.let_through()
    for is_cancelled in (False, True):
        device.during = fail
        call = opened(engine, QUESTION)
        step(engine)
        if is_cancelled:
            engine.batcher.finish(call.abandon)
        else:
            engine.batcher.drive(lambda call=call: call.is_over)
            with pytest.raises(RuntimeError, match="no memory"):
                call.check()
            call.end()
        device.during = lambda: None
        assert engine.generate(QUESTION, "plan", max_new_tokens=13, ignore_eos=True).token_ids == want
    assert engine.cache_stats().bytes_used == 0


def test_ctrl_c_while_a_block_is_under_way_ends_the_call_and_nothing_else(engine, device, want, monkeypatch):
    dispatcher, bystander = engine.batcher._work.dispatcher, opened(engine, QUESTION)
    wait, submit = dispatcher.wait, dispatcher.submit

    def interrupted() -> None:
        assert device.is_at_work.wait(SECONDS)
        monkeypatch.setattr(dispatcher, "wait", wait)
        device.let_through()
        raise KeyboardInterrupt

    def submitted(call):
        monkeypatch.setattr(dispatcher, "submit", submit)
        monkeypatch.setattr(dispatcher, "wait", interrupted)
        return submit(call)

    monkeypatch.setattr(dispatcher, "submit", submitted)
    trajectory = engine.trajectory().append(QUESTION[::-1])
    with pytest.raises(KeyboardInterrupt):
        engine.generate(trajectory, "reflect", max_new_tokens=30)
    assert trajectory.token_ids == QUESTION[::-1]
    engine.batcher.drive(lambda: bystander.is_over)
    assert bystander.requests[0].output().token_ids == want
    bystander.end()
    trajectory.close()
    assert engine.cache_stats().bytes_used == 0


def test_the_collector_may_end_anything_in_the_dispatching_thread(engine, device, want):
    """Finalizers run there while another thread steps, or waits for this one."""
    left = engine.stream(QUESTION[:9], "reflect", max_new_tokens=30, ignore_eos=True)
    next(left)
    trajectory, done = engine.trajectory().append(QUESTION), threading.Event()

    def finalizers() -> None:
        left.close()
        if not done.is_set():
            trajectory.close()
            engine.cache_stats()
            done.set()

    device.during = finalizers
    device.let_through()
    assert engine.generate(QUESTION, "plan", max_new_tokens=13, ignore_eos=True).token_ids == want
    assert done.is_set()
    assert engine.cache_stats().bytes_used == 0
    assert engine.metrics().num_cancelled == 1


def test_a_dispatcher_ends_with_whoever_had_it():
    dispatcher = Dispatcher()
    thread, value = dispatcher._thread, threading.local()
    assert dispatcher.submit(may_wait).result() is False
    assert may_wait()
    kept = dispatcher.submit(lambda: value)
    dispatcher.wait()
    alive = weakref.ref(value)
    del dispatcher, value, kept
    gc.collect()
    thread.join(SECONDS)
    assert not thread.is_alive()
    assert alive() is None


def test_the_interpreter_ends_behind_what_was_dispatched():
    program = (
        "import time; from lragent_jax.dispatcher import Dispatcher; d = Dispatcher();"
        "d.submit(lambda: (time.sleep(0.2), print('done')))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=SECONDS, check=True)
    assert (out.stdout, out.stderr) == ("done\n", "")


def test_behind_the_interpreters_end_the_caller_does_it():
    dispatcher = Dispatcher()
    dispatcher._thread.calls.put(None)
    dispatcher._thread.join(SECONDS)
    assert dispatcher.submit(may_wait).result() is True
    dispatcher.wait()


def test_what_went_wrong_keeps_nothing_alive():
    class Caches:
        def fail(self):
            raise RuntimeError("no memory")

    caches = Caches()
    alive, dispatcher = weakref.ref(caches), Dispatcher()
    thread = dispatcher._thread
    gc.disable()
    try:
        failed = dispatcher.submit(caches.fail)
        dispatcher.wait()
        assert str(failed.error) == "no memory"
        del failed, caches, dispatcher
        thread.join(SECONDS)
        assert alive() is None
    finally:
        gc.enable()


def fail_in_block(engine: Engine, number: int, monkeypatch) -> None:
    """The block of that number, counted from now on, cannot be dispatched."""
    decode, blocks = engine._executor.decode, iter(range(1, 1000))

    def failing(*args):
        if next(blocks) == number:
            raise RuntimeError("this block failed")
        return decode(*args)

    monkeypatch.setattr(engine._executor, "decode", failing)


def test_of_those_in_a_block_one_is_told_and_the_others_go_on(engine, want, monkeypatch):
    calls = [opened(engine, QUESTION[i:], "plan") for i in (0, 5, 0)]
    fail_in_block(engine, 1, monkeypatch)
    engine.batcher.drive(lambda: all(call.is_over for call in calls))
    errors = [call.requests[0].error for call in calls]
    assert [str(error) for error in errors if error] == ["this block failed"]
    assert calls[2].requests[0].output().token_ids == want
    for call in calls:
        call.end()


def test_a_second_interrupt_while_everybody_is_taken_out(engine, want, monkeypatch):
    batcher = engine.batcher
    pieces = engine.stream(QUESTION, "plan", max_new_tokens=13, ignore_eos=True)
    got = list(next(pieces).token_ids)
    suspend, interrupts = batcher._suspend, iter(("the second",))

    def interrupted(request):
        for which in interrupts:
            raise KeyboardInterrupt(which)
        suspend(request)

    def first(result):
        raise KeyboardInterrupt("the first")

    with monkeypatch.context() as patch:
        patch.setattr(batcher, "_suspend", interrupted)
        patch.setattr(batcher, "_hand_out", first)
        with pytest.raises(KeyboardInterrupt, match="the second"):
            engine.generate(QUESTION[::-1], "action", max_new_tokens=20)
    assert got + [token for piece in pieces for token in piece.token_ids] == want


def test_a_callback_of_the_warm_up_that_generates_is_refused_and_leaves_nothing(engine, want):
    refused = []

    def generate(done, total, what):
        with engine.trajectory().append(QUESTION) as trajectory:
            with pytest.raises(EngineBusyError, match="inside another call of the engine"):
                engine.generate(trajectory, "plan", max_new_tokens=2)
            refused.append(what)
            trajectory.append([1])  # nobody has it

    engine.warmup(max_tokens=8, scoring=False, progress=generate)
    assert refused
    assert engine.generate(QUESTION, "plan", max_new_tokens=13, ignore_eos=True).token_ids == want


def test_a_stream_that_the_collector_ends_in_a_thread_of_the_warm_up(engine, monkeypatch):
    garbage: list = [engine.stream(QUESTION, "plan", max_new_tokens=40, ignore_eos=True)]
    next(garbage[0])
    compile = jax.stages.Lowered.compile

    def collecting(*args, **kwargs):
        if threading.current_thread().name.startswith("compile"):
            garbage.clear()  # as the collector might: this ends the stream here
        return compile(*args, **kwargs)

    monkeypatch.setattr(jax.stages.Lowered, "compile", collecting)
    engine.warmup(max_tokens=8, scoring=False)
    assert not garbage
    assert engine.metrics().num_cancelled == 1


def test_blocks_are_dispatched_under_the_callers_settings(engine, want, monkeypatch):
    decode, seen = engine._executor.decode, []

    def looking(*args):
        seen.append([getattr(jax.config, f"jax_default_{name}") for name in ("device", "matmul_precision")])
        return decode(*args)

    monkeypatch.setattr(engine._executor, "decode", looking)
    with jax.default_device(jax.devices()[0]), jax.default_matmul_precision("highest"):
        engine.generate(QUESTION, "plan", max_new_tokens=3, ignore_eos=True)
    engine.generate(QUESTION, "plan", max_new_tokens=3, ignore_eos=True)
    assert [jax.devices()[0], "highest"] in seen
    assert [None, None] in seen
    assert len({str(settings) for settings in seen}) == 2
