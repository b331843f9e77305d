"""What users rely on when they call the engine: who joins what, where outputs end, and what is refused."""

import threading
from typing import Any

import jax
import numpy as np
import pytest
from engines import BOS, CONFIG, agents, ascii_tokenizer, tiny_engine
from tolerances import assert_close

from lragent_jax.engine import Engine
from lragent_jax.models.adapter import random_adapter
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import (
    AdapterError,
    ConfigError,
    InputError,
    OutOfPagesError,
    TrajectoryBusyError,
    TrajectoryClosedError,
)
from lragent_jax.sampling_params import SamplingParams
from lragent_jax.sharing import SHARING_MODES

QUESTION = [(7 * i + 3) % 128 for i in range(21)]


@pytest.fixture
def engine() -> Engine:
    return tiny_engine("base_lr", tokenizer=ascii_tokenizer(), prefix_cache=True)


# How a token is run, written and read, in every way there is.
KINDS = ("base_lr", "rebase", "droidspeak")


def all_free(engine: Engine) -> bool:
    return engine.cache_stats().bytes_used == 0


# Generation.


def test_generated_tokens_join_and_the_last_one_is_run_by_the_next_reader(engine):
    trajectory = engine.trajectory().append(QUESTION)
    first = engine.generate(trajectory, "plan", max_new_tokens=5)
    assert trajectory.token_ids == QUESTION + first.token_ids
    assert (first.num_prefilled_tokens, first.num_cached_tokens) == (21, 0)
    second = engine.generate(trajectory, "action", max_new_tokens=5)
    assert (second.num_prefilled_tokens, second.num_cached_tokens) == (1, 25)
    assert first.finish_reason == second.finish_reason == "length"
    assert 0 < first.ttft_s <= first.latency_s


@pytest.mark.parametrize("mode", KINDS)
def test_generation_is_scoring_one_token_after_the_other(mode):
    engine = tiny_engine(mode)
    a = engine.trajectory().append(QUESTION)
    b = engine.trajectory().append(QUESTION)
    out = engine.generate(a, "reflect", max_new_tokens=11)
    logits = engine.score(b, out.token_ids, "reflect")
    assert logits.argmax(axis=1).tolist() == out.token_ids
    assert_close(engine.next_token_logits(a, "plan"), engine.next_token_logits(b, "plan"), "equal")


def test_text_is_tokenised_piece_by_piece_with_one_bos(engine):
    trajectory = engine.trajectory().append("ab").append("c")
    assert trajectory.token_ids == [BOS, 97, 98, 99]
    trajectory.rollback(4)
    assert trajectory.append("c").token_ids == [BOS, 99]


def test_eos_ends_without_joining(engine):
    free = engine.generate(QUESTION, "plan", max_new_tokens=8)
    stop = free.token_ids[4]
    trajectory = engine.trajectory().append(QUESTION)
    out = engine.generate(trajectory, "plan", max_new_tokens=8, stop_token_ids=[stop])
    kept = free.token_ids[: free.token_ids.index(stop)]
    assert (out.token_ids, out.finish_reason) == (kept, "stop")
    assert trajectory.token_ids == QUESTION + kept
    # Everything in front of the stop id has been run: the next reader runs the last token as a query only.
    assert engine.generate(trajectory, "plan", max_new_tokens=1).num_prefilled_tokens == 1


@pytest.mark.parametrize(
    ("mode", "decode_block"), [("base_lr", 1), ("base_lr", 3), ("base_lr", 16), ("rebase", 16), ("droidspeak", 16)]
)
def test_a_stop_string_leaves_the_same_state_whatever_the_block(mode, decode_block):
    engine = tiny_engine(mode, tokenizer=ascii_tokenizer(), decode_block=decode_block)
    free = engine.generate(QUESTION, "plan", max_new_tokens=12)
    assert free.text is not None
    stop = free.text[5:7]
    trajectory = engine.trajectory().append(QUESTION)
    out = engine.generate(trajectory, "plan", max_new_tokens=12, stop=[stop])
    end = free.text.index(stop)
    assert (out.text, out.finish_reason) == (free.text[:end], "stop")
    assert trajectory.token_ids == QUESTION + free.token_ids[: end + 2]
    assert [(span.start, span.stop) for span in trajectory.writers] == [(0, len(trajectory) - 1)]
    pages = -(-(len(trajectory) - 1) // 8)
    stats = engine.cache_stats()
    assert stats.base.pages_used == pages, "what was decoded beyond the stop holds pages"
    assert stats.recomputed.pages_used == (pages if mode == "droidspeak" else 0)
    assert stats.low_rank.pages_used == {"base_lr": 1, "rebase": 2, "droidspeak": 0}[mode] * pages


@pytest.mark.parametrize("decode_block", [1, 4])
def test_streaming_is_generating(decode_block):
    engine = tiny_engine("base_lr", tokenizer=ascii_tokenizer(), decode_block=decode_block)
    want = engine.generate(QUESTION, "plan", max_new_tokens=11)
    trajectory = engine.trajectory().append(QUESTION)
    pieces = list(engine.stream(trajectory, "plan", max_new_tokens=11))
    assert "".join(piece.text for piece in pieces) == want.text
    assert [i for piece in pieces for i in piece.token_ids] == want.token_ids
    assert len(pieces) > 2
    assert pieces[-1].output is not None
    assert pieces[-1].output.token_ids == want.token_ids
    assert trajectory.token_ids == QUESTION + want.token_ids


def test_a_stream_that_cannot_be_is_refused_before_its_first_piece(engine):
    with pytest.raises(AdapterError, match="nobody"):
        engine.stream(QUESTION, "nobody")
    with pytest.raises(InputError, match="max_new_tokens"):
        engine.stream(QUESTION, "plan", max_new_tokens=0)


def test_a_stream_that_is_left_keeps_what_it_gave(engine):
    trajectory = engine.trajectory().append(QUESTION)
    stream = engine.stream(trajectory, "plan", max_new_tokens=30)
    shown = next(stream).token_ids + next(stream).token_ids
    stream.close()
    assert trajectory.token_ids == QUESTION + shown
    assert engine.generate(trajectory, "plan", max_new_tokens=1).num_prefilled_tokens == 1


@pytest.mark.parametrize("mode", KINDS)
def test_a_list_is_a_batch_and_batching_changes_nothing(mode):
    engine = tiny_engine(mode, tokenizer=ascii_tokenizer())
    prompts = [QUESTION, QUESTION[:5], "hello", QUESTION[::-1]]
    names = ["plan", None, "reflect", "action"]
    params = SamplingParams(max_new_tokens=7, temperature=0.8, seed=3)
    together = engine.generate(prompts, names, params)
    for prompt, name, out in zip(prompts, names, together, strict=True):
        alone = engine.generate(prompt, name, params)
        assert (out.token_ids, out.text) == (alone.token_ids, alone.text)
    assert engine.generate([], "plan") == []
    assert all_free(engine)


def test_rows_of_a_batch_may_differ_in_parameters(engine):
    params = [SamplingParams(max_new_tokens=2), SamplingParams(max_new_tokens=9)]
    outs = engine.generate([QUESTION, QUESTION], "plan", params)
    assert [len(out.token_ids) for out in outs] == [2, 9]
    assert outs[1].token_ids[:2] == outs[0].token_ids


def test_agents_side_by_side_take_forks(engine):
    trajectory = engine.trajectory().append(QUESTION)
    engine.next_token_logits(trajectory, "plan")
    forks = [trajectory.fork() for _ in range(3)]
    outs = engine.generate(forks, ["plan", "action", "reflect"], max_new_tokens=4)
    assert [out.num_prefilled_tokens for out in outs] == [1, 1, 21]
    assert trajectory.token_ids == QUESTION
    assert forks[1].token_ids == QUESTION + outs[1].token_ids
    for member in (trajectory, *forks):
        member.close()
    assert all_free(engine)


def test_sampling_is_repeatable_and_seeded(engine):
    def sampled(seed: int) -> list[int]:
        return engine.generate(QUESTION, "plan", max_new_tokens=8, temperature=1.5, seed=seed).token_ids

    assert sampled(1) == sampled(1)
    assert len({tuple(sampled(seed)) for seed in range(4)}) > 1


def test_a_folder_without_a_tokenizer_serves_ids():
    out = tiny_engine("base_lr").generate(QUESTION, "plan", max_new_tokens=3)
    assert out.text is None
    assert len(out.token_ids) == 3


def test_the_context_ends_generation():
    engine = tiny_engine("full", tokenizer=ascii_tokenizer(), num_pages=CONFIG.context_length // 8)
    trajectory = engine.trajectory().append([5] * (CONFIG.context_length - 3))
    out = engine.generate(trajectory, "plan", max_new_tokens=50)
    assert (len(out.token_ids), out.finish_reason) == (3, "length")
    with pytest.raises(InputError, match="fills the model's context"):
        engine.generate(trajectory, "plan")
    assert engine.next_token_logits(trajectory, "plan").shape == (CONFIG.vocab_size,)


# Trajectories.


def test_a_dropped_trajectory_returns_its_pages(engine):
    trajectory = engine.trajectory().append(QUESTION)
    engine.next_token_logits(trajectory, "plan")
    assert not all_free(engine)
    del trajectory
    assert all_free(engine)


def test_a_closed_trajectory_refuses_everything(engine):
    trajectory = engine.trajectory().append(QUESTION)
    trajectory.close()
    trajectory.close()
    for call in (
        lambda: trajectory.append([1]), lambda: trajectory.fork(), lambda: trajectory.rollback(1),
        lambda: engine.generate(trajectory, "plan"), lambda: engine.score(trajectory, [1]),
        lambda: engine.next_token_logits(trajectory),
    ):  # fmt: skip
        with pytest.raises(TrajectoryClosedError):
            call()


def test_a_second_call_on_one_trajectory_raises(engine):
    trajectory = engine.trajectory().append(QUESTION)
    stream = engine.stream(trajectory, "plan", max_new_tokens=8)
    next(stream)
    for call in (
        lambda: engine.generate(trajectory, "action"), lambda: trajectory.append([1]), lambda: trajectory.fork(),
        lambda: trajectory.rollback(1), lambda: trajectory.close(), lambda: engine.unload_adapter("plan"),
        lambda: engine.generate([engine.trajectory().append([1]), trajectory], "plan"),
    ):  # fmt: skip
        with pytest.raises(TrajectoryBusyError):
            call()
    assert engine.agents == ["plan", "action", "reflect"]
    rest = list(stream)
    assert len(trajectory) == 29
    assert rest[-1].output is not None


def test_the_same_trajectory_twice_in_a_batch_raises(engine):
    trajectory = engine.trajectory().append(QUESTION)
    with pytest.raises(TrajectoryBusyError, match="fork"):
        engine.generate([trajectory, trajectory], ["plan", "action"])
    assert trajectory.token_ids == QUESTION


def test_threads_take_turns(engine):
    want = engine.generate(QUESTION, "plan", max_new_tokens=6).token_ids
    got = []

    def work():
        got.append(engine.generate(QUESTION, "plan", max_new_tokens=6).token_ids)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [want] * 4
    assert all_free(engine)


@pytest.mark.parametrize("mode", KINDS)
def test_a_lost_cache_is_made_again_and_read_again(mode):
    """Ctrl-C between handing the cache to a program and taking it back leaves no arrays."""
    engine = tiny_engine(mode)
    trajectory = engine.trajectory().append(QUESTION)
    want = engine.generate(trajectory.fork(), "plan", max_new_tokens=5).token_ids
    engine.next_token_logits(trajectory, "plan")
    jax.tree.map(lambda pool: pool.delete(), engine._cache.arrays)
    out = engine.generate(trajectory, "plan", max_new_tokens=5)
    assert (out.token_ids, out.num_prefilled_tokens) == (want, len(QUESTION) + (mode == "rebase"))
    trajectory.close()
    assert all_free(engine)


def test_a_failure_on_the_device_rolls_the_call_back(engine, monkeypatch):
    trajectory = engine.trajectory().append(QUESTION)
    want = engine.generate(trajectory.fork(), "plan", max_new_tokens=9).token_ids

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._executor, "decode", fail)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(trajectory, "plan", max_new_tokens=9)
        patch.setattr(engine._executor, "unembed", fail)
        with pytest.raises(KeyboardInterrupt):
            engine.score(trajectory, [1, 2, 3], "plan")
    assert trajectory.token_ids == QUESTION
    assert engine.generate(trajectory, "plan", max_new_tokens=9).token_ids == want


def test_the_last_piece_of_a_stream_lets_the_trajectory_go(engine):
    trajectory = engine.trajectory().append(QUESTION)
    for piece in engine.stream(trajectory, "plan", max_new_tokens=5):
        if piece.output:
            assert trajectory.append([1, 2]).token_ids == QUESTION + piece.output.token_ids + [1, 2]


def test_a_stream_the_collector_closes_inside_another_call_waits(engine, monkeypatch):
    forgotten = engine.trajectory().append(QUESTION)
    stream = engine.stream(forgotten, "plan", max_new_tokens=30)
    shown = next(stream).token_ids
    want = engine.generate(QUESTION, "action", max_new_tokens=9).token_ids
    decode = engine._executor.decode

    def collected(*args):
        stream.close()
        return decode(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine._executor, "decode", collected)
        assert engine.generate(QUESTION, "action", max_new_tokens=9).token_ids == want
    assert engine.generate(QUESTION, "plan", max_new_tokens=2).token_ids
    assert forgotten.token_ids == QUESTION + shown
    forgotten.close()
    assert all_free(engine)


def test_forks_of_one_batch_fit_where_they_fit():
    engine = tiny_engine("full", num_pages=5)
    trajectory = engine.trajectory().append(QUESTION)  # three pages
    engine.next_token_logits(trajectory)
    fork = trajectory.fork()
    outs = engine.generate([trajectory, fork], [None, None], max_new_tokens=3)  # one copy of the last page
    assert outs[0].token_ids == outs[1].token_ids
    assert engine.cache_stats().base.pages_used == 4


# Adapters.


def test_a_load_that_fails_changes_nothing(engine, monkeypatch):
    trajectory = engine.trajectory().append(QUESTION)
    want = engine.next_token_logits(trajectory, "plan")

    def full(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    with monkeypatch.context() as patch:
        patch.setattr(jax.numpy, "pad", full)
        with pytest.raises(OutOfPagesError, match="low-rank"):
            engine.load_adapter("critic", random_adapter(CONFIG, rank=16, targets=("v",), seed=9))
    assert engine.agents == ["plan", "action", "reflect"]
    assert_close(engine.next_token_logits(trajectory, "plan"), want, "equal")
    engine.load_adapter("critic", random_adapter(CONFIG, rank=16, targets=("v",), seed=9))


def test_an_agent_unloaded_meanwhile_is_missed_and_others_keep_their_rows(monkeypatch):
    engine = tiny_engine("none")
    want = engine.generate(QUESTION, "action", max_new_tokens=4).token_ids
    room = engine.caller.room

    def unload_first(trajectory):
        if "plan" in engine.agents:
            engine._registry.remove("plan")  # what another thread would do between the checks and the run
        return room(trajectory)

    monkeypatch.setattr(engine.caller, "room", unload_first)
    assert engine.generate(QUESTION, "action", max_new_tokens=4).token_ids == want


def test_loading_and_unloading_an_agent():
    engine = tiny_engine("base_lr")
    critic = random_adapter(CONFIG, rank=6, targets=("v", "down"), seed=9, scale=0.5)
    before = engine.generate(QUESTION, "plan", max_new_tokens=6).token_ids
    engine.load_adapter("critic", critic)
    assert engine.agents[-1] == "critic"
    alone = tiny_engine("none", {"critic": critic}).generate(QUESTION, "critic", max_new_tokens=6)
    assert engine.generate(QUESTION, "critic", max_new_tokens=6).token_ids == alone.token_ids
    engine.unload_adapter("critic")
    assert engine.generate(QUESTION, "plan", max_new_tokens=6).token_ids == before
    with pytest.raises(AdapterError, match="unknown agent 'critic'"):
        engine.generate(QUESTION, "critic")


@pytest.mark.parametrize("mode", [mode for mode in SHARING_MODES if mode != "full"])
def test_a_larger_rank_and_new_targets_grow_the_cache_and_keep_what_is_in_it(mode):
    small = {"plan": random_adapter(CONFIG, rank=2, targets=("v",), seed=1, scale=0.5)}
    engine = tiny_engine(mode, small, num_low_rank_pages=None)
    trajectory = engine.trajectory().append(QUESTION)
    before = engine.next_token_logits(trajectory, "plan")
    engine.load_adapter("reflect", agents()["reflect"])  # rank 4 on q, k and v
    assert engine.score_output(trajectory, [1], "plan").num_prefilled_tokens == 1
    trajectory.rollback(1)
    assert_close(engine.next_token_logits(trajectory, "plan"), before, "equal")
    fresh = engine.trajectory().append(QUESTION)
    want = logits_alone("reflect", QUESTION, "rebase" if mode == "rebase" else "none")
    assert_close(engine.next_token_logits(fresh, "reflect"), want, "equal")


def logits_alone(agent: str, ids: list[int], mode: str) -> np.ndarray:
    engine = tiny_engine(mode)
    return engine.next_token_logits(engine.trajectory().append(ids), agent)


# What is refused: an error of ours that names the matter, nothing changed, the engine usable.


def refused(engine: Engine, error: type[Exception], match: str, call) -> None:
    before = engine.cache_stats()
    with pytest.raises(error, match=match):
        call()
    assert engine.cache_stats() == before
    assert len(engine.generate(QUESTION, "plan", max_new_tokens=2).token_ids) == 2


def test_an_implementation_that_does_not_fit_is_the_callers_to_change():
    engine = tiny_engine("base_lr", implementation="pallas_mosaic_gpu")
    for _ in range(2):
        with pytest.raises(
            InputError, match=r"implementation='pallas_mosaic_gpu' cannot run .*float32.* the first that can"
        ):
            engine.generate(QUESTION, "plan", max_new_tokens=2)


def test_bad_prompts_and_agents(engine):
    trajectory = engine.trajectory()
    refused(engine, InputError, "empty", lambda: engine.generate(trajectory, "plan"))
    refused(engine, InputError, "empty", lambda: engine.score(trajectory, [1], "plan"))
    refused(engine, InputError, "empty", lambda: engine.generate([QUESTION, []], "plan"))
    trajectory.append(QUESTION)
    refused(engine, AdapterError, "unknown agent 'planer'.*'plan'", lambda: engine.generate(trajectory, "planer"))
    refused(engine, AdapterError, "unknown agent", lambda: engine.next_token_logits(trajectory, "x"))
    refused(engine, AdapterError, "unknown agent", lambda: engine.unload_adapter("x"))
    refused(engine, AdapterError, "already|loaded", lambda: engine.load_adapter("plan", agents()["plan"]))
    refused(engine, InputError, "128 is outside", lambda: trajectory.append([1, 128]))
    refused(engine, InputError, "-1 is outside", lambda: engine.score(trajectory, [-1], "plan"))
    refused(engine, InputError, "integers", lambda: trajectory.append(np.ones(3)))
    refused(engine, InputError, "flat", lambda: trajectory.append(np.ones((3, 1), int)))
    refused(engine, InputError, "not int", lambda: engine.generate(3, "plan"))
    refused(engine, InputError, "2 values of agent for 1", lambda: engine.generate([QUESTION], ["plan", "plan"]))
    refused(engine, InputError, "nothing to score", lambda: engine.score(trajectory, [], "plan"))
    refused(engine, InputError, "unknown sampling keywords: max_t", lambda: engine.generate(QUESTION, max_tokens=3))
    refused(engine, InputError, "not both", lambda: engine.generate(QUESTION, None, SamplingParams(), seed=3))
    refused(engine, InputError, "roll back 99", lambda: trajectory.rollback(99))
    refused(engine, InputError, "flat", lambda: trajectory.append([[1, 2], [3]]))
    refused(engine, AdapterError, "unknown agent", lambda: engine.generate(QUESTION, ["plan"]))
    foreign = tiny_engine("base_lr").trajectory().append(QUESTION)
    refused(engine, InputError, "another engine", lambda: engine.generate(foreign, "plan"))
    refused(engine, InputError, "another engine", lambda: engine.score(foreign, [1], "plan"))
    assert trajectory.token_ids == QUESTION


def test_contexts_that_do_not_fit(engine):
    trajectory = engine.trajectory().append(QUESTION)
    refused(engine, InputError, "context of 2048", lambda: trajectory.append([1] * 2048))
    refused(engine, InputError, "context of 2048", lambda: engine.score(trajectory, [1] * 2048, "plan"))
    refused(engine, OutOfPagesError, "num_pages", lambda: engine.generate([1] * 500, "plan"))
    refused(engine, OutOfPagesError, "lower max_new_tokens", lambda: engine.generate(trajectory, max_new_tokens=900))
    assert trajectory.token_ids == QUESTION


def test_weights_are_float32_on_a_cpu_unless_asked_otherwise():
    default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    assert Engine.from_preset("tiny", num_pages=1).dtype.name == default
    assert Engine.from_preset("tiny", num_pages=1, dtype="bfloat16").dtype.name == "bfloat16"


def test_engines_that_cannot_start():
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"num_pages": 0}, InputError, "num_pages"),
        ({"page_size": 12}, InputError, "multiple of 8"),
        ({"prefill_buckets": (0, 8)}, InputError, "prefill_buckets"),
        ({"prefill_buckets": 8}, InputError, "prefill_buckets"),
        ({"decode_block": 0}, InputError, "decode_block"),
        ({"prefill_batch_size": 0}, InputError, "prefill_batch_size"),
        ({"min_batch_size": 0}, InputError, "min_batch_size"),
        ({"min_batch_size": 8, "max_batch_size": 4}, InputError, "min_batch_size 8 is more than max_batch_size 4"),
        ({"num_low_rank_pages": 0}, InputError, "num_low_rank_pages"),
        ({"num_recomputed_pages": 0}, InputError, "num_recomputed_pages"),
        ({"recompute_layers": [0.5]}, InputError, "recompute_layers must be numbers of layers"),
        ({"recompute_layers": 1}, InputError, "recompute_layers must be numbers of layers, not 1"),
        ({"recompute_layers": "01"}, InputError, "recompute_layers must be numbers of layers"),
        ({"recompute_layers": [1, 2]}, InputError, "layer 2; the model has layers 0 to 1"),  # in any mode
        ({"pages": 3}, InputError, "unknown engine options: pages"),
        ({"implementation": "cuda"}, InputError, "implementation"),
    ]
    for options, error, match in cases:
        with pytest.raises(error, match=match):
            tiny_engine("base_lr", **options)
    with pytest.raises(InputError, match=r"sharing mode 'all'.*base_lr"):
        tiny_engine("all")
    with pytest.raises(ConfigError, match="unknown preset"):
        Engine.from_preset("llama-9")
    with pytest.raises(InputError, match="dtype"):
        Engine.from_preset("tiny", dtype="int8")
    other = LlamaConfig(2, 64, 96, 4, 2, 16, 128, 64)
    with pytest.raises(AdapterError, match="base"):
        tiny_engine("base_lr", {"plan": random_adapter(other, rank=2, seed=0)})


def test_a_tokenizer_with_more_ids_than_the_model_is_noticed(engine, monkeypatch):
    monkeypatch.setattr(engine.tokenizer, "encode", lambda text, add_bos: [5, 128])
    refused(engine, InputError, "128 is outside the vocabulary", lambda: engine.trajectory().append("pad"))


def test_text_without_a_tokenizer_is_refused():
    engine = tiny_engine("base_lr")
    refused(engine, InputError, "without a tokenizer", lambda: engine.trajectory().append("hello"))
    refused(engine, InputError, "stop_token_ids", lambda: engine.generate(QUESTION, "plan", stop=["x"]))
