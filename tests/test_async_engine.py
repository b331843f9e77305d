"""Tasks that come and go: pieces as they come, cancellation, and what becomes of errors."""

import asyncio
import threading

import pytest
from engines import ascii_tokenizer, tiny_engine

from lragent_jax.async_engine import AsyncEngine
from lragent_jax.engine import Engine
from lragent_jax.fair_lock import FairLock
from lragent_jax.models.errors import InputError, LRAgentError

QUESTION = [(7 * i + 3) % 128 for i in range(21)]


@pytest.fixture
def engine() -> Engine:
    return tiny_engine("base_lr", tokenizer=ascii_tokenizer())


def test_streams_and_calls_share_batches_and_give_what_the_engine_gives(engine):
    want = engine.generate(QUESTION, "plan", max_new_tokens=9)

    async def stream(server: AsyncEngine) -> list:
        return [piece async for piece in server.stream(QUESTION, "plan", max_new_tokens=9)]

    async def main() -> None:
        async with AsyncEngine(engine) as server:
            pieces, out = await asyncio.gather(stream(server), server.generate(QUESTION, "plan", max_new_tokens=9))
            assert out.token_ids == want.token_ids
            assert "".join(piece.text for piece in pieces) == want.text
            assert pieces[-1].output.token_ids == want.token_ids
            with pytest.raises(InputError, match="empty"):
                await server.generate([], "plan")
        with pytest.raises(LRAgentError, match="closed"):
            await server.generate(QUESTION, "plan")

    asyncio.run(main())
    assert engine.cache_stats().bytes_used == 0


def test_leaving_cancels_and_the_trajectory_is_its_owners_again(engine):
    trajectory = engine.trajectory().append(QUESTION)

    async def read_a_little(server: AsyncEngine, num_pieces: int) -> list[int]:
        given: list[int] = []
        pieces = server.stream(trajectory, "plan", max_new_tokens=200)
        async for piece in pieces:
            given += piece.token_ids
            if num_pieces := num_pieces - 1:
                continue
            await pieces.aclose()  # type: ignore[attr-defined]
            return given
        raise AssertionError("the stream ended")

    async def main() -> None:
        async with AsyncEngine(engine) as server:
            given = await read_a_little(server, 3)
            assert trajectory.token_ids == QUESTION + given
            task = asyncio.create_task(server.generate(trajectory, "plan", max_new_tokens=200))
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert trajectory.token_ids == QUESTION + given, "of a call that was cancelled nothing joins"
            late = asyncio.create_task(server.generate(trajectory, "plan", max_new_tokens=200))
            await asyncio.sleep(0.01)
        with pytest.raises(LRAgentError, match="closed before"):
            await late

    asyncio.run(main())
    trajectory.close()
    assert engine.cache_stats().bytes_used == 0
    assert engine.metrics().num_cancelled == 3


def test_closing_ends_streams_that_nobody_reads_on(engine):
    trajectory = engine.trajectory().append(QUESTION)

    async def main() -> None:
        async with AsyncEngine(engine) as server:
            pieces = server.stream(trajectory, "plan", max_new_tokens=200)
            given = (await anext(pieces)).token_ids
        assert trajectory.token_ids == QUESTION + given
        with pytest.raises(LRAgentError, match="closed"):
            await anext(pieces)

    asyncio.run(asyncio.wait_for(main(), 60))
    trajectory.append([1]).close()
    assert engine.cache_stats().bytes_used == 0


def test_an_error_of_the_device_reaches_whoever_waits_and_the_server_goes_on(engine, monkeypatch):
    async def main() -> None:
        async with AsyncEngine(engine) as server:
            with monkeypatch.context() as patch:

                def fail(*args):
                    raise RuntimeError("no memory")

                patch.setattr(engine._executor, "run_chunks", fail)
                with pytest.raises(RuntimeError, match="no memory"):
                    await server.generate(QUESTION, "plan", max_new_tokens=3)
            assert len((await server.generate(QUESTION, "plan", max_new_tokens=3)).token_ids) == 3

    asyncio.run(main())


def test_a_fair_lock_goes_to_whoever_waits():
    lock, order, waits = FairLock(), [], threading.Event()

    def other() -> None:
        waits.set()
        with lock:
            order.append("other")

    thread = threading.Thread(target=other)
    with lock, lock:
        assert lock.is_mine
        thread.start()
        waits.wait()
        while lock._door.acquire(blocking=False):  # until the other is behind the door
            lock._door.release()
    with lock:
        order.append("first")
    thread.join()
    assert order == ["other", "first"]
    assert not lock.is_mine
