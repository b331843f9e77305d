"""The Triton kernels, interpreted on CPU."""

import functools

import pytest
from attention_contract import AttentionContract

from lragent_jax.kernels.interpret import interpreted
from lragent_jax.kernels.lora_attention import api, dispatch


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    mine = dispatch.Implementation("pallas_triton", platforms=("gpu",))
    monkeypatch.setattr(
        api, "dispatch", functools.partial(dispatch.dispatch, implementations=(mine, *dispatch.IMPLEMENTATIONS))
    )
    with interpreted():
        yield


class TestTriton(AttentionContract):
    implementation = "pallas_triton"
