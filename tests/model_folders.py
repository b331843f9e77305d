"""Tiny models as the files that users bring. Names are spelled out here once more, not taken from the maps."""

import json
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.llama import Params, abstract_params
from lragent_jax.models.weights import leaf_names

TINY = LlamaConfig(
    num_layers=2, width=48, mlp_width=96, num_heads=6, num_kv_heads=2, head_dim=8, vocab_size=128, context_length=512
)  # fmt: skip

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


def config_json(model_type: str = "llama", /, **changes: Any) -> dict[str, Any]:
    """A config.json; a field changed to `...` is left out."""
    fields = {"model_type": model_type, **SIZES, "rope_theta": 10_000.0, "tie_word_embeddings": False}
    if model_type == "mistral":
        fields["sliding_window"] = None
    fields |= changes
    return {name: value for name, value in fields.items() if value is not ...}


def random_weights(config: LlamaConfig, dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights by our names and in our orientation."""
    rng = np.random.default_rng(seed)
    shapes = {"embed": (config.vocab_size, config.width), "norm.scale": (config.width,)}
    if not config.tied_embeddings:
        shapes["unembed"] = (config.width, config.vocab_size)
    for i in range(config.num_layers):
        shapes |= {f"layers.{i}.{norm}.scale": (config.width,) for norm in ("attention_norm", "mlp_norm")}
        for name, (inputs, outputs) in config.projection_shapes().items():
            part = "mlp" if name in ("gate", "up", "down") else "attention"
            shapes[f"layers.{i}.{part}.{name}.kernel"] = (inputs, outputs)
            if config.qkv_bias and name in "qkv":
                shapes[f"layers.{i}.{part}.{name}.bias"] = (outputs,)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def huggingface_tensors(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same by Hugging Face's names, linear maps as [out, in]."""
    parts = {
        "attention_norm.scale": "input_layernorm.weight",
        "mlp_norm.scale": "post_attention_layernorm.weight",
        **{f"attention.{x}.kernel": f"self_attn.{x}_proj.weight" for x in "qkvo"},
        **{f"attention.{x}.bias": f"self_attn.{x}_proj.bias" for x in "qkv"},
        **{f"mlp.{x}.kernel": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
    }
    names = {"embed": "model.embed_tokens.weight", "norm.scale": "model.norm.weight", "unembed": "lm_head.weight"}
    tensors = {}
    for ours, weight in weights.items():
        if ours in names:
            name = names[ours]
        else:
            _, layer, part = ours.split(".", 2)
            name = f"model.layers.{layer}.{parts[part]}"
        tensors[name] = np.ascontiguousarray(weight.T) if ours.endswith("kernel") or ours == "unembed" else weight
    return tensors


def write_huggingface(
    folder: Path,
    fields: dict[str, Any],
    tensors: dict[str, np.ndarray],
    num_shards: int | None = None,
    generation_config: dict[str, Any] | None = None,
) -> Path:
    """A folder with a single file, or with an index and shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    if generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    if num_shards is None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = dict(list(tensors.items())[shard::num_shards])
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def flat(params: Any) -> dict[str, np.ndarray]:
    """Parameters by dotted name, on the host."""
    return dict(zip(leaf_names(params), map(np.asarray, jax.tree.leaves(params)), strict=True))


def as_params(config: LlamaConfig, weights: dict[str, np.ndarray]) -> Params:
    """The weights on the device, as the model takes them."""
    _, abstract = abstract_params(config, next(iter(weights.values())).dtype)
    leaves = [jnp.asarray(weights[name]) for name in leaf_names(abstract)]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def assert_same_weights(params: Any, weights: dict[str, np.ndarray]) -> None:
    """Equal names and equal bits."""
    got = flat(params)
    assert got.keys() == weights.keys()
    for name, want in weights.items():
        np.testing.assert_array_equal(got[name], want, strict=True, err_msg=name)


GGUF_NAMES = {
    "attention_norm.scale": "attn_norm.weight",
    "mlp_norm.scale": "ffn_norm.weight",
    "attention.o.kernel": "attn_output.weight",
    **{f"attention.{x}.kernel": f"attn_{x}.weight" for x in "qkv"},
    **{f"attention.{x}.bias": f"attn_{x}.bias" for x in "qkv"},
    **{f"mlp.{x}.kernel": f"ffn_{x}.weight" for x in ("gate", "up", "down")},
}


def gguf_tensors(
    weights: dict[str, np.ndarray], config: LlamaConfig, architecture: str = "llama"
) -> dict[str, np.ndarray]:
    """The same by llama.cpp's names, with the rows of q and k turned as its converter turns them for Llama."""
    names = {"embed": "token_embd.weight", "norm.scale": "output_norm.weight", "unembed": "output.weight"}
    tensors = {}
    for ours, weight in weights.items():
        _, layer, part = ours.split(".", 2) if ours not in names else ("", "", "")
        name = names.get(ours) or f"blk.{layer}.{GGUF_NAMES[part]}"
        tensor = weight.T if ours.endswith("kernel") or ours == "unembed" else weight
        if architecture == "llama" and part in ("attention.q.kernel", "attention.k.kernel"):
            half = config.head_dim // 2
            # Row 2i of a head is what was row i, row 2i + 1 what was row i + H/2.
            order = [
                h * 2 * half + s * half + i
                for h in range(len(tensor) // (2 * half))
                for i in range(half)
                for s in (0, 1)
            ]
            tensor = tensor[order]
        tensors[name] = np.ascontiguousarray(tensor)
    return tensors


def gguf_fields(config: LlamaConfig, architecture: str = "llama", **changes: Any) -> dict[str, Any]:
    """Metadata; a field changed to `...` is left out. Names of changes have `__` for the dot."""
    fields = {
        "block_count": config.num_layers,
        "context_length": config.context_length,
        "embedding_length": config.width,
        "feed_forward_length": config.mlp_width,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    fields |= {name.replace("__", "."): value for name, value in changes.items()}
    return {f"{architecture}.{name}": value for name, value in fields.items() if value is not ...}


def write_gguf(
    path: Path,
    fields: dict[str, Any],
    tensors: dict[str, np.ndarray],
    architecture: str = "llama",
    quantisation: gguf.GGMLQuantizationType | None = None,
) -> Path:
    """A file whose matrices are quantised, in the writer's own formats, and whose vectors are f32."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields.items():
        add_field(writer, name, value)
    for name, tensor in tensors.items():
        if quantisation is None or tensor.ndim == 1:
            writer.add_tensor(name, tensor.astype(np.float32))
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, quantisation), raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_field(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


BFLOAT16 = ml_dtypes.bfloat16
