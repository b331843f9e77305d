"""PEFT folders: adapter_config.json beside adapter_model.safetensors, read and written."""

import collections
import json
import os
import re
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from lragent_jax.models.adapter import Adapter, LoraWeights
from lragent_jax.models.adapter_bank import TARGETS
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import AdapterError, CheckpointError
from lragent_jax.models.new_folder import new_folder
from lragent_jax.models.peft_config import CONFIG_FILE, PeftConfig, read_peft_config
from lragent_jax.models.problems import listing
from lragent_jax.models.safetensors_file import SafetensorsFile

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""Where a decoder layer keeps each target, in Hugging Face's names."""

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_WRITTEN_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}

# Saved by PEFT without, dumped from a live model with the name that the adapter had there.
_TENSOR_NAME = re.compile(rf"(?:{re.escape(PREFIX)})?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")


def read_peft(folder: str | os.PathLike, config: LlamaConfig) -> Adapter:
    """The adapter of a PEFT folder, scales folded into B.

    Raises `CheckpointError` for files that are missing, truncated or unreadable, and one `AdapterError` for fields
    that are not supported, or for tensors that do not agree with the folder's own config and the model's shapes:
    missing, unused and mis-shaped ones together, so also for an adapter of another base.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    peft = read_peft_config(folder)
    file = _open_weights(folder)
    names, unused = _index(file)
    root = "" if any(module.startswith("layers.") for module, _ in names) else "model."
    places = {module: place for module, place in _modules(config, root).items() if peft.adapts(module)}
    _check_targets(folder, peft, places, root)
    _check_tensors(folder, file, names, unused, _expected_shapes(config, peft, places))
    weights = {}
    for module, place in places.items():
        lora_a = file.read(names[module, "A"]).astype(np.float32).T
        lora_b = file.read(names[module, "B"]).astype(np.float32).T
        with np.errstate(over="ignore"):  # an infinity is reported below, with its place
            weights[place] = LoraWeights(lora_a, lora_b * np.float32(peft.scale(module)))
    adapter = Adapter(weights, source=str(folder))
    adapter.check_fits(config)
    return adapter


def write_peft(
    folder: str | os.PathLike,
    adapter: Adapter,
    config: LlamaConfig,
    *,
    base_model: str | None = None,
    alpha: int | float | None = None,
    dtype: str = "float32",
    force: bool = False,
) -> None:
    """Writes a folder that PEFT loads to the same mathematics; in f32, reading it back gives the same content hash.

    The scale is in B already, so alpha equals r in every module. With `alpha` that is written for the most common rank
    r, and B as it was before alpha / r was folded in: the same numbers back only where that is a power of two, or up
    to rounding. `base_model` is the name PEFT records for the base; `dtype`, "float32" or "bfloat16", that of the
    tensors. The folder appears whole or not at all. Raises
    `AdapterError` for an adapter that does not fit the model, and `CheckpointError` for a folder that exists, unless
    `force` replaces it.
    """
    adapter.check_fits(config)
    pairs = {module: adapter.weights[p] for module, p in _modules(config, "model.").items() if p in adapter.weights}
    ranks = {module: pair.lora_a.shape[1] for module, pair in pairs.items()}
    [(rank, _)] = collections.Counter(ranks.values()).most_common(1)
    pattern = {module: other for module, other in ranks.items() if other != rank}
    scale = np.float32(1 if alpha is None else alpha / rank)
    everywhere = len(pairs) == len(adapter.targets) * config.num_layers
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank if alpha is None else alpha,
        "rank_pattern": pattern,
        "alpha_pattern": {module: other * float(scale) for module, other in pattern.items()} if alpha else pattern,
        "target_modules": [MODULES[t].split(".")[-1] for t in adapter.targets] if everywhere else list(pairs),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    stored = _WRITTEN_DTYPES[dtype]
    tensors = {}
    for module, pair in pairs.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(pair.lora_a.T, stored)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(pair.lora_b.T / scale, stored)
    with new_folder(folder, marker=CONFIG_FILE, force=force) as draft:
        (draft / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n")
        save_file(tensors, draft / WEIGHTS_FILE, metadata={"format": "pt"})


def _open_weights(folder: Path) -> SafetensorsFile:
    if (folder / WEIGHTS_FILE).is_file():
        return SafetensorsFile(folder / WEIGHTS_FILE)
    if (folder / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"{folder} holds adapter_model.bin, a pickle, which is not read here; load it with PEFT and save it again "
            f"as {WEIGHTS_FILE}"
        )
    raise CheckpointError(f"{folder} holds no {WEIGHTS_FILE}")


def _index(file: SafetensorsFile) -> tuple[dict[tuple[str, str], str], list[str]]:
    """Tensor names by (module path, "A" or "B"), and those that are no LoRA matrix or come twice."""
    names: dict[tuple[str, str], str] = {}
    unused = []
    for name in sorted(file.keys()):
        match = _TENSOR_NAME.fullmatch(name)
        if match is None or (match["module"], match["side"]) in names:
            unused.append(name)
        else:
            names[match["module"], match["side"]] = name
    return names, unused


def _modules(config: LlamaConfig, root: str) -> dict[str, tuple[int, str]]:
    """(layer, target) by module path; `root` is "" for adapters trained on a model without its head."""
    return {
        f"{root}layers.{layer}.{MODULES[target]}": (layer, target)
        for layer in range(config.num_layers)
        for target in TARGETS
    }


def _check_targets(folder: Path, peft: PeftConfig, places: dict[str, tuple[int, str]], root: str) -> None:
    if not peft.all_linear:
        for module in (f"{root}embed_tokens", "lm_head"):
            if peft.adapts(module):
                raise AdapterError(
                    f"{folder / CONFIG_FILE}: target_modules={peft.target_modules!r} adapts {module}, which is not "
                    f"supported; there are: {', '.join(MODULES.values())}"
                )
    if not places:
        raise AdapterError(
            f"{folder / CONFIG_FILE}: target_modules={peft.target_modules!r} (with exclude_modules and "
            "layers_to_transform) adapts no projection of this model"
        )


def _expected_shapes(
    config: LlamaConfig, peft: PeftConfig, places: dict[str, tuple[int, str]]
) -> dict[tuple[str, str], tuple[int, int]]:
    """Shapes as PEFT stores them: A [r, in] and B [out, r]."""
    shapes = {}
    for module, (_, target) in places.items():
        in_width, out_width = config.projection_shapes()[target]
        shapes[module, "A"] = (peft.rank(module), in_width)
        shapes[module, "B"] = (out_width, peft.rank(module))
    return shapes


def _check_tensors(
    folder: Path,
    file: SafetensorsFile,
    names: dict[tuple[str, str], str],
    unused: list[str],
    expected: dict[tuple[str, str], tuple[int, int]],
) -> None:
    problems = []
    for (module, side), shape in expected.items():
        name = names.get((module, side))
        if name is None:
            problems.append(f"missing: {PREFIX}{module}.lora_{side}.weight")
        elif file.shape(name) != shape:
            problems.append(f"mis-shaped: {name} is {list(file.shape(name))}, expected {list(shape)}")
        elif file.dtype(name).name not in _DTYPES:
            problems.append(f"unreadable: {name} is {file.dtype(name)}, expected one of {', '.join(_DTYPES)}")
    unused = [*unused, *(name for key, name in names.items() if key not in expected)]
    problems += [f"unused: {name}" for name in sorted(unused)]
    if problems:
        head = f"the tensors of {folder} do not agree with its {CONFIG_FILE} and this model (another base?):"
        raise AdapterError(listing(head, problems))
