"""PEFT's adapter_config.json: which modules it adapts, with which rank and scale, and what we refuse to run."""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lragent_jax.models.errors import AdapterError
from lragent_jax.models.json_file import read_json
from lragent_jax.models.problems import listing

CONFIG_FILE = "adapter_config.json"

# PEFT's defaults (peft/tuners/lora/config.py). Where a folder leaves the targets out, PEFT asks a table of model
# types, which says q_proj and v_proj for Llama, Mistral and Qwen2.
_DEFAULT_RANK = 8
_DEFAULT_ALPHA = 8
_DEFAULT_TARGETS = ("q_proj", "v_proj")

_READ = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "bias", "init_lora_weights",
}  # fmt: skip
# They say where an adapter comes from or how it was trained, not what it computes.
_HARMLESS = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
    "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
_REFUSED = {
    "use_dora": "DoRA rescales the base weights",
    "modules_to_save": "whole modules are replaced",
    "trainable_token_indices": "embeddings are changed",
    "layer_replication": "the model gets other layers",
    "lora_bias": "B has a bias",
    "fan_in_fan_out": "the weights are stored transposed",
    "megatron_config": "the weights are split over Megatron's ranks",
    "alora_invocation_tokens": "activated LoRA switches on in the middle of a text",
    "target_parameters": "parameters that are no linear layers are adapted",
    "use_qalora": "QALoRA pools the inputs",
    "arrow_config": "Arrow routes between adapters",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "kasa_config": "KaSA truncates the base weights",
    "monteclora_config": "MonteCLoRA samples its weights",
    "velora_config": "VeLoRA keeps projections of its own",
}
# Other initialisations subtract the start of A B from the base weights, so the folder is half of the adapter.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """What decides the mathematics of a PEFT LoRA adapter; modules go by their paths in the base model.

    Patterns are matched as PEFT matches them: `rank_pattern` and `alpha_pattern` as regular expressions over a whole
    path or its tail from a dot on, the first one that matches counting; `target_modules` and `exclude_modules` as a
    regular expression over the whole path, or as a list of paths or tails.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str
    layers_to_transform: frozenset[int]  # empty: all
    layers_pattern: tuple[str, ...]  # empty: whatever stands in front of the number

    @property
    def all_linear(self) -> bool:
        """PEFT's shorthand for every linear module but the head."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    def adapts(self, module: str) -> bool:
        """Whether the adapter has weights for the linear module at this path."""
        if self.exclude_modules and _matches(self.exclude_modules, module):
            return False
        if self.all_linear:
            return True
        if not _matches(self.target_modules, module):
            return False
        if not self.layers_to_transform or module in self.target_modules:
            return True
        lists = "|".join(f"(?:{pattern})" for pattern in self.layers_pattern) or "[^.]*"
        layer = re.match(rf".*?\.(?:{lists})\.(\d+)\.", module)
        return layer is not None and int(layer[1]) in self.layers_to_transform

    def rank(self, module: str) -> int:
        return self.rank_pattern.get(_first_pattern(self.rank_pattern, module), self.r)

    def scale(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA (arXiv 2312.03732)."""
        alpha = self.alpha_pattern.get(_first_pattern(self.alpha_pattern, module), self.lora_alpha)
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_peft_config(folder: Path) -> PeftConfig:
    """Reads `folder`/adapter_config.json.

    Raises `CheckpointError` for a file that is missing or no JSON object, and one `AdapterError` that names every
    field we cannot honour.
    """
    path = folder / CONFIG_FILE
    fields = read_json(path)
    if fields.get("peft_type") != "LORA":  # its other fields mean something else
        raise AdapterError(f"{path} has peft_type={fields.get('peft_type')!r}; only LORA adapters can be read")
    problems = _unsupported(fields)
    config = _parse(fields, problems)
    if problems:
        raise AdapterError(listing(f"{path} asks for what is not supported:", problems))
    return config


def _unsupported(fields: dict[str, Any]) -> list[str]:
    problems = []
    for name, value in fields.items():
        if name in _REFUSED and value:
            problems.append(f"{name}={value!r}: {_REFUSED[name]}")
        elif name not in _READ | _HARMLESS | _REFUSED.keys() and value:
            problems.append(f"{name}={value!r}: an unknown field that may change the mathematics")
    if fields.get("bias", "none") != "none":
        problems.append(f"bias={fields['bias']!r}: biases of the base are changed")
    init = fields.get("init_lora_weights", True)
    if (init.lower() if isinstance(init, str) else init) not in _INITIALISATIONS:
        problems.append(
            f"init_lora_weights={init!r}: the base weights were changed; let PEFT convert the adapter to plain LoRA "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return problems


def _parse(fields: dict[str, Any], problems: list[str]) -> PeftConfig:
    """The config; a field of the wrong kind gets its default and is added to `problems`."""

    def take(name: str, default, is_valid: Callable[[Any], bool], meaning: str):
        value = fields.get(name)
        if value is None:
            return default
        if not is_valid(value):
            problems.append(f"{name}={value!r}: must be {meaning}")
            return default
        return value

    def dict_of(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
        return lambda value: (
            isinstance(value, dict) and all(_is_regex(k) for k in value) and all(map(is_valid, value.values()))
        )

    names = "a list of module names or a regular expression"
    targets = take("target_modules", _DEFAULT_TARGETS, _is_names, names)
    layers = take("layers_to_transform", (), lambda v: _is_index(v) or _is_list(v, _is_index), "layer numbers")
    if isinstance(targets, str) and layers != ():
        problems.append("layers_to_transform goes with a list in target_modules, not with a regular expression")
    alphas = take("alpha_pattern", {}, dict_of(_is_alpha), "regular expressions with finite numbers")
    patterns = take("layers_pattern", (), lambda v: _is_regex(v) or _is_list(v, _is_regex), "names of layer lists")
    return PeftConfig(
        r=take("r", _DEFAULT_RANK, _is_rank, "a positive integer"),
        lora_alpha=float(take("lora_alpha", _DEFAULT_ALPHA, _is_alpha, "a finite number")),
        use_rslora=take("use_rslora", False, lambda v: isinstance(v, bool), "true or false"),
        rank_pattern=take("rank_pattern", {}, dict_of(_is_rank), "regular expressions with positive integers"),
        alpha_pattern={pattern: float(alpha) for pattern, alpha in alphas.items()},
        target_modules=_names(targets),
        exclude_modules=_names(take("exclude_modules", (), _is_names, names)),
        layers_to_transform=frozenset([layers] if isinstance(layers, int) else layers),
        layers_pattern=(patterns,) if isinstance(patterns, str) and patterns else tuple(patterns),
    )


def _names(value) -> tuple[str, ...] | str:
    return value if isinstance(value, str) else tuple(value)


def _matches(names: tuple[str, ...] | str, module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _first_pattern(patterns: dict[str, Any], module: str) -> str | None:
    return next((pattern for pattern in patterns if re.match(rf"(?:.*\.)?(?:{pattern})$", module)), None)


def _is_list(value, is_item: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(is_item, value))


def _is_names(value) -> bool:
    return _is_regex(value) or _is_list(value, lambda item: isinstance(item, str))


def _is_regex(value) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except re.error:
        return False


def _is_rank(value) -> bool:
    return type(value) is int and value > 0


def _is_index(value) -> bool:
    return type(value) is int and value >= 0


def _is_alpha(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
