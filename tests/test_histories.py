"""Random histories in every mode against the dense oracle, which knows of no pages: memory pressure changes nothing."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_oracle import Context, DenseOracle, host_params
from engines import CONFIG, agents, tiny_engine, weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import assert_close, assert_greedy

from lragent_jax.engine import Engine
from lragent_jax.eviction import choose_victims, evict
from lragent_jax.generation import Cache
from lragent_jax.intervals import difference
from lragent_jax.models.cache_view import BaseCache
from lragent_jax.models.errors import OutOfPagesError
from lragent_jax.outputs import ScoreOutput
from lragent_jax.sharing import SHARING_MODES, PoolName
from lragent_jax.trajectory import Trajectory

GROUPS = {"plan": "a", "action": "a", "reflect": "b"}
QUESTION = [(7 * i + 3) % 128 for i in range(37)]
SIZES = {"base": 24, "low_rank": 40, "recomputed": 30}

AGENT = st.sampled_from(["plan", "action", "reflect", None])
STEP = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 20)),
    st.tuples(st.just("score"), AGENT, st.integers(1, 9)),
    st.tuples(st.just("generate"), AGENT, st.integers(1, 6)),
    st.tuples(st.just("stream"), AGENT, st.integers(1, 6)),
    st.tuples(st.just("leave"), AGENT, st.integers(1, 6)),
    st.tuples(st.just("batch"), AGENT, st.integers(1, 6), AGENT),
    st.tuples(st.just("reload"), st.sampled_from(["plan", "reflect"])),
    st.tuples(st.just("fork"), st.integers(0, 3)),
    st.tuples(st.just("switch"), st.integers(0, 3)),
    st.tuples(st.just("rollback"), st.integers(0, 12)),
    st.tuples(st.just("close"), st.integers(0, 3)),
    st.tuples(st.just("evict"), st.sampled_from(["base", "low_rank", "recomputed"]), st.integers(1, 6)),
    st.tuples(st.just("preempt")),
    st.tuples(st.just("lose")),
)


def leave_free(engine: Engine) -> dict[str, int]:
    """Takes pages away, by pool: as good as smaller pools, whose programs would have to be compiled for this alone."""
    for name, pool in engine._cache.pools.items():
        while pool.num_free > SIZES[name]:
            pool.allocate()
    return {name: pool.num_used for name, pool in engine._cache.pools.items()}


def take_pages(engine: Engine, name: PoolName, count: int) -> None:
    """What a call that needs `count` more pages than are free does to the others."""
    cache = engine._cache
    pool = cache.pools[name]
    victims, freed = choose_victims(
        cache.prefixes, {name: (pool, count)}, {}, lambda index: 1.0 + index, cache.holders, cache.use.expected
    )
    before = pool.num_free
    evict(cache.prefixes, victims)
    assert pool.num_free - before == freed[name]


def poison_free_pages(engine: Engine) -> None:
    """Whatever reads a page that nobody has written since gets NaN for it."""
    cache = engine._cache

    def poisoned(array: jax.Array, pool: PoolName) -> jax.Array:
        host = np.array(array)
        host[cache.pools[pool]._free] = np.nan
        return jnp.array(host)

    pools: list[PoolName] = ["recomputed" if i in cache.recomputed_layers else "base" for i in range(CONFIG.num_layers)]
    kv = tuple(map(poisoned, cache.arrays.base.kv, pools))
    low_rank = jax.tree.map(lambda array: poisoned(array, "low_rank"), cache.arrays.low_rank)
    cache.arrays = Cache(base=BaseCache(kv), low_rank=low_rank)


def gone(trajectory: Trajectory, writer: str | None = None) -> bool:
    """Whether tokens (those that `writer` wrote) are on record and on no page."""
    return any(
        difference([(span.start, span.stop)], run.held)
        for run in trajectory._runs.values() for span in run.spans if writer in (None, span.writer)
    )  # fmt: skip


def can_be_lost(trajectory: Trajectory) -> bool:
    """Whether everything could be rebuilt."""
    return all(span.rebuildable for run in trajectory._runs.values() for span in run.spans)


@pytest.mark.parametrize("mode", SHARING_MODES)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_history_gives_the_logits_of_the_dense_oracle(mode, data):
    """Append, run, fork, roll back, leave, reload, evict, lose and close at random, in a pool that may be too small.

    What was evicted, preempted or lost counts as prefilled once more, and shows in nothing else.
    """
    engine = tiny_engine(mode, recompute_layers=(1,), prefill_buckets=(8,))
    occupied = leave_free(engine)
    oracle = DenseOracle(CONFIG, host_params(weights()[1]), agents(), GROUPS, mode, own_layers=(1,))
    steps = data.draw(st.lists(STEP, max_size=14))
    trajectories = [engine.trajectory().append(QUESTION[:11])]
    contexts = [Context(QUESTION[:11])]
    at = 0
    for number, (name, *arguments) in enumerate(steps):
        trajectory, context = trajectories[at], contexts[at]
        if name == "append":
            ids = [(13 * number + i) % 128 for i in range(arguments[0])]
            trajectory.append(ids)
            context.ids += ids
        elif name in ("score", "generate", "stream", "batch") and context.ids:
            agent, count, *others = arguments
            sampling = {"max_new_tokens": count, "ignore_eos": True}
            scored = [(5 * number + 3 * i) % 128 for i in range(count)]
            rows = [(trajectory, context, agent)] + [(trajectory.fork(), context.fork(), other) for other in others]
            is_whole = not gone(trajectory)
            try:
                if name == "score":
                    outs = [engine.score_output(trajectory, scored, agent)]
                elif name == "stream":
                    outs = [list(engine.stream(trajectory, agent, **sampling))[-1].output]
                else:
                    outs = engine.generate([row[0] for row in rows], [row[2] for row in rows], **sampling)
            except OutOfPagesError:
                assert trajectory.token_ids == context.ids
                outs = []
            for got, (_, read, agent) in zip(outs, rows, strict=False):
                assert got is not None
                ids = scored if isinstance(got, ScoreOutput) else got.token_ids
                want, num_prefilled = oracle.output(read, ids, agent)
                assert got.num_prefilled_tokens >= num_prefilled
                assert got.num_prefilled_tokens == num_prefilled or not is_whole
                if isinstance(got, ScoreOutput):
                    assert_close(got.logits, want, "oracle")
                else:
                    assert_greedy(ids, want)
            for beside, *_ in rows[1:]:
                beside.close()
        elif name == "leave" and context.ids:
            stream = engine.stream(trajectory, arguments[0], max_new_tokens=arguments[1], ignore_eos=True)
            with contextlib.suppress(OutOfPagesError):
                given = next(stream).token_ids
                del stream  # whoever leaves it closes it
                assert trajectory.token_ids == context.ids + given
                oracle.output(context, given, arguments[0])
        elif name == "evict" and engine._cache.pools[arguments[0]].num_pages:
            take_pages(engine, *arguments)
        elif name == "preempt":
            trajectory.preempt()
        elif name == "lose" and all(map(can_be_lost, trajectories)):
            jax.tree.map(lambda pool: pool.delete(), engine._cache.arrays)
            engine.cache_stats()  # cleans up
        elif name == "reload" and not any(gone(one, agents()[arguments[0]].content_hash) for one in trajectories):
            engine.unload_adapter(arguments[0])
            engine.load_adapter(arguments[0], agents()[arguments[0]])
            for one in contexts:
                oracle.forget(one, arguments[0])
        elif name == "fork":
            trajectories.append(trajectory.fork())
            contexts.append(context.fork())
        elif name == "switch":
            at = arguments[0] % len(trajectories)
        elif name == "rollback":
            count = min(arguments[0], len(context.ids))
            trajectory.rollback(count)
            context.rollback(len(context.ids) - count)
        elif name == "close" and len(trajectories) > 1:
            trajectories.pop(at).close()
            contexts.pop(at)
            at = arguments[0] % len(trajectories)
        assert trajectories[at].token_ids == contexts[at].ids
        poison_free_pages(engine)
    for trajectory in trajectories:
        trajectory.close()
    assert {name: pool.num_used for name, pool in engine._cache.pools.items()} == occupied
