"""Hugging Face folders of the Llama family: config.json and safetensors. Their names of things appear here only."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from flax import nnx

from lragent_jax.models import safetensors_folder
from lragent_jax.models.config import Llama3RopeScaling, LlamaConfig
from lragent_jax.models.errors import CheckpointError, ConfigError
from lragent_jax.models.json_file import read_json
from lragent_jax.models.llama import Params, abstract_params
from lragent_jax.models.problems import Fields
from lragent_jax.models.weights import Progress, Shardings, WeightName, fill, weight_dtype

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"

WEIGHT_MAP = (
    WeightName("model.embed_tokens.weight", "embed"),
    WeightName("model.layers.{i}.input_layernorm.weight", "layers.{i}.attention_norm.scale"),
    WeightName("model.layers.{i}.self_attn.q_proj.weight", "layers.{i}.attention.q.kernel", transposed=True),
    WeightName("model.layers.{i}.self_attn.q_proj.bias", "layers.{i}.attention.q.bias"),
    WeightName("model.layers.{i}.self_attn.k_proj.weight", "layers.{i}.attention.k.kernel", transposed=True),
    WeightName("model.layers.{i}.self_attn.k_proj.bias", "layers.{i}.attention.k.bias"),
    WeightName("model.layers.{i}.self_attn.v_proj.weight", "layers.{i}.attention.v.kernel", transposed=True),
    WeightName("model.layers.{i}.self_attn.v_proj.bias", "layers.{i}.attention.v.bias"),
    WeightName("model.layers.{i}.self_attn.o_proj.weight", "layers.{i}.attention.o.kernel", transposed=True),
    WeightName("model.layers.{i}.post_attention_layernorm.weight", "layers.{i}.mlp_norm.scale"),
    WeightName("model.layers.{i}.mlp.gate_proj.weight", "layers.{i}.mlp.gate.kernel", transposed=True),
    WeightName("model.layers.{i}.mlp.up_proj.weight", "layers.{i}.mlp.up.kernel", transposed=True),
    WeightName("model.layers.{i}.mlp.down_proj.weight", "layers.{i}.mlp.down.kernel", transposed=True),
    WeightName("model.norm.weight", "norm.scale"),
    WeightName("lm_head.weight", "unembed", transposed=True),
)
# Rotary frequencies follow from the configuration; old folders stored them.
_DERIVED = r"rotary_emb\.inv_freq$"


@dataclasses.dataclass(frozen=True)
class _Family:
    """What transformers takes where a config.json of this model type is silent.

    `num_kv_heads` None: as many as query heads. `sliding_window` 0: none. `switched_window`: it is in use only with
    `use_sliding_window`, and only from layer `max_window_layers` on.
    """

    num_kv_heads: int | None
    context_length: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    sliding_window: int = 0
    switched_window: bool = False
    qkv_bias: bool = False


_FAMILIES = {
    "llama": _Family(num_kv_heads=None, context_length=2048, bos_token_id=1, eos_token_ids=(2,)),
    "mistral": _Family(
        num_kv_heads=8, context_length=131_072, bos_token_id=1, eos_token_ids=(2,), sliding_window=4096
    ),
    "qwen2": _Family(
        num_kv_heads=32, context_length=32_768, bos_token_id=None, eos_token_ids=(), sliding_window=4096,
        switched_window=True, qkv_bias=True,
    ),
}  # fmt: skip

# Fields that change the mathematics, with the values under which they do not. Absent and null always pass.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "quantization_config": (),
    "compression_config": (),
    # Other attention
    "attention_chunk_size": (),
    "attn_logit_softcapping": (),
    "attn_temperature_tuning": (False,),
    "clip_qkv": (),
    "dual_chunk_attention_config": (),
    "no_rope_layers": ([],),
    "query_pre_attn_scalar": (),
    "qk_norm": (False,),
    "use_qk_norm": (False,),
    "alibi": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    # Multipliers
    "attention_multiplier": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "residual_multiplier": (1,),
    # Experts
    "n_routed_experts": (0,),
    "num_experts": (0,),
    "num_local_experts": (0,),
}


def read_huggingface(
    folder: str | os.PathLike, dtype: Any, shardings: Shardings = None, progress: Progress | None = None
) -> tuple[LlamaConfig, nnx.GraphDef, Params]:
    """Reads a folder of safetensors, single file or sharded, tensor by tensor onto the device.

    Weights become `dtype` and lie as `shardings` says (`None`: on the default device). The host holds two tensors at
    most. Raises `CheckpointError` for files that are missing or damaged, keys that are missing, unused or mis-shaped
    (all in one message, before anything big is read) and numbers that are not finite, and `ConfigError` for
    mathematics that is not supported.
    """
    folder = Path(folder)
    dtype = weight_dtype(dtype)
    config = read_huggingface_config(folder)
    graphdef, abstract = abstract_params(config, dtype)
    stored = safetensors_folder.stored_tensors(folder)
    ignored = re.compile(_DERIVED + r"|^lm_head\.weight$" if config.tied_embeddings else _DERIVED)
    return config, graphdef, fill(abstract, stored, WEIGHT_MAP, ignored, str(folder), shardings, progress)


def read_huggingface_config(folder: str | os.PathLike) -> LlamaConfig:
    """The configuration alone; raises as `read_huggingface` does."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    has_generation_config = (folder / GENERATION_CONFIG_FILE).is_file()
    return config_from_huggingface(
        read_json(folder / CONFIG_FILE),
        read_json(folder / GENERATION_CONFIG_FILE) if has_generation_config else None,
        str(folder / CONFIG_FILE),
    )


def config_from_huggingface(
    config_json: dict[str, Any], generation_config: dict[str, Any] | None = None, source: str = CONFIG_FILE
) -> LlamaConfig:
    """Our configuration from theirs, of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

    Where a field is absent the default of transformers holds. The token ids of `generation_config` win. Raises one
    `ConfigError` that names every field which is missing, of the wrong type, or changes the mathematics in a way that
    is not supported; `source` says in it where they come from.
    """
    model_type = config_json.get("model_type")
    if model_type not in _FAMILIES:
        raise ConfigError(
            f"{source} cannot be run: model_type = {model_type!r} is not supported; there are: {', '.join(_FAMILIES)}"
        )
    family = _FAMILIES[model_type]
    fields = Fields(config_json)
    for name, allowed in _NEUTRAL.items():
        fields.only(name, *allowed)
    if not family.qkv_bias:
        fields.only("attention_bias", False)  # it would put a bias on o_proj too
    num_layers = fields.integer("num_hidden_layers")
    width, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if config_json.get("head_dim") is None and width % num_heads:
        fields.refuse("num_attention_heads", num_heads, f"without head_dim it must divide hidden_size {width}")
    context_length = fields.integer("max_position_embeddings", family.context_length)
    _refuse_sliding_window(fields, family, num_layers, context_length)
    rope_theta, rope_scaling = _rope(fields, context_length)
    bos_token_id = fields.token_id("bos_token_id", _unless_null(fields, "bos_token_id", family.bos_token_id, None))
    eos_token_ids = fields.token_ids("eos_token_id", _unless_null(fields, "eos_token_id", family.eos_token_ids, ()))
    generation = Fields(generation_config or {}, f"{GENERATION_CONFIG_FILE}: ")
    config = {
        "num_layers": num_layers,
        "width": width,
        "mlp_width": fields.integer("intermediate_size"),
        "num_heads": num_heads,
        "num_kv_heads": fields.integer("num_key_value_heads", _default_kv_heads(fields, family, num_heads)),
        "head_dim": fields.integer("head_dim", max(width // num_heads, 1)),
        "vocab_size": fields.integer("vocab_size"),
        "context_length": context_length,
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "qkv_bias": family.qkv_bias,
        "tied_embeddings": fields.boolean("tie_word_embeddings", False),
        "bos_token_id": bos_token_id,
        "eos_token_ids": generation.token_ids("eos_token_id", eos_token_ids),
    }
    fields.problems += generation.problems
    fields.check(source)
    return LlamaConfig(**config)


def _unless_null(fields: Fields, name: str, default: Any, null: Any) -> Any:
    """The default of a field in which null is an answer and not the same as saying nothing."""
    return null if name in fields.values else default


def _default_kv_heads(fields: Fields, family: _Family, num_heads: int) -> int:
    default = num_heads if family.num_kv_heads is None else family.num_kv_heads
    return _unless_null(fields, "num_key_value_heads", default, num_heads)


def _refuse_sliding_window(fields: Fields, family: _Family, num_layers: int, context_length: int) -> None:
    """A window is in use if any layer has one that is shorter than the context."""
    default = _unless_null(fields, "sliding_window", family.sliding_window, 0)
    window = fields.integer("sliding_window", default or context_length)
    layer_types = fields.strings("layer_types")
    if unknown := sorted(set(layer_types) - {"full_attention", "sliding_attention"}):
        fields.refuse("layer_types", unknown, "only full_attention is")
    if layer_types:
        in_use = "sliding_attention" in layer_types
    elif family.switched_window:
        from_layer = fields.integer("max_window_layers", 28, minimum=0)
        in_use = fields.boolean("use_sliding_window", False) and from_layer < num_layers
    else:
        in_use = True
    if in_use and window < context_length:
        absent = "" if "sliding_window" in fields.values else " (the default where the field is absent)"
        fields.refuse("sliding_window", window, f"it is in use, below the context of {context_length}{absent}")


def _rope(fields: Fields, context_length: int) -> tuple[float, Llama3RopeScaling | None]:
    """(theta, scaling) from `rope_scaling` and `rope_theta`, or from `rope_parameters`."""
    rope = fields.nested("rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters")
    fields.only("partial_rotary_factor", 1)
    rope.only("partial_rotary_factor", 1)
    theta = rope.number("rope_theta", fields.number("rope_theta", 10_000.0))
    for name, value in rope.values.items():
        if isinstance(value, dict):
            rope.refuse(name, value, "parameters for one kind of layer; only one set for all layers is")
    key = "rope_type" if "rope_type" in rope.values else "type"
    rope.only(key, "default", "llama3")
    if rope.values.get(key) != "llama3":
        return theta, None
    # As in transformers, the model's own figure wins over that of its scaling.
    inner = rope.integer("original_max_position_embeddings", context_length)
    original = fields.integer("original_max_position_embeddings", inner)
    factor, low, high = (rope.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    if low >= high and rope.values.get("high_freq_factor") is not None:
        rope.refuse("high_freq_factor", high, f"it must be above low_freq_factor {low}")
    return theta, Llama3RopeScaling(factor, low, high, original)
