"""PEFT folders are read with PEFT's meaning, and refused by name where we cannot honour it."""

import json
import math
from collections.abc import Iterable

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tolerances import assert_close

from lragent_jax.models.adapter import Adapter, LoraWeights, random_adapter
from lragent_jax.models.adapter_bank import TARGETS
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import AdapterError, CheckpointError
from lragent_jax.models.peft import MODULES, read_peft, write_peft

CONFIG = LlamaConfig(
    num_layers=12, width=8, mlp_width=12, num_heads=4, num_kv_heads=2, head_dim=2, vocab_size=16, context_length=32
)
SHAPES = CONFIG.projection_shapes()


def places(targets: str, layers: Iterable[int] = range(CONFIG.num_layers)) -> set[tuple[int, str]]:
    return {(layer, target) for layer in layers for target in targets.split()}


def path_of(place: tuple[int, str], root: str = "model.") -> str:
    return f"{root}layers.{place[0]}.{MODULES[place[1]]}"


def tensors_for(
    adapted, rank=lambda place: 4, key="base_model.model.{}.lora_{}.weight", root="model.", dtype="float32"
):
    """Random tensors as PEFT stores them: A [r, in] and B [out, r]."""
    rng = np.random.default_rng(0)
    tensors = {}
    for place in sorted(adapted):
        in_width, out_width = SHAPES[place[1]]
        for side, shape in (("A", (rank(place), in_width)), ("B", (out_width, rank(place)))):
            name = key.format(path_of(place, root), side)
            tensors[name] = rng.standard_normal(shape, np.float32).astype(dtype)
    return tensors


def write(folder, tensors, **fields):
    folder.mkdir(exist_ok=True)
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **fields}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def assert_computes(adapter: Adapter, tensors, scale, key="base_model.model.{}.lora_{}.weight", root="model."):
    """x A B equals s (x Aᵀ) Bᵀ of the stored tensors in every place, and there are no other places."""
    assert len(tensors) == 2 * len(adapter.weights)
    rng = np.random.default_rng(1)
    for place, (lora_a, lora_b) in adapter.weights.items():
        x = rng.standard_normal((3, SHAPES[place[1]][0]))
        stored_a, stored_b = (tensors[key.format(path_of(place, root), side)].astype(np.float64) for side in "AB")
        assert_close(x @ lora_a @ lora_b, scale(place) * (x @ stored_a.T @ stored_b.T), "equal")


# What is adapted by which fields: PEFT's matching, spelled out.
TARGETED = {
    "a list of tails": ({"target_modules": ["q_proj", "v_proj"]}, places("q v")),
    "all seven": ({"target_modules": [name.split(".")[1] for name in MODULES.values()]}, places(" ".join(TARGETS))),
    "longer tails": ({"target_modules": ["self_attn.k_proj", "mlp.up_proj"]}, places("k up")),
    "tails begin at a dot": ({"target_modules": ["proj", "v_proj"]}, places("v")),
    "whole paths": ({"target_modules": ["model.layers.1.self_attn.v_proj"]}, {(1, "v")}),
    "a list is no regex": ({"target_modules": [r".*\.v_proj", "o_proj"]}, places("o")),
    "no list": ({"target_modules": None}, places("q v")),
    "all-linear": ({"target_modules": "all-linear"}, places(" ".join(TARGETS))),
    "ALL-linear": ({"target_modules": "ALL-linear", "exclude_modules": ["mlp.down_proj"]}, places("q k v o gate up")),
    "a regex": ({"target_modules": r".*\.self_attn\.(q|v)_proj"}, places("q v")),
    "a regex with layers": ({"target_modules": r"model\.layers\.(1|10)\.mlp\.\w+"}, places("gate up down", (1, 10))),
    "a regex is no prefix": ({"target_modules": r".*self_attn.*|model\.layers"}, places("q k v o")),
    "one layer": ({"target_modules": ["v_proj"], "layers_to_transform": 0}, places("v", [0])),
    "some layers": ({"target_modules": ["v_proj"], "layers_to_transform": [1, 11]}, places("v", [1, 11])),
    "no layers": ({"target_modules": ["v_proj"], "layers_to_transform": []}, places("v")),
    "a named list": (
        {"target_modules": ["v_proj"], "layers_to_transform": [2], "layers_pattern": "layers"},
        places("v", [2]),
    ),
    "several lists": (
        {"target_modules": ["v_proj"], "layers_to_transform": [2], "layers_pattern": ["h", "layers"]},
        places("v", [2]),
    ),
    "whole paths ignore layers": (
        {"target_modules": ["model.layers.3.self_attn.q_proj", "v_proj"], "layers_to_transform": [2]},
        {(3, "q"), (2, "v")},
    ),
    "excluded tails": (
        {"target_modules": "all-linear", "exclude_modules": ["q_proj", "mlp"]},
        places("k v o gate up down"),
    ),
    "an excluding regex": (
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.\d\..*"},
        places("q v", [10, 11]),
    ),
    "excluding wins": (
        {
            "target_modules": ["model.layers.3.self_attn.q_proj", "v_proj"],
            "exclude_modules": ["layers.3.self_attn.q_proj"],
        },
        places("v"),
    ),
}


@pytest.mark.parametrize("case", TARGETED)
def test_target_modules_as_peft_matches_them(tmp_path, case):
    fields, want = TARGETED[case]
    tensors = tensors_for(want)
    adapter = read_peft(write(tmp_path, tensors, **fields), CONFIG)
    assert set(adapter.weights) == want
    assert_computes(adapter, tensors, lambda place: 2.0)


def rank_or(default, **by_target):
    return lambda place: by_target.get(place[1], default)


SCALED = {
    "alpha / r": ({"r": 4, "lora_alpha": 6}, rank_or(4), lambda place: 1.5),
    "a fraction": ({"r": 4, "lora_alpha": 0.5}, rank_or(4), lambda place: 0.125),
    "defaults": ({"r": None, "lora_alpha": None}, rank_or(8), lambda place: 1.0),
    "rslora": ({"r": 4, "lora_alpha": 6, "use_rslora": True}, rank_or(4), lambda place: 3.0),
    "rslora by module": (
        {"use_rslora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"q_proj": 3}},
        rank_or(4, v=9),
        lambda place: 8 / 3 if place[1] == "v" else 3 / 2,
    ),
    "tails": ({"rank_pattern": {"v_proj": 2}}, rank_or(4, v=2), lambda place: 4.0 if place[1] == "v" else 2.0),
    "whole paths": (
        {"alpha_pattern": {"model.layers.1.self_attn.v_proj": 1}},
        rank_or(4),
        lambda place: 0.25 if place == (1, "v") else 2.0,
    ),
    "anchored": (
        {"alpha_pattern": {r"^model\.layers\.1\.self_attn\.\w+": 1}},
        rank_or(4),
        lambda place: 0.25 if place[0] == 1 else 2.0,
    ),
    "the first match counts": (
        {"alpha_pattern": {r"layers\.1\.self_attn\.(q|v)_proj": 1, "q_proj": 4, ".*": 12}},
        rank_or(4),
        lambda place: 0.25 if place[0] == 1 else 1.0 if place[1] == "q" else 3.0,
    ),
    "no middles": ({"alpha_pattern": {"self_attn": 1, "proj": 1, "q_proj.lora": 1}}, rank_or(4), lambda place: 2.0),
    "alternatives": (
        {"rank_pattern": {"k_proj|v_proj": 3}},
        rank_or(4, v=3),
        lambda place: 8 / 3 if place[1] == "v" else 2.0,
    ),
}


@pytest.mark.parametrize("case", SCALED)
def test_rank_and_scale_by_module(tmp_path, case):
    fields, rank, scale = SCALED[case]
    tensors = tensors_for(places("q v"), rank)
    adapter = read_peft(write(tmp_path, tensors, **fields), CONFIG)
    assert_computes(adapter, tensors, scale)


@pytest.mark.parametrize(
    ("key", "root"),
    [
        ("base_model.model.{}.lora_{}.weight", "model."),
        ("base_model.model.{}.lora_{}.default.weight", "model."),
        ("base_model.model.{}.lora_{}.plan-1.weight", "model."),
        ("{}.lora_{}.weight", "model."),
        ("base_model.model.{}.lora_{}.weight", ""),  # trained on the model without its head
    ],
)
def test_the_names_tensors_go_by(tmp_path, key, root):
    tensors = tensors_for(places("q v"), key=key, root=root)
    assert_computes(read_peft(write(tmp_path, tensors), CONFIG), tensors, lambda place: 2.0, key, root)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_storage_dtypes_matter_by_their_values_alone(tmp_path, dtype):
    tensors = tensors_for(places("q v"), dtype=dtype)
    adapter = read_peft(write(tmp_path / "a", tensors), CONFIG)
    wide = read_peft(write(tmp_path / "b", {n: t.astype(np.float32) for n, t in tensors.items()}), CONFIG)
    assert adapter.content_hash == wide.content_hash
    assert adapter.source == str(tmp_path / "a")


def test_identity_is_what_is_computed(tmp_path):
    tensors = tensors_for(places("q v"))
    one = read_peft(write(tmp_path / "one", tensors), CONFIG)
    spelled = {"base_model_name_or_path": "x", "lora_dropout": 0.3, "target_modules": r".*\.(q|v)_proj"}
    assert read_peft(write(tmp_path / "two", tensors, **spelled), CONFIG).content_hash == one.content_hash
    other = read_peft(write(tmp_path / "three", tensors, lora_alpha=16), CONFIG)
    assert other.content_hash != one.content_hash
    assert other.a_group_hash == one.a_group_hash


HARMLESS = {
    "auto_mapping": {"base_model_class": "LlamaForCausalLM"}, "base_model_name_or_path": "meta/llama", "bias": "none",
    "corda_config": {"x": 1}, "eva_config": {"rho": 2.0}, "exclude_modules": None, "inference_mode": True,
    "init_lora_weights": "gaussian", "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
    "loftq_config": {}, "lora_bias": False, "lora_dropout": 0.05, "megatron_config": None, "modules_to_save": [],
    "megatron_core": "megatron.core", "peft_version": "0.18.0", "qalora_group_size": 16, "rank_pattern": {},
    "alpha_pattern": None, "revision": "main", "runtime_config": {"ephemeral_gpu_offload": False},
    "target_parameters": None, "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_dora": False,
    "use_qalora": False, "use_rslora": False, "some_later_field": None, "another_later_field": False,
}  # fmt: skip


def test_fields_that_change_nothing(tmp_path):
    tensors = tensors_for(places("q v"))
    plain = read_peft(write(tmp_path / "plain", tensors), CONFIG)
    assert read_peft(write(tmp_path / "full", tensors, **HARMLESS), CONFIG).content_hash == plain.content_hash


REFUSED = {
    "use_dora": True,
    "bias": "lora_only",
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1],
    "layer_replication": [[0, 2]],
    "lora_bias": True,
    "fan_in_fan_out": True,
    "megatron_config": {"tp": 2},
    "alora_invocation_tokens": [5],
    "target_parameters": ["experts.gate_up_proj"],
    "use_qalora": True,
    "arrow_config": {"top_k": 3},
    "use_bdlora": {"nblocks": 2},
    "kasa_config": {"beta": 1e-4},
    "monteclora_config": {"num_samples": 8},
    "velora_config": {"num_groups": 64},
    "init_lora_weights": "pissa_niter_4",
    "a_field_of_tomorrow": {"x": 1},
    "r": 0,
    "lora_alpha": "8",
    "use_rslora": "yes",
    "rank_pattern": {"q_proj": 2.5},
    "alpha_pattern": {"q_proj(": 8},
    "target_modules": [1],
    "exclude_modules": "(",
    "layers_to_transform": "1",
    "layers_pattern": 3,
}


@pytest.mark.parametrize("field", REFUSED)
def test_refused_by_name(tmp_path, field):
    folder = write(tmp_path, tensors_for(places("q v")), **{field: REFUSED[field]})
    with pytest.raises(AdapterError, match=rf"adapter_config\.json asks for what is not supported:\n  - {field}\b"):
        read_peft(folder, CONFIG)


@pytest.mark.parametrize("init", ["pissa", "olora", "OLoRA", "corda", "loftq", "lora_ga", "tomorrow"])
def test_initialisations_that_change_the_base_are_refused(tmp_path, init):
    folder = write(tmp_path, tensors_for(places("q v")), init_lora_weights=init)
    with pytest.raises(AdapterError, match=f"init_lora_weights='{init}': the base weights were changed"):
        read_peft(folder, CONFIG)


def test_all_refusals_come_together(tmp_path):
    with pytest.raises(AdapterError) as caught:
        read_peft(write(tmp_path, tensors_for(places("q v")), **REFUSED), CONFIG)
    assert all(f"\n  - {field}" in str(caught.value) for field in REFUSED)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'; only LORA adapters can be read"),
        ({"peft_type": None}, "peft_type=None"),
        ({"target_modules": ["v_proj", "lm_head"]}, "adapts lm_head, which is not supported"),
        ({"target_modules": ["v_proj", "embed_tokens"]}, r"adapts model\.embed_tokens, which is not supported"),
        ({"target_modules": ".*"}, r"adapts model\.embed_tokens, which is not supported"),
        ({"target_modules": ["query_key_value"]}, "adapts no projection of this model"),
        ({"target_modules": []}, "adapts no projection of this model"),
        ({"layers_to_transform": [99]}, "adapts no projection of this model"),
        ({"target_modules": ".*v_proj", "layers_to_transform": [1]}, "layers_to_transform goes with a list"),
    ],
)
def test_what_cannot_be_adapted_is_refused(tmp_path, fields, message):
    with pytest.raises(AdapterError, match=message):
        read_peft(write(tmp_path, tensors_for(places("q v")), **fields), CONFIG)


def test_tensors_that_disagree_are_listed_together(tmp_path):
    tensors = tensors_for(places("q v"))
    name = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"
    del tensors[name.format(0, "q", "A")]
    tensors[name.format(1, "q", "B")] = np.zeros((8, 3), np.float32)
    tensors[name.format(2, "v", "A")] = np.zeros((4, 8), np.int8)
    extra = [
        name.format(12, "q", "A"),
        name.format(0, "k", "A"),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "base_model.model.model.embed_tokens.weight",
        name.format(3, "q", "A").replace("lora_A", "lora_A.second"),
    ]
    folder = write(tmp_path, {**tensors, **{key: np.zeros((4, 8), np.float32) for key in extra}})
    with pytest.raises(AdapterError) as caught:
        read_peft(folder, CONFIG)
    message = str(caught.value)
    assert "another base?" in message
    assert f"missing: {name.format(0, 'q', 'A')}" in message
    assert f"mis-shaped: {name.format(1, 'q', 'B')} is [8, 3], expected [8, 4]" in message
    assert f"unreadable: {name.format(2, 'v', 'A')} is int8" in message
    assert message.count("unused: ") == len(extra)
    assert message.count("\n") == len(extra) + 3
    assert all(key in message for key in extra[:4])


def test_an_adapter_of_another_base_is_refused(tmp_path):
    folder = write(tmp_path, tensors_for(places("q v")))
    wider = LlamaConfig(12, 16, 12, 4, 2, 2, 16, 32)
    with pytest.raises(
        AdapterError, match=r"another base\?.*\n  - mis-shaped: .*lora_A.weight is \[4, 8\], expected \[4, 16\]"
    ):
        read_peft(folder, wider)
    deeper = LlamaConfig(13, 8, 12, 4, 2, 2, 16, 32)
    with pytest.raises(AdapterError, match=r"missing: .*layers\.12\.self_attn\.q_proj"):
        read_peft(folder, deeper)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_none_are_refused(tmp_path, bad):
    tensors = tensors_for(places("q v"))
    tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"][0, 0] = bad
    with pytest.raises(AdapterError, match="v of layer 1: lora_b holds NaN or infinity"):
        read_peft(write(tmp_path / "bad", tensors), CONFIG)
    with pytest.raises(AdapterError, match="lora_b holds NaN or infinity"):
        read_peft(write(tmp_path / "large", tensors_for(places("q v")), lora_alpha=1e300), CONFIG)


def test_files_that_are_not_there_or_broken(tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder"):
        read_peft(tmp_path / "nowhere", CONFIG)
    folder = write(tmp_path / "adapter", tensors_for(places("q v")))
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is truncated"):
        read_peft(folder, CONFIG)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"holds no adapter_model\.safetensors"):
        read_peft(folder, CONFIG)
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin, a pickle, .* save it again"):
        read_peft(folder, CONFIG)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read as JSON"):
        read_peft(folder, CONFIG)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"there is no adapter_config\.json"):
        read_peft(folder, CONFIG)


def uneven() -> Adapter:
    """Other ranks in every place, and not every layer."""
    rng = np.random.default_rng(3)
    weights = {}
    for rank, place in enumerate([(0, "v"), (1, "v"), (1, "q"), (11, "v"), (11, "down")], start=1):
        in_width, out_width = SHAPES[place[1]]
        weights[place] = LoraWeights(rng.standard_normal((in_width, rank)), rng.standard_normal((rank, out_width)))
    return Adapter(weights)


WRITTEN = {
    "q and v": lambda: random_adapter(CONFIG, rank=4, seed=0),
    "all seven": lambda: random_adapter(CONFIG, rank=2, seed=0, targets=TARGETS),
    "uneven": uneven,
}


@pytest.mark.parametrize("case", WRITTEN)
def test_what_is_written_reads_back_bit_for_bit(tmp_path, case):
    adapter = WRITTEN[case]()
    write_peft(tmp_path / "out", adapter, CONFIG, base_model="some/base")
    assert read_peft(tmp_path / "out", CONFIG).content_hash == adapter.content_hash
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert fields["lora_alpha"] == fields["r"]
    assert fields["alpha_pattern"] == fields["rank_pattern"]
    assert fields["base_model_name_or_path"] == "some/base"
    assert_computes(adapter, load_file(tmp_path / "out" / "adapter_model.safetensors"), lambda place: 1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"], "nothing is left beside it"


@pytest.mark.parametrize("case", WRITTEN)
def test_with_alpha_the_scale_is_taken_out_of_b(tmp_path, case):
    """Twice the rank in every module, whatever its rank: a power of two, so that the numbers come back as they were."""
    adapter = WRITTEN[case]()
    write_peft(tmp_path / "as it is", adapter, CONFIG)
    rank = json.loads((tmp_path / "as it is" / "adapter_config.json").read_text())["r"]
    write_peft(tmp_path / "out", adapter, CONFIG, alpha=2 * rank)
    assert read_peft(tmp_path / "out", CONFIG).content_hash == adapter.content_hash
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == 2 * rank
    assert_computes(adapter, load_file(tmp_path / "out" / "adapter_model.safetensors"), lambda place: 2.0)


def test_written_names_are_those_of_peft(tmp_path):
    write_peft(tmp_path / "out", random_adapter(CONFIG, rank=4, seed=0), CONFIG)
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert fields["target_modules"] == ["q_proj", "v_proj"]
    assert fields["rank_pattern"] == {}
    assert set(load_file(tmp_path / "out" / "adapter_model.safetensors")) == set(tensors_for(places("q v")))


def test_an_adapter_of_another_base_is_not_written(tmp_path):
    with pytest.raises(AdapterError, match="another base"):
        write_peft(tmp_path / "out", random_adapter(LlamaConfig.preset("tiny"), rank=2, seed=0), CONFIG)
    assert not list(tmp_path.iterdir())
