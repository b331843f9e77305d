"""The sensitivity pass against the engine: it must measure what `droidspeak` does when it shares one layer alone."""

import dataclasses

import numpy as np
import pytest
from engines import ascii_tokenizer

from lragent_jax import sensitivity
from lragent_jax.drift import Drift
from lragent_jax.engine import Engine
from lragent_jax.models.adapter import LoraWeights, random_adapter
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import InputError
from lragent_jax.models.llama import random_params
from lragent_jax.models.rope import rotation
from lragent_jax.react import ReactTrajectory, Step
from lragent_jax.recording import Part, Recording
from lragent_jax.sensitivity import critical_layers, layer_drift

CONFIG = dataclasses.replace(LlamaConfig.preset("tiny"), num_layers=3)
GRAPHDEF, PARAMS = random_params(CONFIG, "float32", seed=4)
MODEL = (CONFIG, GRAPHDEF, PARAMS)
ADAPTERS = {
    role: random_adapter(CONFIG, rank=4, targets=("q", "k", "v", "down"), seed=seed, scale=0.3)
    for seed, role in enumerate(("plan", "action", "reflect"))
}
TRAJECTORIES = [
    ReactTrajectory(
        "",
        "who?",
        "",
        (Step("look", "Search[x]", "x is y"), Step("so", "Finish[y]", "ok"), Step("", "Reflect[right]", "")),
    ),
    ReactTrajectory("", "a longer question, with some context in it", "", (Step("hm", "Lookup[z]", "nothing"),)),
]
RECORDINGS = [Recording.tokenize(trajectory, ascii_tokenizer()) for trajectory in TRAJECTORIES]


def scored(mode: str, adapters, recompute_layers=()) -> list[np.ndarray]:
    """Logits of the recorded outputs, as an engine scores them."""
    options = {"num_pages": 128, "num_recomputed_pages": 128, "page_size": 8, "prefill_buckets": (32,)}
    agents = {role: adapter for role, adapter in adapters.items() if adapter is not None}
    engine = Engine(*MODEL, agents, sharing=mode, recompute_layers=recompute_layers, **options)
    logits = []
    for recording in RECORDINGS:
        with engine.trajectory() as trajectory:
            for part in recording.parts:
                if part.role is None:
                    trajectory.append(part.ids)
                else:
                    logits.append(engine.score(trajectory, part.ids, part.role if part.role in agents else None))
    return logits


def test_drift_is_that_of_an_engine_which_recomputes_every_layer_but_one():
    adapters = {**ADAPTERS, "action": None}
    reference, want = scored("none", adapters), []
    for layer in range(CONFIG.num_layers):
        drift = Drift()
        others = [i for i in range(CONFIG.num_layers) if i != layer]
        for a, b in zip(reference, scored("droidspeak", adapters, others), strict=True):
            drift.add(a, b)
        want.append(drift.kl)
    assert min(want) > 1e-5
    np.testing.assert_allclose(layer_drift(*MODEL, adapters, RECORDINGS), want, rtol=2e-2)


def test_all_layers_share_their_programs_and_padding_changes_nothing(monkeypatch):
    traced, steps = [], []
    monkeypatch.setattr(sensitivity, "rotation", lambda *args: traced.append(args) or rotation(*args))
    monkeypatch.setattr(sensitivity, "_BUCKET", 192)  # which no other test uses: nothing is traced yet
    got = layer_drift(*MODEL, ADAPTERS, RECORDINGS, progress=lambda done, total, what: steps.append((done, total)))
    assert len(traced) == 2, "K and V of one's own, and shared"
    assert steps[0] == (0, 2 * CONFIG.num_layers)
    assert steps[-1] == (2 * CONFIG.num_layers, 2 * CONFIG.num_layers)
    monkeypatch.undo()
    np.testing.assert_allclose(got, layer_drift(*MODEL, ADAPTERS, RECORDINGS), rtol=1e-3)


def test_the_most_sensitive_layers_are_taken():
    """Only layer 1 tells agents apart: its own V, and what comes out of it for the layer above."""
    odd_at = 1
    adapters = {
        role: dataclasses.replace(
            adapter,
            weights={
                (layer, target): pair if layer == odd_at else LoraWeights(pair.lora_a, 0 * pair.lora_b)
                for (layer, target), pair in adapter.weights.items()
            },
        )
        for role, adapter in ADAPTERS.items()
    }
    drift = layer_drift(*MODEL, adapters, RECORDINGS)
    assert np.abs(drift[:odd_at]).max() < 1e-6, "agents agree below"
    assert (drift[odd_at:] > 1e-5).all()
    assert critical_layers(*MODEL, adapters, RECORDINGS, share=0.5) == (1, 2)
    assert critical_layers(*MODEL, adapters, RECORDINGS, share=0.01) == (int(drift.argmax()),)
    assert critical_layers(*MODEL, adapters, RECORDINGS, share=1) == (0, 1, 2)


def test_an_agent_alone_is_not_sensitive():
    alone = [Recording(tuple(dataclasses.replace(p, role=p.role and "plan") for p in r.parts)) for r in RECORDINGS]
    assert np.abs(layer_drift(*MODEL, ADAPTERS, alone)).max() < 1e-6


def test_what_cannot_be_measured_is_refused():
    two = {role: adapter for role, adapter in ADAPTERS.items() if role != "reflect"}
    with pytest.raises(InputError, match="no recording"):
        layer_drift(*MODEL, ADAPTERS, [])
    with pytest.raises(InputError, match="recording 1 holds no output"):
        layer_drift(*MODEL, ADAPTERS, [RECORDINGS[0], Recording((Part([1, 2], None),))])
    with pytest.raises(InputError, match="recording 0 has 2102 tokens, and the model's context is 2048"):
        layer_drift(*MODEL, ADAPTERS, [Recording((Part([1] * 2100, None), Part([1, 2], "plan")))])
    with pytest.raises(InputError, match="role reflect has no adapter"):
        layer_drift(*MODEL, two, RECORDINGS)
    with pytest.raises(InputError, match="share must be above 0"):
        critical_layers(*MODEL, ADAPTERS, RECORDINGS, share=0)
