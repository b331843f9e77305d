"""Agrees with transformers + PEFT in f32, by what they computed once (`make_goldens.py`): no torch needed."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import parity_cases as cases
import parity_checks
import pytest
from parity_models import FAMILIES, SETS, fingerprint, llama3_scaling, write_all, write_model

from lragent_jax.models.adapter_checkpoint import read_adapter, save_adapter
from lragent_jax.models.checkpoint import save_checkpoint
from lragent_jax.models.folder import read_config, read_model
from lragent_jax.models.rope import inverse_frequencies
from lragent_jax.sampling import SamplingParams

FOLDER = Path(__file__).parent / "goldens"
RECORDED = json.loads((FOLDER / "versions.json").read_text())
SEED = RECORDED["made_with"]["seed"]


class Golden:
    """A family's folders, and what they must compute."""

    def __init__(self, folder: Path, family: str):
        self.model, self.adapters = write_all(folder / "golden", family, SEED)
        with np.load(FOLDER / f"{family}.npz") as file:
            self.want = dict(file)

    def engine(self):
        return parity_checks.make_engine(self.model, self.adapters)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_goldens_are_of_these_models(family):
    assert fingerprint(family, SEED) == RECORDED["fingerprints"][family], "run tests/make_goldens.py again"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_agrees(family, subtests, tmp_path):
    """One test per family: its programs compile once, wherever pytest-xdist runs it."""
    golden = Golden(tmp_path, family)
    engine = golden.engine()
    with subtests.test("submodules"):
        parity_checks.check_submodules(golden.model, golden.want, SEED)
    for agent in cases.decode_agents(family):
        with subtests.test("a prompt and what follows", agent=agent):
            parity_checks.check_decode(engine, golden.want, agent, SEED)
    for set_name in cases.adapter_sets(family):
        with subtests.test("a trajectory of three agents", adapters=set_name):
            parity_checks.check_trajectory(engine, golden.want, set_name, SEED)


def test_one_agent_alone_agrees_in_every_mode(subtests, tmp_path):
    """Its split K and V, low-rank keys before llama3's RoPE included, come to what PEFT computes."""
    golden = Golden(tmp_path, "llama3.1")
    merged = golden.engine()
    for sharing in ("base", "base_lr", "pre_lr"):
        engine = merged.with_sharing(sharing, num_low_rank_pages=512)
        for set_name in SETS:
            with subtests.test(sharing=sharing, adapters=set_name):
                parity_checks.check_decode(engine, golden.want, f"{set_name}-reflect", SEED)


def test_a_batch_of_agents_generates_what_each_does_alone(tmp_path):
    golden = Golden(tmp_path, "llama3.1")
    engine, agents = golden.engine(), cases.decode_agents("llama3.1")
    alone = [golden.want[f"decode/{agent}/greedy_ids"].tolist() for agent in agents]
    assert len({len(ids) for ids in alone}) > 1, "rows that end at different steps are wanted"
    with engine.trajectory().append(cases.prompt_ids(SEED)) as trajectory:
        forks = [trajectory.fork() for _ in agents]
    for start, stop in ((0, 7), (7, 40)):
        params = [SamplingParams(max_new_tokens=len(ids[start:stop]), ignore_eos=True) for ids in alone]
        outputs = engine.generate(forks, agents, params)
        assert [out.token_ids for out in outputs] == [ids[start:stop] for ids in alone]


def test_a_converted_model_gives_the_same_numbers(tmp_path):
    """Through Orbax, model and adapters alike, nothing changes by a single bit."""
    golden = Golden(tmp_path, "qwen2")
    config, _, params = read_model(golden.model, "float32")
    save_checkpoint(tmp_path / "model", config, params)
    converted = {agent: tmp_path / agent for agent in golden.adapters}
    for agent, folder in golden.adapters.items():
        save_adapter(converted[agent], read_adapter(folder, config))
    engines = golden.engine(), parity_checks.make_engine(tmp_path / "model", converted)
    ids = cases.prompt_ids(SEED)
    for agent in [None, *converted]:
        want, got = (engine.score(engine.trajectory().append(ids[:8]), ids[8:16], agent) for engine in engines)
        np.testing.assert_array_equal(got, want)


# The comparison has teeth: these are mistakes that must not pass.


def test_another_agents_adapter_is_noticed(tmp_path):
    golden = Golden(tmp_path, "llama3")
    plan, action, reflect = (golden.adapters[f"qv-{role}"] for role in ("plan", "action", "reflect"))
    golden.adapters |= {"qv-plan": action, "qv-action": reflect, "qv-reflect": plan}
    with pytest.raises(AssertionError, match="parity"):
        parity_checks.check_trajectory(golden.engine(), golden.want, "qv", SEED)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama3.1", {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
        ("llama3.1", {"rope_parameters": llama3_scaling(40, rope_theta=10_000.0)}),
        ("llama3.2", {"rope_scaling": llama3_scaling(64, factor=8.0)}),
        ("llama3.2", {"rope_theta": 10_000.0}),
        ("llama2", {"rope_theta": 500_000.0}),
        ("mistral", {"rms_norm_eps": 1e-5}),
    ],
    ids=["scaling dropped", "other context", "other factor", "theta dropped", "theta added", "other epsilon"],
)
def test_another_configuration_is_noticed(family, change, tmp_path):
    nearly_right = write_model(tmp_path / "changed", family, SEED, **change)
    with pytest.raises(AssertionError, match="parity"):
        parity_checks.check_submodules(nearly_right, Golden(tmp_path, family).want, SEED)


@pytest.mark.parametrize("family", ["llama3.1", "llama3.2"])
def test_scaled_frequencies_stay_blend_and_stretch(family, tmp_path):
    """Or the comparison of these families would not be one of llama3's scaling."""
    config = read_config(write_model(tmp_path / "model", family, SEED))
    assert config.rope_scaling is not None
    stretched = inverse_frequencies(dataclasses.replace(config, rope_scaling=None)) / inverse_frequencies(config)
    by = config.rope_scaling.factor
    assert (stretched == 1).any()
    assert ((stretched > 1.01) & (stretched < 0.99 * by)).any()
    assert np.isclose(stretched, by).any()
