"""GGUF files of Llama architecture, as llama.cpp's converter writes them: their names and their rotary layout."""

import dataclasses
import os
import re
from typing import Any

import numpy as np
from flax import nnx

from lragent_jax.models.config import Llama3RopeScaling, LlamaConfig
from lragent_jax.models.errors import CheckpointError, ConfigError
from lragent_jax.models.gguf_file import GGUFFile
from lragent_jax.models.llama import Params, abstract_params
from lragent_jax.models.problems import Fields
from lragent_jax.models.rope import inverse_frequencies
from lragent_jax.models.weights import Progress, Shardings, StoredTensor, WeightName, fill, weight_dtype

WEIGHT_MAP = (
    WeightName("token_embd.weight", "embed"),
    WeightName("blk.{i}.attn_norm.weight", "layers.{i}.attention_norm.scale"),
    WeightName("blk.{i}.attn_q.weight", "layers.{i}.attention.q.kernel", transposed=True),
    WeightName("blk.{i}.attn_q.bias", "layers.{i}.attention.q.bias"),
    WeightName("blk.{i}.attn_k.weight", "layers.{i}.attention.k.kernel", transposed=True),
    WeightName("blk.{i}.attn_k.bias", "layers.{i}.attention.k.bias"),
    WeightName("blk.{i}.attn_v.weight", "layers.{i}.attention.v.kernel", transposed=True),
    WeightName("blk.{i}.attn_v.bias", "layers.{i}.attention.v.bias"),
    WeightName("blk.{i}.attn_output.weight", "layers.{i}.attention.o.kernel", transposed=True),
    WeightName("blk.{i}.ffn_norm.weight", "layers.{i}.mlp_norm.scale"),
    WeightName("blk.{i}.ffn_gate.weight", "layers.{i}.mlp.gate.kernel", transposed=True),
    WeightName("blk.{i}.ffn_up.weight", "layers.{i}.mlp.up.kernel", transposed=True),
    WeightName("blk.{i}.ffn_down.weight", "layers.{i}.mlp.down.kernel", transposed=True),
    WeightName("output_norm.weight", "norm.scale"),
    WeightName("output.weight", "unembed", transposed=True),
)
ROPE_FACTORS = "rope_freqs.weight"
# Rotary factors go into the configuration; per-layer frequencies, in old files, follow from it.
_DERIVED = re.compile(rf"^{re.escape(ROPE_FACTORS)}$|\.attn_rot_embd\.weight$")

_ARCHITECTURES = ("llama", "qwen2")
# The converter turns these rows from half-split to interleaved rotary pairs, for this architecture.
_INTERLEAVED = re.compile(r"\.attn_[qk]\.weight$")
_INTERLEAVED_ARCHITECTURE = "llama"

# Fields that change the mathematics, with the values under which they do not. Absent always passes.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none", "linear"),  # the factor decides
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "expert_count": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "use_parallel_residual": (False,),
}


def read_gguf(
    path: str | os.PathLike, dtype: Any, shardings: Shardings = None, progress: Progress | None = None
) -> tuple[LlamaConfig, nnx.GraphDef, Params]:
    """Reads a GGUF file, dequantising tensor by tensor onto the device.

    Weights become `dtype` and lie as `shardings` says (`None`: on the default device). The host holds two tensors at
    most, as `dtype`. Raises `CheckpointError` for a file that is missing, truncated or damaged, tensors that are
    missing, unused, mis-shaped or of a quantisation that cannot be read (all in one message, before anything big is
    read) and numbers that are not finite, and `ConfigError` for mathematics that is not supported.
    """
    dtype = weight_dtype(dtype)
    file = GGUFFile(path)
    config = config_from_gguf(file)
    graphdef, abstract = abstract_params(config, dtype)
    stored = {name: _stored_tensor(file, name, config, dtype) for name in file.tensors}
    return config, graphdef, fill(abstract, stored, WEIGHT_MAP, _DERIVED, str(file.path), shardings, progress)


def config_from_gguf(file: GGUFFile) -> LlamaConfig:
    """The configuration in a file's metadata.

    Raises one `ConfigError` that names every field which is missing, of the wrong type, or changes the mathematics in
    a way that is not supported.
    """
    architecture = _architecture(file)
    fields = _fields(file, architecture)
    for name, allowed in _NEUTRAL.items():
        fields.only(name, *allowed)
    width, num_heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    if "attention.key_length" not in fields.values and width % num_heads:
        fields.refuse("attention.head_count", num_heads, f"without attention.key_length it must divide {width}")
    head_dim = fields.integer("attention.key_length", max(width // num_heads, 1))
    fields.only("attention.value_length", head_dim)
    fields.only("rope.dimension_count", head_dim)
    context_length = fields.integer("context_length")
    window = fields.integer("attention.sliding_window", context_length)
    if window < context_length:
        fields.refuse("attention.sliding_window", window, f"it is in use, below the context of {context_length}")
    # Arrays of rows, where the metadata says nothing; a missing embedding is reported with the other tensors.
    embedding = file.tensors.get("token_embd.weight")
    config = {
        "num_layers": fields.integer("block_count"),
        "width": width,
        "mlp_width": fields.integer("feed_forward_length"),
        "num_heads": num_heads,
        "num_kv_heads": fields.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "vocab_size": fields.integer("vocab_size", embedding.shape[0] if embedding else None),
        "context_length": context_length,
        "rope_theta": fields.number("rope.freq_base", 10_000.0),
        "norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
    }
    special = Fields(file.metadata)
    # End of text, of turn and of message: each ends an answer.
    ends = [special.token_id(f"tokenizer.ggml.{name}_token_id", None) for name in ("eos", "eot", "eom")]
    bos_token_id = special.token_id("tokenizer.ggml.bos_token_id", None)
    fields.problems += special.problems
    fields.check(str(file.path))
    unscaled = LlamaConfig(
        **config,
        qkv_bias=architecture == "qwen2",
        tied_embeddings="output.weight" not in file.tensors,
        bos_token_id=bos_token_id,
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
    )
    return dataclasses.replace(unscaled, rope_scaling=_rope_scaling(file, unscaled))


def _architecture(file: GGUFFile) -> str:
    metadata = file.metadata
    if metadata.get("split.count", 0) not in (0, 1):
        raise CheckpointError(
            f"{file.path} is one of {metadata['split.count']} parts; merge them with llama-gguf-split"
        )
    if metadata.get("general.type", "model") != "model":
        raise CheckpointError(f"{file.path} holds no model: general.type = {metadata['general.type']!r}")
    architecture = metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ConfigError(
            f"{file.path} cannot be run: general.architecture = {architecture!r} is not supported; there are: "
            f"{', '.join(_ARCHITECTURES)}"
        )
    return architecture


def _fields(file: GGUFFile, architecture: str) -> Fields:
    """The architecture's fields; one given per layer and the same in all counts as given once."""
    prefix = f"{architecture}."
    values = {}
    for name, value in file.metadata.items():
        if name.startswith(prefix):
            same = isinstance(value, list) and value == value[:1] * len(value) and value
            values[name.removeprefix(prefix)] = value[0] if same else value
    return Fields(values, prefix)


def _rope_scaling(file: GGUFFile, config: LlamaConfig) -> Llama3RopeScaling | None:
    """Llama 3.1's scaling, found again from the factors per frequency that the converter made of it."""
    if ROPE_FACTORS not in file.tensors:
        return None
    factors = file.read(ROPE_FACTORS, np.dtype(np.float32))
    base = inverse_frequencies(config)
    if factors.shape != base.shape:
        raise CheckpointError(f"{file.path}: {ROPE_FACTORS} is {list(factors.shape)}, expected {list(base.shape)}")
    if np.all(factors == 1):
        return None
    scaling = Llama3RopeScaling(
        factor=float(factors.max()), low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=8192
    )
    scaled = inverse_frequencies(dataclasses.replace(config, rope_scaling=scaling))
    if not np.allclose(base / scaled, factors, rtol=1e-4, atol=0):
        raise ConfigError(
            f"{file.path} cannot be run: {ROPE_FACTORS} is not supported: its factors ({factors.min():g} to "
            f"{factors.max():g}) are not those of Llama 3.1's scaling of a context of 8192 tokens"
        )
    return scaling


def _stored_tensor(file: GGUFFile, name: str, config: LlamaConfig, dtype: np.dtype) -> StoredTensor:
    tensor = file.tensors[name]
    interleaved = file.metadata["general.architecture"] == _INTERLEAVED_ARCHITECTURE and _INTERLEAVED.search(name)

    def read() -> np.ndarray:
        numbers = file.read(name, dtype)
        return half_split(numbers, config.head_dim) if interleaved else numbers

    return StoredTensor(name, tensor.shape, tensor.num_bytes, read, file.unreadable(name))


def half_split(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of q or k [heads * H, D] from interleaved rotary pairs (2i, 2i + 1) to half-split ones (i, i + H/2)."""
    pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
