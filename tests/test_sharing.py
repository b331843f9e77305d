"""The sharing modes: what is run, what is read, what it costs, and that the numbers are those of the design."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_oracle import Context, DenseOracle, host_params
from engines import CONFIG, OPTIONS, agents, tiny_engine, weights
from tolerances import assert_close

from lragent_jax import generation
from lragent_jax.models.adapter import LoraWeights, random_adapter, stack_adapters
from lragent_jax.models.adapter_bank import TARGETS
from lragent_jax.models.errors import InputError, OutOfPagesError
from lragent_jax.page_run import Span
from lragent_jax.sharing import SHARING_MODES, layers_to_recompute

GROUPS = {"plan": "a", "action": "a", "reflect": "b"}
QUESTION = [(7 * i + 3) % 128 for i in range(37)]
SPLIT_MODES = ("base", "base_lr", "pre_lr", "rebase")

# A small tour: who extends the context, and with what. Lengths cross pages (8) and chunks (8, 32).
TOUR = [("plan", [5, 9, 2, 77, 31]), ("action", [1, 2, 3]), ("reflect", [90] * 9), ("plan", [4]), (None, [8, 8])]


def walk(engine, tour=TOUR) -> list[np.ndarray]:
    """Logits of every recorded output of the tour, observations between them."""
    rows = []
    with engine.trajectory() as trajectory:
        trajectory.append(QUESTION)
        for agent, ids in tour:
            rows.append(engine.score(trajectory, ids, agent))
            trajectory.append([11, 12, 13])
    return rows


def leave_free(engine, **num_pages: int) -> dict[str, int]:
    """Takes pages away, by pool: as good as smaller pools, whose programs would have to be compiled for this alone."""
    for name, pool in engine._cache.pools.items():
        while pool.num_free > num_pages[name]:
            pool.allocate()
    return {name: pool.num_used for name, pool in engine._cache.pools.items()}


@pytest.mark.parametrize("targets", [("q", "v"), TARGETS], ids=["qv", "all seven"])
@pytest.mark.parametrize("mode", [mode for mode in SHARING_MODES if mode != "rebase"])
def test_an_agent_alone_sees_the_same_in_every_mode(mode, targets):
    """But in `rebase`, where even an agent that is alone reads what the base model has written."""
    alone = [("reflect", ids) for _, ids in TOUR]
    got = walk(tiny_engine(mode, agents(targets)), alone)
    want = walk(tiny_engine("none", agents(targets)), alone)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, "equal")


@pytest.mark.parametrize("mode", SHARING_MODES)
def test_adapters_that_add_nothing_share_for_free(mode):
    quiet = silent(agents())
    for a, b in zip(walk(tiny_engine(mode, quiet)), walk(tiny_engine("none", quiet)), strict=True):
        assert_close(a, b, "equal")


def test_modes_differ_where_agents_do():
    """The equalities above would hold, too, for modes that are all `none`."""
    walks = {mode: np.concatenate(walk(tiny_engine(mode))) for mode in SHARING_MODES}
    for mode in SHARING_MODES[1:]:
        assert np.abs(walks[mode] - walks["none"]).max() > 1e-3, mode


def test_stacked_adapters_turn_base_lr_into_pre_lr():
    names = list(agents())
    apart = [random_adapter(CONFIG, rank=4, targets=("q", "k", "v"), seed=i, scale=0.3) for i in range(len(names))]
    stacked = dict(zip(names, stack_adapters(apart), strict=True))
    got = walk(tiny_engine("base_lr", stacked))
    want = walk(tiny_engine("pre_lr", dict(zip(names, apart, strict=True))))
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, "equal")


@pytest.mark.parametrize("mode", SHARING_MODES)
def test_prefilled_tokens_are_those_the_mode_says(mode):
    engine = tiny_engine(mode)
    groups = GROUPS if mode in ("base_lr", "pre_lr") else {name: name for name in GROUPS}
    read: dict[str | None, int] = {}  # by whom the mode tells readers apart: how much of the context it has run
    with engine.trajectory() as trajectory:
        trajectory.append(QUESTION)
        for agent, ids in [item for item in TOUR if item[0]]:
            who = {"none": agent, "base": agent, "base_lr": groups[agent], "droidspeak": agent}.get(mode)
            out = engine.score_output(trajectory, ids, agent)
            length = len(trajectory) - len(ids)
            assert out.num_prefilled_tokens == length - read.get(who, 0) + (mode == "rebase")  # as a query
            assert out.num_cached_tokens == read.get(who, 0)
            read[who] = len(trajectory) - 1  # the token sampled last has not been run
            trajectory.append([11, 12, 13])


@pytest.mark.parametrize("mode", SHARING_MODES)
def test_bytes_are_those_of_the_formula(mode):
    engine = tiny_engine(mode)
    page, itemsize, tokens = OPTIONS["page_size"], 4, 64
    base = 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * itemsize
    low_rank = 2 * CONFIG.num_layers * 4 * itemsize  # r = 4 on k and v
    with engine.trajectory() as trajectory:
        trajectory.append([i % 128 for i in range(tokens)])
        for agent in GROUPS:
            engine.next_token_logits(trajectory, agent)
        stats = engine.cache_stats()
    bases = {"none": 3, "droidspeak": 1 / 2}.get(mode, 1)  # one of two layers
    recomputed = {"droidspeak": 3 / 2}.get(mode, 0)
    low_ranks = {"base": 3, "base_lr": 2, "pre_lr": 2, "rebase": 2}.get(mode, 0)
    assert stats.base.bytes_used == bases * tokens * base
    assert stats.recomputed.bytes_used == recomputed * tokens * base
    assert stats.low_rank.bytes_used == low_ranks * tokens * low_rank
    assert stats.bytes_used == ((bases + recomputed) * base + low_ranks * low_rank) * tokens
    assert stats.base.bytes_total == OPTIONS["num_pages"] * page * base * (1 / 2 if mode == "droidspeak" else 1)
    owners = 4 if recomputed else 0  # three agents, and the model without one
    assert stats.recomputed.bytes_total == owners * OPTIONS["num_pages"] * page * base / 2
    pools = jax.tree.leaves(engine._cache.arrays.base)
    assert sum(pool.nbytes for pool in pools) == stats.base.bytes_total + stats.recomputed.bytes_total
    assert engine.cache_stats().bytes_used == 0


def test_a_catch_up_in_base_changes_no_base_page():
    engine = tiny_engine("base")
    with engine.trajectory() as trajectory:
        trajectory.append(QUESTION)
        engine.next_token_logits(trajectory, "plan")
        before = jax.tree.map(np.asarray, engine._cache.arrays.base)
        low_rank_before = jax.tree.map(np.asarray, engine._cache.arrays.low_rank)
        engine.next_token_logits(trajectory, "action")
        after = jax.tree.map(np.asarray, engine._cache.arrays.base)
        jax.tree.map(np.testing.assert_array_equal, before, after)
        low_rank = jax.tree.map(np.asarray, engine._cache.arrays.low_rank)
        assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, low_rank_before, low_rank)))


@pytest.mark.parametrize("mode", SHARING_MODES)
def test_nothing_unwritten_is_ever_read(mode):
    clean, poisoned = tiny_engine(mode), tiny_engine(mode)
    poisoned._cache.arrays = jax.tree.map(lambda pool: jnp.full_like(pool, jnp.nan), poisoned._cache.arrays)
    for a, b in zip(walk(poisoned), walk(clean), strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_content_under_two_names_is_one_reader():
    twins = {"plan": agents()["plan"], "planner": dataclasses.replace(agents()["plan"], source="elsewhere")}
    engine = tiny_engine("none", twins)
    with engine.trajectory() as trajectory:
        trajectory.append(QUESTION)
        engine.next_token_logits(trajectory, "plan")
        assert engine.score_output(trajectory, [1], "planner").num_prefilled_tokens == 1


def test_writers_are_recorded():
    engine = tiny_engine("base_lr")
    with engine.trajectory() as trajectory:
        trajectory.append(QUESTION)
        engine.score(trajectory, [1, 2, 3], "plan")
        engine.score(trajectory, [4, 5], None)
        plan = agents()["plan"].content_hash
        assert trajectory.writers == [Span(0, 39, plan), Span(39, 41, None)]


def test_an_adapter_loaded_late_runs_only_what_its_group_lacks():
    engine = tiny_engine("pre_lr", {"plan": agents()["plan"]}, max_adapters=3)
    with engine.trajectory() as trajectory:
        trajectory.append(QUESTION)
        engine.next_token_logits(trajectory, "plan")
        engine.load_adapter("reflect", agents()["reflect"])
        engine.load_adapter("action", agents()["action"])
        trajectory.append([1, 2, 3, 4])
        assert engine.score_output(trajectory, [1, 2], "plan").num_prefilled_tokens == 4  # for every group
        late = engine.score_output(trajectory, [1], "reflect")
        assert late.num_prefilled_tokens == len(QUESTION) + 1  # what was there before it, and the last token
        assert engine.score_output(trajectory, [1], "action").num_prefilled_tokens == 1  # plan's A-group


@pytest.mark.parametrize("mode", SHARING_MODES)
def test_unloading_frees_what_nobody_else_reads(mode):
    engine = tiny_engine(mode)
    with engine.trajectory() as trajectory:
        trajectory.append(QUESTION)
        for agent in ("plan", "reflect"):
            engine.next_token_logits(trajectory, agent)
        before = engine.cache_stats()
        engine.unload_adapter("reflect")
        stats, pages = engine.cache_stats(), -(-len(QUESTION) // 8)
        assert before.base.pages_used - stats.base.pages_used == (pages if mode == "none" else 0)
        assert before.low_rank.pages_used - stats.low_rank.pages_used == (pages if mode in SPLIT_MODES else 0)
        assert before.recomputed.pages_used - stats.recomputed.pages_used == (pages if mode == "droidspeak" else 0)
        engine.load_adapter("reflect", agents()["reflect"])
        again = engine.next_token_logits(trajectory, "reflect")
    engine.unload_adapter("reflect")
    with engine.trajectory() as fresh:  # in pre_lr plan would write for reflect if that were loaded
        fresh.append(QUESTION)
        engine.next_token_logits(fresh, "plan")
        engine.load_adapter("reflect", agents()["reflect"])
        assert_close(again, engine.next_token_logits(fresh, "reflect"), "equal")


def silent(adapters):
    """The same adapters, B all zero."""
    return {
        name: dataclasses.replace(
            adapter, weights={at: LoraWeights(w.lora_a, 0 * w.lora_b) for at, w in adapter.weights.items()}
        )
        for name, adapter in adapters.items()
    }


@pytest.mark.parametrize("targets", [("q", "v"), TARGETS], ids=["qv", "all seven"])
@pytest.mark.parametrize(("recompute_layers", "same_as"), [((0, 1), "none"), ((), "full")])
def test_droidspeak_lies_between_none_and_full(recompute_layers, same_as, targets):
    engine = tiny_engine("droidspeak", agents(targets), recompute_layers=recompute_layers)
    assert engine.recomputed_layers == recompute_layers
    want = walk(tiny_engine(same_as, agents(targets)))
    for a, b in zip(walk(engine), want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_droidspeak_with_every_layer_or_none_counts_as_what_it_equals():
    for layers, same_as in [((0, 1), "none"), ((), "full")]:
        engine, other = tiny_engine("droidspeak", recompute_layers=layers), tiny_engine(same_as)
        counts = []
        for one in (engine, other):
            with one.trajectory() as trajectory:
                trajectory.append(QUESTION)
                counts.append([one.score_output(trajectory, [1, 2], agent).num_prefilled_tokens for agent in GROUPS])
                counts[-1].append(one.cache_stats().bytes_used)
        assert counts[0] == counts[1]


def test_a_catch_up_in_droidspeak_writes_the_chosen_layers_alone():
    engine = tiny_engine("droidspeak", recompute_layers=[1])
    with engine.trajectory() as trajectory:
        trajectory.append(QUESTION)
        engine.next_token_logits(trajectory, "plan")
        before = [np.asarray(pool) for pool in engine._cache.arrays.base.kv]
        assert engine.score_output(trajectory, [1], "action").num_prefilled_tokens == len(QUESTION)
        after = [np.asarray(pool) for pool in engine._cache.arrays.base.kv]
        np.testing.assert_array_equal(before[0], after[0])
        changed = (before[1] != after[1]).any(axis=(1, 2, 3))
        assert changed.sum() == -(-len(QUESTION) // 8), "pages of its own, and only those"
        assert engine.cache_stats().base.pages_used == changed.sum()


def test_layers_to_recompute_are_checked():
    assert layers_to_recompute(None, 30) == tuple(range(10))
    assert layers_to_recompute(None, 2) == (0,)
    assert tiny_engine("droidspeak", recompute_layers=np.array([1, 0, 1])).recomputed_layers == (0, 1)
    with pytest.raises(InputError, match="layer 2; the model has layers 0 to 1"):
        tiny_engine("droidspeak", recompute_layers=[0, 2])
    with pytest.raises(InputError, match="recompute_layers"):
        tiny_engine("droidspeak", recompute_layers=[-1])


def test_an_adapter_that_the_recomputed_pool_has_no_pages_for():
    """The pool was sized for those that were there before it: it takes pages of theirs, which are made again."""
    both = {name: agents()[name] for name in ("plan", "action")}
    engine = tiny_engine("droidspeak", both, max_adapters=3, num_recomputed_pages=144)
    roomy = tiny_engine("droidspeak", agents())
    leave_free(engine, base=8, low_rank=0, recomputed=12)
    with engine.trajectory() as trajectory, roomy.trajectory() as same:
        trajectory.append(QUESTION)
        same.append(QUESTION)
        expected = {agent: roomy.next_token_logits(same, agent) for agent in ("plan", "action", "reflect")}
        for agent in both:
            engine.next_token_logits(trajectory, agent)
        engine.load_adapter("reflect", agents()["reflect"])
        assert engine.cache_stats().recomputed.pages_free == 2
        for agent in ("reflect", "plan", "action"):
            assert_close(engine.next_token_logits(trajectory, agent), expected[agent], "equal")
            assert engine.cache_stats().recomputed.pages_free == 2


def test_a_call_that_even_an_empty_pool_does_not_hold_changes_nothing():
    engine = tiny_engine("droidspeak", agents(), num_recomputed_pages=144)
    leave_free(engine, base=8, low_rank=0, recomputed=4)
    with engine.trajectory() as trajectory:
        trajectory.append(QUESTION)
        stats = engine.cache_stats()
        for call in (engine.next_token_logits, functools.partial(engine.generate, max_new_tokens=3)):
            with pytest.raises(
                OutOfPagesError, match=r"5 more recomputed pages .* 4 of 144 are free: close.*larger num_recomputed_pa"
            ):
                call(trajectory, "reflect")
        assert engine.cache_stats() == stats


def pages_of(engine, trajectory):
    """What every page of a trajectory holds, by key, in the trajectory's order."""
    arrays = engine._cache.arrays
    pools = {"base": arrays.base, "low_rank": arrays.low_rank}
    return {
        (key.pool, key.owner): jax.tree.map(lambda pool, run=run: np.asarray(pool)[run.pages], pools[key.pool])
        for key, run in sorted(trajectory._runs.items(), key=str)
    }


def test_rebase_caches_what_the_base_model_leaves():
    """Whoever reads and generates: the same pages, base and low-rank, bit for bit, and nobody's name on them."""
    engines = [tiny_engine("rebase"), tiny_engine("rebase"), tiny_engine("pre_lr")]
    tours = [TOUR, [(None, ids) for _, ids in TOUR], [(None, ids) for _, ids in TOUR]]
    caches = []
    for engine, tour in zip(engines, tours, strict=True):
        with engine.trajectory() as trajectory:
            trajectory.append(QUESTION)
            for agent, ids in tour:
                engine.score(trajectory, ids, agent)
                trajectory.append([11, 12, 13])
            engine.next_token_logits(trajectory, tour[0][0])
            assert trajectory.writers == [Span(0, len(trajectory), None)]
            caches.append(pages_of(engine, trajectory))
    assert len(caches[0]) == 3, "the base cache and two A-groups"
    for other in caches[1:]:
        jax.tree.map(np.testing.assert_array_equal, caches[0], other)


def test_rebase_decodes_what_it_scores_and_caches_what_the_base_model_leaves():
    engine = tiny_engine("rebase")
    with engine.trajectory() as a, engine.trajectory() as b, engine.trajectory() as c:
        for trajectory in (a, b, c):
            trajectory.append(QUESTION)
        ids = engine.generate(a, "plan", max_new_tokens=11, ignore_eos=True).token_ids
        assert engine.score(b, ids, "plan").argmax(axis=1).tolist() == ids
        engine.next_token_logits(c.append(ids), None)  # the base model alone reads the same ids
        for agent in ("plan", "reflect", None):
            logits = [engine.next_token_logits(trajectory, agent) for trajectory in (a, b, c)]
            assert_close(logits[0], logits[2], "equal")
            assert_close(logits[1], logits[2], "equal")


def test_a_query_of_rebase_leaves_no_trace():
    """It runs beside pages of another A-group that lack its token, and must not claim to have written them."""
    engine = tiny_engine("rebase")
    with engine.trajectory() as trajectory:
        trajectory.append(QUESTION)
        engine.next_token_logits(trajectory, "plan")
        engine.unload_adapter("reflect")
        engine.load_adapter("reflect", agents()["reflect"])
        assert engine.score_output(trajectory, [1], "plan").num_prefilled_tokens == 1
        assert engine.score_output(trajectory.rollback(1), [1], "reflect").num_prefilled_tokens == len(QUESTION) + 1


def test_only_the_rows_without_adapter_write_in_a_decode_step():
    """Were both rows of a token to write, which of them stays would be up to the device."""
    engine = tiny_engine("rebase")
    with engine.trajectory() as trajectory:
        trajectory.append(QUESTION)
        row = engine._executor.open_row(trajectory, engine._registry.find("plan"))
        table = engine._executor.decode_table([row, row])
        both = jax.tree.map(np.asarray, generation._readers_and_writers(jax.tree.map(jnp.asarray, table)))
    assert (both.base_write_from[:2] == generation.NEVER).all()
    assert (both.low_rank_write_from[:, :2] == generation.NEVER).all()
    for half in (slice(0, 2), slice(2, 4)):
        np.testing.assert_array_equal(both.base[half], table.base)
        np.testing.assert_array_equal(both.low_rank[:, half], table.low_rank)
        np.testing.assert_array_equal(both.group_ids[:, half], table.group_ids)
    assert (both.base_write_from[2:] == 0).all()
    assert (both.low_rank_write_from[:, 2:] == 0).all()


def test_rebase_of_silent_adapters_is_the_base_model():
    want = walk(tiny_engine("none"), [(None, ids) for _, ids in TOUR])
    for a, b in zip(walk(tiny_engine("rebase", silent(agents()))), want, strict=True):
        assert_close(a, b, "equal")


def test_rebase_counts_the_query():
    engine = tiny_engine("rebase")
    with engine.trajectory() as trajectory:
        trajectory.append(QUESTION)
        counts = []
        for agent in ("plan", "plan", "reflect", None):
            out = engine.generate(trajectory, agent, max_new_tokens=1)
            counts.append((out.num_prefilled_tokens, out.num_cached_tokens))
        first = len(QUESTION)
        assert counts == [(first + 1, 0), (2, first), (2, first + 1), (1, first + 2)]
        out = engine.score_output(trajectory.rollback(1), [1], "plan")
        assert (out.num_prefilled_tokens, out.num_cached_tokens) == (1, first + 2), "nothing new: a query alone"
        engine.unload_adapter("reflect")  # or the bank would grow, and everything compile
        engine.load_adapter("critic", random_adapter(CONFIG, rank=4, targets=("k", "v"), seed=9))
        late = engine.score_output(trajectory, [1], "critic")
        assert late.num_prefilled_tokens == len(trajectory) - 1 + 1


def test_droidspeak_gives_the_logits_of_the_dense_oracle():
    """With its first layer recomputed, the default here; any history is played with the other."""
    oracle, context = DenseOracle(CONFIG, host_params(weights()[1]), agents(), GROUPS, "droidspeak", (0,)), Context([])
    context.ids += QUESTION
    for got, (agent, ids) in zip(walk(tiny_engine("droidspeak")), TOUR, strict=True):
        assert_close(got, oracle.output(context, ids, agent)[0], "oracle")
        context.ids += [11, 12, 13]
