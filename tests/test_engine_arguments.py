"""Slips of whoever calls an engine: an error of ours says what is meant, before anything is run or changed."""

import asyncio
from typing import Any

import pytest
from engines import ascii_tokenizer, tiny_engine

from lragent_jax.async_engine import AsyncEngine
from lragent_jax.engine import Engine
from lragent_jax.models.errors import InputError
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
