"""Agrees with transformers + PEFT in f32, live, on other numbers than the goldens. `make test-parity` runs it.

Without torch the tests are skipped, but not when they were asked for (`-m parity`).
"""

import importlib
import importlib.util
from types import ModuleType

import numpy as np
import parity_cases as cases
import parity_checks
import pytest
from parity_models import FAMILIES, adapter_names, write_all
from tolerances import assert_close

from lragent_jax.models.adapter import stack_adapters
from lragent_jax.models.folder import read_config
from lragent_jax.models.peft import read_peft, write_peft

SEED = 1

pytestmark = [
    pytest.mark.parity,
    # PEFT 0.21 asks transformers 5.23 for a property under its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def parity_torch(request) -> ModuleType:
    missing = [name for name in ("torch", "peft") if importlib.util.find_spec(name) is None]
    if missing and request.config.option.markexpr != "parity":
        pytest.skip(f"{' and '.join(missing)} not installed; `make test-parity` installs them and runs this")
    return importlib.import_module("parity_torch")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folders(family, tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("parity") / family, family, SEED)


@pytest.fixture(scope="module")
def theirs(parity_torch, folders):
    return parity_torch.TorchModel(*folders)


@pytest.fixture(scope="module")
def want(parity_torch, theirs, family):
    return parity_torch.results(theirs, family, SEED)


@pytest.fixture(scope="module")
def engine(folders):
    return parity_checks.make_engine(*folders)


def test_submodules_agree(folders, want):
    parity_checks.check_submodules(folders[0], want, SEED)


def test_prompt_and_decode_agree(engine, want, family):
    for agent in cases.decode_agents(family):
        parity_checks.check_decode(engine, want, agent, SEED)


def test_trajectories_of_three_agents_agree(engine, want, family):
    for set_name in cases.adapter_sets(family):
        parity_checks.check_trajectory(engine, want, set_name, SEED)


def test_every_agent_agrees_on_every_token(engine, theirs, family):
    ids = cases.prompt_ids(SEED)
    for agent in [None, *adapter_names(family)]:
        with engine.trajectory().append(ids[:1]) as trajectory:
            rows = [*engine.score(trajectory, ids[1:], agent), engine.next_token_logits(trajectory, agent)]
        assert_close(np.stack(rows), theirs.logits(ids, agent), "parity")


@pytest.mark.parametrize("stacked", [False, True], ids=["as they are", "stacked"])
def test_peft_loads_what_we_write(parity_torch, folders, theirs, family, stacked, tmp_path):
    model, adapters = folders
    config = read_config(model)
    read = {name: read_peft(folder, config) for name, folder in adapters.items()}
    if stacked:
        read = dict(zip(read, stack_adapters(list(read.values())), strict=True))
    for name, adapter in read.items():
        write_peft(tmp_path / name, adapter, config, base_model=str(model))
    rewritten = parity_torch.TorchModel(model, {name: tmp_path / name for name in read})
    ids = cases.prompt_ids(SEED)
    for name in read:
        assert_close(rewritten.logits(ids, name), theirs.logits(ids, name), "parity")
