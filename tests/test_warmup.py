"""Warming up: which programs, each compiled once, several at a time; and layers that share one trace."""

import collections
import dataclasses
import gc
import threading
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import CONFIG, agents, tiny_engine
from flax import nnx
from jax import monitoring

from lragent_jax import generation
from lragent_jax.compile_watch import CompileWatch
from lragent_jax.engine import Engine
from lragent_jax.models.adapter_bank import LoraPair
from lragent_jax.models.errors import InputError
from lragent_jax.models.llama import Block, random_params
from lragent_jax.models.packed_rows import PackedRows
from lragent_jax.sampling_params import SamplingParams
from lragent_jax.warmup import Warmup, collector_paused, compile_side_by_side


@pytest.fixture
def compilations():
    """The names of the threads that compile, by what they compile."""
    found = collections.defaultdict(list)

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            found[str(kwargs["fun_name"]).removeprefix("jit(").removesuffix(")")].append(
                threading.current_thread().name
            )

    monitoring.register_event_duration_secs_listener(listen)
    yield found
    monitoring.unregister_event_duration_listener(listen)


def test_every_program_is_compiled_once_in_threads_and_none_where_it_runs(compilations):
    engine = tiny_engine("none", num_pages=73, prefill_buckets=(41,))  # passes that no other test has
    times = engine.warmup()
    names = ("prefill", "decode", "begin", "unembed")
    # A chunk is scored, or only its last token is asked for; a first token is drawn, or it is the likeliest.
    assert times.num_programs == len(names) + 2
    assert [len(compilations[name]) for name in names[:2]] == [2, 1]
    assert len(compilations["begin"]) <= 2, "another test may have had the same"
    assert len(compilations["unembed"]) <= 1
    assert all(thread.startswith("compile") for name in names for thread in compilations[name])
    assert min(times[1:]) >= 0
    compilations.clear()
    engine.generate([[1, 2, 3]] * 2, "plan", max_new_tokens=2)
    assert len(compilations["decode"]) == 1, "it notices a program that is missing"


def warmup(engine, batch_sizes=(1,), **options) -> Warmup:
    return Warmup(engine._executor, batch_sizes, **options)


def test_contexts_that_run_alone_say_the_same(monkeypatch):
    prompts = [[7, 3, 5, 9, 2], [8, 1, 6, 4, 3], [2, 2, 9, 5, 1]]
    together, alone = tiny_engine("base_lr"), tiny_engine("base_lr", prefill_batch_size=1)
    want = [out.token_ids for out in together.generate(prompts, "plan", max_new_tokens=3, ignore_eos=True)]
    alone.warmup(4, scoring=False)
    sizes, run_chunks = [], alone._executor.run_chunks

    def counting(rows, chunks):
        sizes.append(len(rows))
        return run_chunks(rows, chunks)

    monkeypatch.setattr(alone._executor, "run_chunks", counting)
    with CompileWatch() as watch:
        outputs = alone.generate(prompts, "plan", max_new_tokens=3, ignore_eos=True)
    assert [out.token_ids for out in outputs] == want
    assert (sizes, watch.num_programs) == ([1, 1, 1], 0)
    assert alone.with_sharing("base", max_batch_size=16)._executor.prefill_batch_size == 1
    assert together.with_sharing("base", max_batch_size=5)._executor.prefill_batch_size == 8


def test_few_rows_decode_in_the_program_of_many():
    prompts = [[7, 3, 5, 9, 2], [8, 1, 6, 4, 3], [2, 2, 9, 5, 1]]
    want = [out.token_ids for out in tiny_engine("base_lr").generate(prompts, "plan", max_new_tokens=6)]
    engine = tiny_engine("base_lr", min_batch_size=6, max_batch_size=8)
    assert {shape.batch for shape in warmup(engine, (1, 2, 4, 8)).decodes} == {8}
    engine.warmup(8, scoring=False)
    with CompileWatch() as watch:
        assert [engine.generate(prompt, "plan", max_new_tokens=6).token_ids for prompt in prompts] == want
    assert watch.num_programs == 0


def test_a_batch_shrinks_to_the_smallest_when_few_are_left():
    sizes = []
    engine = tiny_engine("full", min_batch_size=2, max_batch_size=16, num_pages=96, decode_block=1)
    decode = engine._executor.decode

    def counting(batch, num_steps):
        sizes.append(len(batch.slot_ids))
        return decode(batch, num_steps)

    engine._executor.decode = counting
    params = [SamplingParams(max_new_tokens=8 if i == 0 else 3, ignore_eos=True) for i in range(9)]
    engine.generate([[7, 3, 5 + i] for i in range(9)], "plan", params)
    assert sizes[0] == 16
    assert sizes[-1] == 2, "one row is an eighth of 16 or less"
    assert set(sizes) == {16, 2}


def test_what_a_warm_up_leaves_out():
    def prefills(warmup: Warmup) -> list[tuple[int, int, bool]]:
        return [(each.shape.batch, each.num_tokens, each.write_base) for each in warmup.prefills if not is_scored(each)]

    def is_scored(prefill) -> bool:
        return str(prefill).startswith("scored")

    engine = tiny_engine("base", prefill_tokens=64)
    every = warmup(engine, (1, 3)).prefills
    scored = [each for each in every if is_scored(each)]
    assert [(each.shape.batch, each.num_tokens) for each in scored] == [(1, 32)] * 2  # alone, and long enough
    assert {each.num_tokens for each in every if each.last_only} == {32}
    assert not any(is_scored(each) for each in warmup(engine, scoring=False).prefills)
    both = [(1, 8, True), (1, 8, False), (1, 32, True), (1, 32, False)]
    assert prefills(warmup(engine)) == both
    of_three = [(4, 8, True), (4, 8, False)]  # 4 x 32 are more than the budget
    assert prefills(warmup(engine, (1, 3))) == both + of_three
    assert [shape.batch for shape in warmup(engine, (1, 2, 64, 1000)).decodes] == [1, 2, 64]
    alone = warmup(tiny_engine("base", prefill_tokens=64, prefill_batch_size=1), (4,))
    assert (prefills(alone), [shape.batch for shape in alone.decodes]) == (both, [4])
    assert [what for what, _ in alone.programs() if "sampling" in what] == ["sampling of 1 rows"]
    assert prefills(warmup(tiny_engine("base", prefill_tokens=64, prefill_batch_size=3), (4,)))[-1][0] == 2
    assert sum(what.startswith("scores") for what, _ in warmup(engine).programs()) == 2
    assert not any(what.startswith("scores") for what, _ in warmup(engine, scoring=False).programs())
    one_group = {name: agents()[name] for name in ("plan", "action")}
    assert prefills(warmup(tiny_engine("base_lr", one_group))) == [(1, 8, True), (1, 32, True)]
    of_other_groups = prefills(warmup(tiny_engine("base_lr")))
    assert of_other_groups == both + both  # two groups: low-rank pages alone, and those of both at a time


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size must be a positive integer, not 0"),
        ({"max_batch_size": -3}, "max_batch_size must be a positive integer, not -3"),
        ({"max_batch_size": "1"}, "max_batch_size must be a positive integer, not '1'"),
        ({"max_tokens": -1}, "max_tokens must be a positive integer, not -1"),
        ({"max_tokens": 2.5}, "max_tokens must be a positive integer, not 2.5"),
        ({"batch_sizes": (1, 0)}, "a size in batch_sizes must be a positive integer, not 0"),
        ({"batch_sizes": 4}, "batch_sizes is a list of numbers of rows, not 4"),
    ],
)
def test_sizes_that_are_none(arguments, message):
    with pytest.raises(InputError, match=message):
        tiny_engine("full").warmup(**arguments, scoring=False)


def test_tables_are_as_wide_as_contexts_and_one_row_needs_one_width():
    engine = tiny_engine("none")
    engine._executor.table_widths = (16, 64, 256)

    def widths(*args, **options) -> list[tuple[int, int]]:
        return [(shape.batch, shape.width) for shape in warmup(engine, *args, **options).decodes]

    assert widths((1, 2)) == [(1, 256), (2, 16), (2, 64), (2, 256)]
    assert widths((1, 2), max_tokens=16 * 8) == [(1, 256), (2, 16)]
    assert widths((2,), max_tokens=16 * 8 + 1) == [(2, 16), (2, 64)]
    assert widths((2,), max_tokens=10**9) == [(2, 16), (2, 64), (2, 256)]
    rows = [engine._executor.open_row(engine.trajectory().append([1, 2]), engine._registry.find("plan"))] * 2
    assert engine._executor.decode_table(rows[:1]).base.shape == (1, 256)
    assert engine._executor.decode_table(rows).base.shape == (2, 16)


def test_one_group_rebuilds_low_rank_pages_alone_without_a_program_for_it():
    adapters = {name: agents()[name] for name in ("plan", "action")}
    engine = tiny_engine("base_lr", adapters)
    trajectory = engine.trajectory().append(range(40))
    want = engine.next_token_logits(trajectory, "plan")
    row = engine._executor.open_row(trajectory, engine._registry.find("plan"))
    (low_rank,), held = row.low_rank_runs, [np.array(pool) for pool in engine._cache.arrays.base.kv]
    low_rank.give_up(range(len(low_rank.pages)))
    assert low_rank.missing(40) == [(0, 40)]
    assert row.base_run.missing(40) == []
    engine._cache.arrays = dataclasses.replace(  # what was on the pages that are gone must not be what is found
        engine._cache.arrays, low_rank=jax.tree.map(jnp.zeros_like, engine._cache.arrays.low_rank)
    )
    np.testing.assert_array_equal(engine.next_token_logits(trajectory, "plan"), want)
    for before, after in zip(held, engine._cache.arrays.base.kv, strict=True):
        np.testing.assert_array_equal(np.asarray(after), before)


def fake(compile) -> Any:
    """What a lowered program is to the code under test."""
    return lambda: types.SimpleNamespace(compile=compile)


def test_compilations_meet_each_other_and_progress_is_told_from_one_thread():
    meeting = threading.Barrier(2, timeout=60)
    told = []
    compile_side_by_side(
        [(name, fake(meeting.wait)) for name in "ab"],
        lambda done, what: told.append((done, what, threading.current_thread())),
    )
    assert told[0] == (0, "a", threading.current_thread())
    assert [done for done, _, _ in told[-2:]] == [1, 2]
    assert {thread for _, _, thread in told} == {threading.current_thread()}


def test_what_a_compiler_raises_is_raised_and_the_rest_is_not_begun():
    begun, may_go = [], threading.Event()

    def fails():
        raise MemoryError("too large")

    def waits():
        begun.append(1)
        may_go.wait(60)

    programs = [("fails", fake(fails))]
    programs += [(f"waits {i}", fake(waits)) for i in range(100)]
    done = threading.Timer(0.5, may_go.set)
    done.start()
    with pytest.raises(MemoryError, match="too large"):
        compile_side_by_side(programs, lambda done, what: None)
    assert len(begun) < 100


FIVE_LAYERS = dataclasses.replace(CONFIG, num_layers=5)


def count_calls(monkeypatch, name: str) -> list:
    calls, original = [], getattr(Block, name)

    def counting(self, *args, **kwargs):
        calls.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Block, name, counting)
    return calls


def test_layers_share_one_trace_and_one_function(monkeypatch):
    calls = count_calls(monkeypatch, "__call__")
    engine = Engine(FIVE_LAYERS, *random_params(FIVE_LAYERS, "float32"), {}, sharing="none", num_pages=29, page_size=8)
    executor = engine._executor
    table = executor.blank_table(1, executor.widths(1)[0], 0)
    for num_tokens, alike in ((8, 5), (32, 4)):  # of a long chunk the last layer is another function
        calls.clear()
        tokens = np.zeros((1, num_tokens), np.int32)
        args, options = executor.prefill_arguments(tokens, np.zeros(1, np.int32), table, True, last_only=True)
        text = generation.prefill.lower(*args, **options).as_text()
        assert len(calls) == 1 + (alike < 5)
        assert text.count("func.func private @run_block") == 1
        assert text.count("call @run_block(") == alike
        assert text.count("call @run_last_block(") == 5 - alike


@pytest.mark.parametrize("saveable", [None, jax.checkpoint_policies.dots_saveable])
def test_layers_share_one_trace_in_training(monkeypatch, saveable):
    calls = count_calls(monkeypatch, "packed")
    graphdef, params = random_params(FIVE_LAYERS, "float32")
    tokens = jnp.arange(7)[None]
    rows = PackedRows(tokens, tokens, jnp.ones_like(tokens))
    pair = LoraPair(jnp.ones((1, FIVE_LAYERS.width, 2)), jnp.ones((1, 2, FIVE_LAYERS.width)))

    def loss(pairs):
        return nnx.merge(graphdef, params).packed(rows, pairs, saveable=saveable).sum()

    gradients = jax.eval_shape(jax.grad(loss), tuple({"q": pair} for _ in range(5)))
    assert len(gradients) == 5
    assert len(calls) == 1


def test_the_collector_pauses_while_programs_are_lowered_and_no_longer():
    seen = []

    def lower():
        seen.append(gc.isenabled())
        return jax.jit(lambda x: x + 1).lower(jnp.zeros(3))

    compile_side_by_side([("one", lower)], lambda done, what: None)
    assert seen == [False]
    assert gc.isenabled()

    def broken() -> jax.stages.Lowered:
        raise TypeError("no program")

    with pytest.raises(TypeError, match="no program"):
        compile_side_by_side([("none", broken)], lambda done, what: None)
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
