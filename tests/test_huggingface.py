"""Hugging Face folders: every weight lands where it belongs, every folder that cannot be run says why."""

import json
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_folders import (
    BFLOAT16,
    assert_same_weights,
    config_json,
    huggingface_tensors,
    random_weights,
    write_huggingface,
)
from safetensors.numpy import save_file

from lragent_jax.models import safetensors_folder
from lragent_jax.models.config import Llama3RopeScaling
from lragent_jax.models.errors import CheckpointError, ConfigError
from lragent_jax.models.huggingface import config_from_huggingface, read_huggingface

FAMILIES = ("llama", "mistral", "qwen2")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture
def folder(tmp_path):
    """An untied Llama with its weights in f32."""
    fields = config_json()
    tensors = huggingface_tensors(random_weights(config_from_huggingface(fields)))
    return write_huggingface(tmp_path / "model", fields, tensors)


def rewrite(folder, **changes):
    """The folder with tensors replaced, added, or (None) taken out."""
    fields = json.loads((folder / "config.json").read_text())
    tensors = huggingface_tensors(random_weights(config_from_huggingface(fields))) | changes
    return write_huggingface(folder, fields, {name: t for name, t in tensors.items() if t is not None})


# --- weights


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, np.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_bit_for_bit(tmp_path, family, dtype):
    fields = config_json(family, tie_word_embeddings=family == "mistral")
    config = config_from_huggingface(fields)
    weights = random_weights(config, dtype)
    write_huggingface(tmp_path, fields, huggingface_tensors(weights))
    got_config, _, params = read_huggingface(tmp_path, jnp.dtype(dtype).name)
    assert got_config == config
    assert config.qkv_bias == (family == "qwen2")
    assert_same_weights(params, weights)


def test_cast_on_the_way(tmp_path):
    fields = config_json()
    weights = random_weights(config_from_huggingface(fields), np.float64)
    write_huggingface(tmp_path, fields, huggingface_tensors(weights))
    _, _, params = read_huggingface(tmp_path, "bfloat16")
    rounded = {name: weight.astype(np.float32).astype(BFLOAT16) for name, weight in weights.items()}
    assert_same_weights(params, rounded)


def test_shards_and_single_file_are_the_same(tmp_path):
    fields = config_json("qwen2")
    weights = random_weights(config_from_huggingface(fields))
    write_huggingface(tmp_path, fields, huggingface_tensors(weights), num_shards=3)
    _, _, params = read_huggingface(tmp_path, "float32")
    assert_same_weights(params, weights)


def test_of_a_tensor_in_two_shards_the_index_says_which_counts(tmp_path):
    fields = config_json()
    weights = random_weights(config_from_huggingface(fields))
    tensors = huggingface_tensors(weights)
    write_huggingface(tmp_path, fields, tensors, num_shards=2)
    for shard in sorted(tmp_path.glob("*.safetensors")):
        own = {name: t for i, (name, t) in enumerate(tensors.items()) if f"{i % 2 + 1:05}-of" in shard.name}
        save_file({name: own.get(name, np.zeros_like(t)) for name, t in tensors.items()}, shard)
    _, _, params = read_huggingface(tmp_path, "float32")
    assert_same_weights(params, weights)


def test_tied_embeddings_leave_the_head_unread(tmp_path):
    fields = config_json(tie_word_embeddings=True)
    weights = random_weights(config_from_huggingface(fields))
    tensors = huggingface_tensors(weights) | {
        "lm_head.weight": np.full((128, 48), np.nan, np.float32),
        "model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    _, _, params = read_huggingface(write_huggingface(tmp_path, fields, tensors), "float32")
    assert_same_weights(params, weights)


def test_all_wrong_keys_in_one_error_before_anything_is_read(folder, monkeypatch):
    rewrite(
        folder,
        **{
            "model.norm.weight": None,
            "lm_head.weight": None,
            "model.layers.0.mlp.up_proj.weight": np.zeros((48, 96), np.float32),
            "model.layers.1.mlp.gate_proj.weight": np.zeros((96, 48), np.int8),
            "model.layers.2.mlp.up_proj.weight": np.zeros((96, 48), np.float32),
        },
    )
    monkeypatch.setattr(safetensors_folder, "_read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(CheckpointError) as caught:
        read_huggingface(folder, "float32")
    message = str(caught.value)
    assert str(folder) in message
    for problem in (
        "missing: model.norm.weight",
        "missing: lm_head.weight",
        "mis-shaped: model.layers.0.mlp.up_proj.weight is [48, 96], expected [96, 48]",
        "unreadable: model.layers.1.mlp.gate_proj.weight is stored as int8",
        "unused: model.layers.2.mlp.up_proj.weight",
    ):
        assert problem in message
    assert len(message.splitlines()) == 6


def test_numbers_that_are_not_finite_are_named(folder):
    nan, inf = np.zeros((96, 48), np.float32), np.ones(48, np.float32)
    nan[95, 47], inf[3] = np.nan, -np.inf
    rewrite(folder, **{"model.layers.1.mlp.gate_proj.weight": nan, "model.norm.weight": inf})
    with pytest.raises(CheckpointError, match=r"(?s)NaN") as caught:
        read_huggingface(folder, "float32")
    named = [line for line in str(caught.value).splitlines() if "model." in line]
    assert len(named) == 2
    assert "model.layers.1.mlp.gate_proj.weight" in str(named)
    assert "model.norm.weight" in str(named)


def test_numbers_too_large_for_the_dtype_are_named(folder):
    rewrite(folder, **{"model.norm.weight": np.full(48, 1e5, np.float32)})
    read_huggingface(folder, "bfloat16")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: .*too large for float16"):
        read_huggingface(folder, "float16")


def test_host_lets_go_of_tensors(tmp_path, monkeypatch):
    fields = config_json()
    write_huggingface(tmp_path, fields, huggingface_tensors(random_weights(config_from_huggingface(fields))))
    read, alive = safetensors_folder._read, []

    def counting_read(*args):
        # JAX lets go of a host buffer once its thread has copied it, which a busy machine delays, and with its next
        # call at the latest: the one before may still be there.
        deadline = time.monotonic() + 5
        while (held := sum(ref() is not None for ref in alive)) > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert held <= 1, "earlier tensors are still held"
        tensor = read(*args)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(safetensors_folder, "_read", counting_read)
    read_huggingface(tmp_path, "bfloat16")
    assert len(alive) == 21


def test_progress_counts_bytes(folder):
    calls = []
    read_huggingface(folder, "bfloat16", progress=lambda *call: calls.append(call))
    done, totals, labels = zip(*calls, strict=True)
    assert done[0] == 0
    assert list(done) == sorted(done)
    assert done[-1] == totals[0]
    assert len(set(totals)) == 1
    assert totals[0] == sum(t.nbytes for t in random_weights(config_from_huggingface(config_json())).values())
    assert "model.norm.weight" in labels


def test_lies_where_it_was_asked_to(folder):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    _, _, params = read_huggingface(folder, "float32", device)
    assert all(leaf.sharding == device and leaf.committed for leaf in jax.tree.leaves(params))
    with pytest.raises(ValueError, match="param_shardings"):
        read_huggingface(folder, "float32", {"embed": device})


@pytest.mark.parametrize("dtype", ["float64", "int8", "float8_e4m3fn", "half-precision", 7])
def test_dtypes_weights_cannot_have(folder, dtype):
    with pytest.raises(ConfigError, match="float32, bfloat16, float16"):
        read_huggingface(folder, dtype)


# --- folders


def test_folder_or_config_that_is_not_there(tmp_path, folder):
    with pytest.raises(CheckpointError, match=r"no folder .*nowhere"):
        read_huggingface(tmp_path / "nowhere", "float32")
    for content, reason in (("{", "JSON"), ("[]", "JSON object"), (b"\xff\xfe", "JSON")):
        (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(CheckpointError, match=reason):
            read_huggingface(folder, "float32")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_huggingface(folder, "float32")


def test_folder_without_safetensors(folder):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    with pytest.raises(CheckpointError, match=r"neither.*index\.json.*part\.safetensors"):
        read_huggingface(folder, "float32")
    (folder / "part.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_huggingface(folder, "float32")
    (folder / "pytorch_model-00001-of-00002.bin").touch()
    with pytest.raises(CheckpointError, match="convert them to safetensors"):
        read_huggingface(folder, "float32")


def test_truncated_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        read_huggingface(folder, "float32")


def test_index_that_does_not_agree_with_the_shards(tmp_path):
    fields = config_json()
    write_huggingface(tmp_path, fields, huggingface_tensors(random_weights(config_from_huggingface(fields))), 2)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(weight_map.values()))

    def error(index_json):
        index.write_text(json.dumps(index_json))
        with pytest.raises(CheckpointError) as caught:
            read_huggingface(tmp_path, "float32")
        return str(caught.value)

    assert "no weight_map" in error({})
    assert "no weight_map" in error({"weight_map": {"model.norm.weight": 1}})
    assert "outside its folder: ../secret" in error({"weight_map": weight_map | {"model.norm.weight": "../secret"}})
    swapped = {name: second if shard == first else first for name, shard in weight_map.items()}
    assert f"model.embed_tokens.weight is not in {swapped['model.embed_tokens.weight']}" in error(
        {"weight_map": swapped}
    )
    (tmp_path / second).unlink()
    assert f"lacks files that model.safetensors.index.json names: {second}" in error({"weight_map": weight_map})


# --- configurations


def test_old_and_new_rope_fields_mean_the_same():
    old = config_json(rope_theta=5e5, rope_scaling=LLAMA3)
    older = config_json(rope_theta=500_000, rope_scaling={"type": "llama3", **LLAMA3})
    new = config_json(rope_theta=..., rope_parameters={"rope_theta": 5e5, **LLAMA3})
    want = Llama3RopeScaling(8.0, 1.0, 4.0, 64)
    for fields in (old, older, new):
        config = config_from_huggingface(fields)
        assert (config.rope_theta, config.rope_scaling) == (5e5, want)
    plain = config_from_huggingface(config_json(rope_theta=..., rope_parameters={"rope_type": "default"}))
    assert (plain.rope_theta, plain.rope_scaling) == (1e4, None)


@pytest.mark.parametrize("changes", [{"eos_token_id": [5, 6]}, {"eos_token_id": 5, "bos_token_id": None}, {}])
def test_token_ids(changes):
    fields = config_json(**changes)
    config = config_from_huggingface(fields)
    want = changes.get("eos_token_id", 2)
    assert config.eos_token_ids == (tuple(want) if isinstance(want, list) else (want,))
    assert config.bos_token_id == changes.get("bos_token_id", 1)
    assert config_from_huggingface(fields, {"eos_token_id": [7, 8]}).eos_token_ids == (7, 8)
    assert config_from_huggingface(fields, {"eos_token_id": None}).eos_token_ids == config.eos_token_ids
    assert config_from_huggingface(config_json(eos_token_id=None)).eos_token_ids == ()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": None},
        {"head_dim": 16},
        {"head_dim": None, "tie_word_embeddings": True},
        {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 7e4}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3.items() if not k.startswith("original")}},
        {"rope_theta": ..., "rms_norm_eps": ..., "tie_word_embeddings": ..., "hidden_act": ...},
        {"num_attention_heads": 32, "num_key_value_heads": ..., "hidden_size": 64, "max_position_embeddings": ...},
    ],
)
def test_agrees_with_transformers(tmp_path, family, changes):
    if family == "mistral" and "num_key_value_heads" in changes and changes["num_key_value_heads"] is None:
        pytest.skip("transformers does not take null there")
    fields = config_json(family, **changes)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    from lragent_jax.tokenizer import _transformers

    with _transformers() as transformers:
        theirs = transformers.AutoConfig.from_pretrained(str(tmp_path))
    ours = config_from_huggingface(fields)
    eos = theirs.eos_token_id
    want = {
        "num_layers": theirs.num_hidden_layers,
        "width": theirs.hidden_size,
        "mlp_width": theirs.intermediate_size,
        "num_heads": theirs.num_attention_heads,
        "num_kv_heads": theirs.num_key_value_heads,
        "head_dim": getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
        "vocab_size": theirs.vocab_size,
        "context_length": theirs.max_position_embeddings,
        "norm_eps": theirs.rms_norm_eps,
        "tied_embeddings": theirs.tie_word_embeddings,
        "rope_theta": theirs.rope_parameters["rope_theta"],
        "bos_token_id": theirs.bos_token_id,
        "eos_token_ids": () if eos is None else (eos,),
    }
    assert {name: getattr(ours, name) for name in want} == want
    scaling = theirs.rope_parameters
    assert (ours.rope_scaling is None) == (scaling["rope_type"] == "default")
    if ours.rope_scaling:
        assert ours.rope_scaling.original_context_length == scaling["original_max_position_embeddings"]


REFUSED = {
    "hidden_act": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
    "quantization_config": {"quant_method": "gptq"},
    "compression_config": {"format": "pack"},
    "partial_rotary_factor": 0.5,
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.2,
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "logit_scale": 0.5,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 64,
    "attention_chunk_size": 8192,
    "no_rope_layers": [1, 1, 1, 0],
    "layer_types": ["full_attention", "chunked_attention"],
    "sliding_window": 128,
    "clip_qkv": 8.0,
    "use_qk_norm": True,
}


@pytest.mark.parametrize(("name", "value"), REFUSED.items(), ids=list(REFUSED))
def test_fields_that_change_the_mathematics_are_refused_by_name(name, value):
    config_from_huggingface(config_json(**{name: None}))
    with pytest.raises(ConfigError, match=f"a folder cannot be run:\n  - {name} = "):
        config_from_huggingface(config_json(**{name: value}), source="a folder")


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "longrope", "mrope", "su", 3])
@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_other_rope_types_are_refused_by_name(rope_type, key, field):
    with pytest.raises(ConfigError, match=rf"{field}\.{key} = {rope_type!r} is not supported"):
        config_from_huggingface(config_json(**{field: {key: rope_type, "factor": 2.0}}))


def test_rope_of_other_shapes():
    for rope, reason in (
        ({"full_attention": {"rope_type": "default"}}, r"rope_parameters\.full_attention"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, r"rope_parameters\.partial_rotary_factor = 0\.5"),
        ({"rope_type": "llama3", "factor": 8.0}, r"missing: rope_parameters\.low_freq_factor, .*high_freq_factor"),
        (LLAMA3 | {"low_freq_factor": 4.0}, r"rope_parameters\.high_freq_factor = 4\.0"),
        (LLAMA3 | {"factor": "8"}, r"rope_parameters\.factor must be a positive number, not '8'"),
        ([8.0], r"rope_parameters must be an object"),
    ):
        with pytest.raises(ConfigError, match=reason):
            config_from_huggingface(config_json(rope_parameters=rope))


@pytest.mark.parametrize(
    ("family", "changes", "in_use"),
    [
        ("mistral", {"sliding_window": None}, False),
        ("mistral", {"sliding_window": 511}, True),
        ("mistral", {"sliding_window": 512}, False),
        ("mistral", {"sliding_window": ..., "max_position_embeddings": 8192}, True),
        ("mistral", {"sliding_window": ..., "max_position_embeddings": 4096}, False),
        ("llama", {}, False),
        ("qwen2", {"sliding_window": 16}, False),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": False}, False),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True}, False),  # from layer 28 on: there are two
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}, True),
        ("qwen2", {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]}, True),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "layer_types": ["full_attention"] * 2}, False),
        ("qwen2", {"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 0}, False),
    ],
)
def test_sliding_window_is_refused_only_where_it_is_in_use(family, changes, in_use):
    fields = config_json(family, **changes)
    if in_use:
        with pytest.raises(ConfigError, match=r"sliding_window = .* in use"):
            config_from_huggingface(fields)
    else:
        config_from_huggingface(fields)


@pytest.mark.parametrize("model_type", ["gemma2", "granite", "qwen2_moe", "qwen3", "mixtral", None, 3])
def test_other_model_types_are_refused_by_name(model_type):
    with pytest.raises(ConfigError, match=f"model_type = {model_type!r} is not supported; there are: llama, mistral"):
        config_from_huggingface({"model_type": model_type})


def test_missing_fields_and_wrong_types_in_one_error():
    fields = config_json(
        hidden_size=..., vocab_size=None, num_hidden_layers="2", num_attention_heads=True, rms_norm_eps="1e-5",
        tie_word_embeddings="yes", eos_token_id=[1, "2"], bos_token_id=1.5, intermediate_size=-1,
        num_key_value_heads=2.0, max_position_embeddings=0, rope_theta=float("inf"),
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        config_from_huggingface(fields, {"eos_token_id": "</s>"}, "x/config.json")
    message = str(caught.value)
    assert message.startswith("x/config.json cannot be run:\n  - missing: hidden_size, vocab_size\n")
    for name in (
        "num_hidden_layers", "num_attention_heads", "rms_norm_eps", "tie_word_embeddings", "eos_token_id",
        "bos_token_id", "intermediate_size", "num_key_value_heads", "max_position_embeddings", "rope_theta",
        "generation_config.json: eos_token_id",
    ):  # fmt: skip
        assert f"  - {name} must be " in message


def test_heads_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"num_attention_heads = 5 .* hidden_size 48"):
        config_from_huggingface(config_json(num_attention_heads=5, num_key_value_heads=5))
    with pytest.raises(ConfigError, match="num_heads 6 is no multiple of num_kv_heads 4"):
        config_from_huggingface(config_json(num_key_value_heads=4))
