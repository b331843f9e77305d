"""Engines for many requests at a time, driven step by step."""

import collections
import functools

from engines import CONFIG, tiny_engine

from lragent_jax.calls import Call
from lragent_jax.engine import Engine
from lragent_jax.models.adapter import Adapter, random_adapter
from lragent_jax.page_run import HOLE
from lragent_jax.sampling_params import SamplingParams

QUESTION = [(7 * i + 3) % 128 for i in range(43)]  # five full pages of 8 and a piece
# One set of shapes for the whole file: programs are compiled once per mode. Small pools are made by taking pages out.
OPTIONS = {
    "num_pages": 192, "num_low_rank_pages": 288, "prefill_buckets": (8,), "prefill_tokens": 64, "max_batch_size": 8,
    "max_adapters": 8, "prefix_cache": True,
}  # fmt: skip


@functools.cache
def eight_agents() -> dict[str, Adapter]:
    """In three A-groups: agent0, agent3 and agent6 share their A."""
    return {
        f"agent{i}": random_adapter(CONFIG, rank=4, targets=("q", "v"), seed=i, shared_a_seed=i % 3, scale=0.3)
        for i in range(8)
    }


def engine_for(mode: str, **options) -> Engine:
    return tiny_engine(mode, eight_agents(), **{**OPTIONS, **options})


def fill(engine: Engine, num_left: int, num_low_rank: int | None = None) -> None:
    """Takes pages out of every pool for good: a small pool under the programs of a large one."""
    for name, pool in engine._cache.pools.items():
        while pool.num_free > (num_low_rank or num_left if name == "low_rank" else num_left):
            pool.allocate()


def num_held(engine: Engine) -> dict[str, int]:
    stats = engine.cache_stats()
    return {name: getattr(stats, name).pages_used for name in ("base", "low_rank", "recomputed")}


def step(engine: Engine) -> None:
    if engine.batcher.has_work:
        asked = iter((False, True))
        engine.batcher.drive(lambda: next(asked))


def run_to_the_end(engine: Engine, *calls: Call) -> None:
    engine.batcher.drive(lambda: all(call.is_over for call in calls))


def opened(engine: Engine, prompt, agent=None, **sampling) -> Call:
    return engine.caller.open([prompt], [agent], [SamplingParams(**sampling)])


def abandon(engine: Engine, call: Call) -> None:
    engine.batcher.finish(call.abandon)


def check_references(engine: Engine, taken: dict[str, int] | None = None) -> None:
    """Every page has as many holders as its pool counts; `taken` by the test itself, per pool."""
    held: dict[int, collections.Counter] = {id(pool): collections.Counter() for pool in engine._cache.pools.values()}
    for trajectory in engine._trajectories:
        for run in trajectory._runs.values():
            held[id(run.pool)].update(page for page in run.pages if page != HOLE)
    for pool in engine._cache.pools.values():
        held[id(pool)].update(cached.page for cached in engine._cache.prefixes.pages(pool))
    for name, pool in engine._cache.pools.items():
        counts = [pool.num_references(page) for page in range(pool.num_pages)]
        holders = held[id(pool)]
        surplus = [count - holders[page] for page, count in enumerate(counts)]
        assert set(surplus) <= {0, 1}
        assert sum(surplus) == (taken or {}).get(name, 0), f"{name}: pages without a holder"
        assert all(not holders[page] for page, extra in enumerate(surplus) if extra)
