"""Slips of whoever calls an engine: an error of ours says what is meant, before anything is run or changed."""

import asyncio
from typing import Any

import jax
import numpy as np
import pytest
from engines import agents, ascii_tokenizer, tiny_engine

from lragent_jax.async_engine import AsyncEngine
from lragent_jax.engine import Engine
from lragent_jax.models.errors import AdapterError, InputError
from lragent_jax.sampling_params import SamplingParams

QUESTION = [5, 6, 7]
OTHER_PARAMS: list[tuple[Any, str]] = [
    (64, "must be a SamplingParams, not int: give its fields by name, as in max_new_tokens=64"),
    ({}, "not dict"),
    ({"temperature": 1.0}, "not dict"),
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine("base_lr", tokenizer=ascii_tokenizer())


def test_keywords_beside_a_list_of_params(engine):
    params = [SamplingParams(max_new_tokens=2)] * 2
    for given in (params, tuple(params)):
        with pytest.raises(InputError, match=r"either params or keywords, not both \(max_new_tokens\)"):
            engine.generate(["a", "b"], "plan", given, max_new_tokens=5)
        with pytest.raises(InputError, match=r"not both \(no_such\)"):
            engine.generate(["a", "b"], "plan", given, no_such=1)
    with pytest.raises(InputError, match="not both"):
        engine.generate([], "plan", [], max_new_tokens=5)


@pytest.mark.parametrize(("params", "message"), OTHER_PARAMS)
def test_what_is_no_params(engine, params, message):
    for call in (
        lambda: engine.generate("a", "plan", params),
        lambda: engine.generate(["a"], "plan", params),
        lambda: engine.generate(["a", "b"], "plan", [SamplingParams(), params]),
        lambda: engine.stream("a", "plan", params),
    ):
        with pytest.raises(InputError, match=message):
            call()

    async def serve():
        async with AsyncEngine(engine) as server:
            with pytest.raises(InputError, match=message):
                await server.generate("a", "plan", params)
            with pytest.raises(InputError, match=message):
                await anext(server.stream("a", "plan", params))

    asyncio.run(serve())


def test_a_list_of_params_for_one_prompt(engine):
    for prompt in ("a", QUESTION):
        for call in (engine.generate, engine.stream):
            with pytest.raises(InputError, match="a list of params goes with a list of prompts"):
                call(prompt, "plan", [SamplingParams()])


def test_text_where_a_trajectory_is_asked_for(engine):
    for call in (
        lambda: engine.score("abc", [1, 2], "plan"),
        lambda: engine.score_output(QUESTION, [1, 2], "plan"),
        lambda: engine.next_token_logits("abc"),
        lambda: engine.next_token_logits(None),
    ):
        with pytest.raises(InputError, match=r"takes a trajectory, not (str|list|NoneType): engine\.trajectory"):
            call()


def test_a_number_where_token_ids_are_asked_for(engine):
    with engine.trajectory().append(QUESTION) as trajectory:
        for ids in (5, None, np.array(5)):
            with pytest.raises(InputError, match="token ids must be a flat sequence of integers, not"):
                engine.score(trajectory, ids)
        assert trajectory.token_ids == QUESTION


def test_models_and_adapters_that_are_none(engine, tmp_path):
    others: list[tuple[Any, str]] = [
        ([tmp_path], "not as list"),
        ("plan", "not as str"),
        ({"plan": None}, "the adapter of agent 'plan' is a folder or an Adapter, not None"),
    ]
    for adapters, message in others:
        with pytest.raises(InputError, match=message):
            Engine.from_pretrained(tmp_path / "model", adapters)
    models: list[Any] = [None, 3]
    for model in models:
        with pytest.raises(InputError, match=f"model is the path of a folder or file, not {model}"):
            Engine.from_pretrained(model)
    with pytest.raises(InputError, match="the adapter of agent 'z' is a folder or an Adapter, not None"):
        engine.load_adapter("z", None)
    assert engine.agents == list(agents())


def test_the_base_model_is_not_unloaded(engine):
    with pytest.raises(AdapterError, match="None is the base model, which stays; name the agent"):
        engine.unload_adapter(None)
    assert engine.agents == list(agents())


def test_agents_of_a_preset_are_a_list_of_different_names():
    for names in ("plan", ["a", "a"]):
        with pytest.raises(InputError, match=r"agents is a list of names, each once, not"):
            Engine.from_preset("tiny", agents=names, num_pages=1)
    assert Engine.from_preset("tiny", agents=("a", "b"), num_pages=1).agents == ["a", "b"]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="they may run here")
def test_kernels_of_another_platform():
    engine = tiny_engine("base_lr", implementation="pallas_triton")
    with engine.trajectory().append(QUESTION) as trajectory:
        for call in (
            lambda: engine.generate(trajectory, "plan", max_new_tokens=2),
            lambda: engine.score(trajectory, [1, 2], "plan"),
            lambda: engine.warmup(scoring=False),
        ):
            with pytest.raises(
                InputError, match=r"implementation='pallas_triton' cannot run .* for gpu, and this is cpu; .* the first"
            ):
                call()
        assert trajectory.token_ids == QUESTION
