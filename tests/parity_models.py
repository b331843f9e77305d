"""Tiny models of every family, and their agents' adapters, as Hugging Face and PEFT folders: made without torch.

Every number is drawn from a seed and its tensor's name, with NumPy's frozen legacy generator, so a folder can be made
again anywhere, bit for bit. What an adapter adapts is said twice, as fields for PEFT and as a table of ranks, so that
no reader of the fields is trusted with it.
"""

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

VOCAB_SIZE = 96

SIZES = {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 2, "max_position_embeddings": 256}
_OLD = {"torch_dtype": "float32", "transformers_version": "4.44.0"}
_NEW = {"dtype": "float32", "transformers_version": "5.0.0"}


def llama3_scaling(original_context: int, **other: Any) -> dict[str, Any]:
    return {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": original_context, **other,
    }  # fmt: skip


# config.json as such folders have it: transformers 4 has rope_theta and rope_scaling, transformers 5 rope_parameters.
# The contexts that llama3 scaling starts from are so short that some frequencies stay, some blend and some stretch.
FAMILIES: dict[str, dict[str, Any]] = {
    # As old as they come: as many key heads as query heads and theta 10 000 go without saying.
    "llama2": _OLD | SIZES | {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 56, "num_attention_heads": 4,
        "rms_norm_eps": 1e-5, "rope_scaling": None, "tie_word_embeddings": False,
    },
    "llama3": _NEW | SIZES | {
        "model_type": "llama", "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    },
    "llama3.1": _NEW | SIZES | {
        "model_type": "llama", "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6, "head_dim": 16,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "rope_parameters": llama3_scaling(32, rope_theta=10_000.0),
    },
    # One key head for all, six frequencies, weights in bfloat16.
    "llama3.2": _OLD | SIZES | {
        "model_type": "llama", "hidden_size": 40, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 12,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 500_000.0,
        "rope_scaling": llama3_scaling(64, factor=32.0), "torch_dtype": "bfloat16",
    },
    "mistral": _NEW | SIZES | {
        "model_type": "mistral", "hidden_size": 32, "intermediate_size": 72, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-3, "sliding_window": None, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    # The window is not in use: a reader that believes `sliding_window` alone is wrong from token 16 on.
    "qwen2": _OLD | SIZES | {
        "model_type": "qwen2", "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6,
        "num_key_value_heads": 3, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 1_000_000.0,
        "use_sliding_window": False, "sliding_window": 16, "max_window_layers": 1,
    },
}  # fmt: skip
SHARDED = ("llama3", "qwen2")

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_SEVEN = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
LAYERS = range(SIZES["num_hidden_layers"])


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """A PEFT adapter. `fields` go into adapter_config.json; `ranks` says what they come to, by projection.

    Adapters of one `shares_a` have their A in common. `layers` are those with weights.
    """

    fields: Mapping[str, Any]
    ranks: Mapping[str, int]
    layers: tuple[int, ...] = tuple(LAYERS)
    shares_a: str | None = None


def _adapter(
    ranks: Mapping[str, int], r: int, alpha: int, layers=tuple(LAYERS), shares_a=None, **fields
) -> AdapterSpec:
    return AdapterSpec({"r": r, "lora_alpha": alpha, **fields}, ranks, layers, shares_a)


def _every(names: tuple[str, ...], rank: int) -> dict[str, int]:
    return dict.fromkeys(names, rank)


_QV = ("q_proj", "v_proj")

# Three agents a set, by "set-agent" (PEFT allows no dot in a name).
ADAPTERS: dict[str, AdapterSpec] = {
    "qv-plan": _adapter(_every(_QV, 4), r=4, alpha=8, shares_a="qv", target_modules=list(_QV)),
    "qv-action": _adapter(_every(_QV, 4), r=4, alpha=12, shares_a="qv", target_modules=list(_QV)),
    "qv-reflect": _adapter(_every(_QV, 3), r=3, alpha=2, use_rslora=True, target_modules=r".*\.self_attn\.[qv]_proj"),
    "all-plan": _adapter(_every(ALL_SEVEN, 4), r=4, alpha=4, shares_a="all", target_modules="all-linear"),
    "all-action": _adapter(
        _every(ALL_SEVEN, 4), r=4, alpha=2, shares_a="all", use_rslora=True, target_modules=list(ALL_SEVEN)
    ),
    "all-reflect": _adapter(
        _every(ALL_SEVEN, 3) | {"k_proj": 2, "v_proj": 5, "down_proj": 1}, r=3, alpha=4,
        target_modules=list(ALL_SEVEN),
        rank_pattern={"k_proj": 2, r"layers\.\d+\.self_attn\.v_proj": 5, "down_proj": 1},
        alpha_pattern={"v_proj": 10, r".*\.mlp\..*": 1},
    ),
    # Parts of the model: half the layers, the same by a regular expression, and modules left out.
    "part-plan": _adapter(
        _every(ATTENTION, 4), r=4, alpha=8, layers=(1,), shares_a="part", target_modules=list(ATTENTION),
        layers_to_transform=[1], layers_pattern="layers",
    ),
    "part-action": _adapter(
        _every(ATTENTION, 4), r=4, alpha=6, layers=(1,), shares_a="part",
        target_modules=r"model\.layers\.1\.self_attn\..*_proj",
    ),
    "part-reflect": _adapter(
        _every(("k_proj", "up_proj"), 2), r=2, alpha=3, target_modules=["k_proj", "v_proj", "up_proj"],
        exclude_modules=["v_proj"],
    ),
}  # fmt: skip
SETS = ("qv", "all", "part")


def adapter_names(family: str) -> list[str]:
    """The agents a family is tried with: q and v, all seven projections, and for two of them parts as well."""
    sets = SETS if family in ("llama2", "llama3.1") else SETS[:2]
    return [name for name in ADAPTERS if name.split("-")[0] in sets]


def draw(seed: int, name: str, shape: tuple[int, ...], scale: float = 1.0, mean: float = 0.0) -> np.ndarray:
    """Normal numbers, f32, that depend on the seed and the name alone."""
    generator = np.random.RandomState(zlib.crc32(f"{seed} {name}".encode()))
    return (mean + scale * generator.standard_normal(shape)).astype(np.float32)


def draw_ids(seed: int, name: str, count: int) -> list[int]:
    """Token ids from anywhere in the vocabulary."""
    generator = np.random.RandomState(zlib.crc32(f"{seed} {name}".encode()))
    return [int(i) for i in generator.randint(0, VOCAB_SIZE, count)]


def projection_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """[out, in] of the seven projections, as Hugging Face stores them."""
    width, mlp_width, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim", width // heads)
    q_width, kv_width = heads * head_dim, config.get("num_key_value_heads", heads) * head_dim
    return {
        "q_proj": (q_width, width), "k_proj": (kv_width, width), "v_proj": (kv_width, width),
        "o_proj": (width, q_width), "gate_proj": (mlp_width, width), "up_proj": (mlp_width, width),
        "down_proj": (width, mlp_width),
    }  # fmt: skip


def _module(layer: int, projection: str) -> str:
    return f"model.layers.{layer}.{'self_attn' if projection in ATTENTION else 'mlp'}.{projection}"


def model_tensors(config: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Weights that keep activations near 1 and make attention look at few tokens rather than at all alike."""
    tensors: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int, scale: float, mean: float = 0.0) -> None:
        tensors[name] = draw(seed, name, shape, scale, mean)

    width = config["hidden_size"]
    add("model.embed_tokens.weight", VOCAB_SIZE, width, scale=1.5 * width**-0.5)
    for layer in LAYERS:
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(f"model.layers.{layer}.{norm}.weight", width, scale=0.2, mean=1.0)
        for projection, (out_width, in_width) in projection_shapes(config).items():
            gain = 1.5 if projection in ("q_proj", "k_proj") else 1.0
            add(f"{_module(layer, projection)}.weight", out_width, in_width, scale=gain * in_width**-0.5)
            if config["model_type"] == "qwen2" and projection in ("q_proj", "k_proj", "v_proj"):
                add(f"{_module(layer, projection)}.bias", out_width, scale=0.5)
    if config["tie_word_embeddings"]:
        # Of both signs, or the best next token would always be the last one: nothing to generate.
        add("model.norm.weight", width, scale=1.0)
    else:
        add("model.norm.weight", width, scale=0.2, mean=1.0)
        add("lm_head.weight", VOCAB_SIZE, width, scale=1.5 * width**-0.5)
    if config.get("torch_dtype") == "bfloat16":
        return {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    return tensors


def adapter_tensors(config: Mapping[str, Any], name: str, seed: int) -> dict[str, np.ndarray]:
    """A and B of an agent, B far from zero: a missing or foreign adapter must show."""
    spec, shapes, tensors = ADAPTERS[name], projection_shapes(config), {}
    for layer in spec.layers:
        for projection, rank in spec.ranks.items():
            (out_width, in_width), module = shapes[projection], _module(layer, projection)
            a_name, b_name = f"{spec.shares_a or name} {module} A", f"{name} {module} B"
            stem = f"base_model.model.{module}.lora"
            tensors[f"{stem}_A.weight"] = draw(seed, a_name, (rank, in_width), in_width**-0.5)
            tensors[f"{stem}_B.weight"] = draw(seed, b_name, (out_width, rank), 0.4 * rank**-0.5)
    return tensors


def write_model(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face folder; `changes` to config.json do not touch the weights, for models that are nearly right."""
    folder.mkdir(parents=True)
    config = FAMILIES[family]
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(tokens | config | changes))
    tensors = model_tensors(config, seed)
    if family not in SHARDED:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    shard_of = {name: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for shard in set(shard_of.values()):
        part = {name: tensor for name, tensor in tensors.items() if shard_of[name] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": shard_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_adapter(folder: Path, family: str, name: str, seed: int = 0) -> Path:
    """A PEFT folder."""
    folder.mkdir(parents=True)
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(fields | dict(ADAPTERS[name].fields)))
    tensors = adapter_tensors(FAMILIES[family], name, seed)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def write_all(folder: Path, family: str, seed: int = 0) -> tuple[Path, dict[str, Path]]:
    """A family's model and adapters under `folder`."""
    adapters = {name: write_adapter(folder / name, family, name, seed) for name in adapter_names(family)}
    return write_model(folder / "model", family, seed), adapters


def fingerprint(family: str, seed: int = 0) -> str:
    """Hash of every weight and configuration of a family, recorded beside what was computed from them."""
    config = FAMILIES[family]
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in adapter_names(family):
        digest.update(json.dumps(dict(ADAPTERS[name].fields), sort_keys=True).encode())
    of_adapters = (adapter_tensors(config, name, seed) for name in adapter_names(family))
    for tensors in (model_tensors(config, seed), *of_adapters):
        for name, tensor in tensors.items():
            digest.update(f"{name} {tensor.shape}".encode() + tensor.astype("<f4").tobytes())
    return digest.hexdigest()
