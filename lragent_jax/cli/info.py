"""`lragent info`: what a model, an adapter or a checkpoint is, and what its cache costs."""

import dataclasses
import json as json_module
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lragent_jax.cli import options
from lragent_jax.cli.console import progress_bar
from lragent_jax.models.errors import CheckpointError
from lragent_jax.sharing import SHARING_MODES

if TYPE_CHECKING:
    from lragent_jax.models.adapter import Adapter
    from lragent_jax.models.config import LlamaConfig


def info(
    path: Annotated[Path, typer.Argument(help="A model, an adapter or a checkpoint.", show_default=False)],
    adapter: options.Adapters = [],  # noqa: B006  (read only)
    model: options.OptionalModel = None,
    dtype: Annotated[str, typer.Option(help="Of the cache whose bytes are counted.")] = "bfloat16",
    recompute_layers: options.RecomputeLayers = None,
    json: options.Json = False,
) -> None:
    """Describe a model, an adapter or a checkpoint: shapes, ranks, targets, A-groups, cache bytes per token by mode."""
    adapters = options.name_path_pairs(adapter, "--adapter")
    layers = options.recompute_layers(recompute_layers, SHARING_MODES)
    from lragent_jax.convert import is_adapter

    with progress_bar() as progress:
        progress(0, 0, f"looking into {path}")
        if not is_adapter(path):
            described = _model(path, adapters, dtype, layers)
        elif adapters or layers is not None:
            raise typer.BadParameter(f"{path} is an adapter; --adapter and --recompute-layers describe a model's cache")
        else:
            described = _adapter(path, model)
    if json:
        print(json_module.dumps(described))
    else:
        _print(described)


def _model(
    path: Path, adapter_folders: Mapping[str, Path], dtype: str, recompute_layers: Sequence[int] | None
) -> dict[str, Any]:
    import jax

    from lragent_jax.cache_cost import cache_bytes_per_token
    from lragent_jax.models.adapter_checkpoint import read_adapter
    from lragent_jax.models.folder import find_model, read_config
    from lragent_jax.models.llama import abstract_params
    from lragent_jax.models.weights import weight_dtype

    kind, _ = find_model(path)
    config, itemsize = read_config(path), weight_dtype(dtype).itemsize
    adapters = {name: read_adapter(folder, config) for name, folder in adapter_folders.items()}
    _, abstract = abstract_params(config, weight_dtype(dtype))
    return {
        "kind": kind.value,
        "path": str(path),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(abstract)),
        "config": dataclasses.asdict(config) | {"eos_token_ids": list(config.eos_token_ids)},
        "adapters": {name: _figures(adapter, config) for name, adapter in adapters.items()},
        "cache_dtype": dtype,
        "cache_bytes_per_token": {
            mode: cache_bytes_per_token(config, list(adapters.values()), mode, itemsize, recompute_layers)
            for mode in SHARING_MODES
        },
    }


def _adapter(path: Path, model: Path | None) -> dict[str, Any]:
    from lragent_jax.models.adapter_checkpoint import MANIFEST_FILE, read_adapter, restore_adapter
    from lragent_jax.models.folder import read_config
    from lragent_jax.models.peft_config import read_peft_config

    config = None if model is None else read_config(model)
    if (path / MANIFEST_FILE).is_file():
        adapter = restore_adapter(path) if config is None else read_adapter(path, config)
        return {"kind": "Orbax adapter", "path": str(path), **_figures(adapter, config)}
    peft = read_peft_config(path)
    if config is None:
        raise CheckpointError(
            f"{path} is a PEFT adapter, which does not say what its model looks like: name the model with --model"
        )
    adapter = read_adapter(path, config)
    figures = {"r": peft.r, "lora_alpha": peft.lora_alpha, "scales": _scales(adapter, peft)}
    return {"kind": "PEFT adapter", "path": str(path), **figures, **_figures(adapter, config)}


def _scales(adapter: "Adapter", peft) -> list[float]:
    """The distinct scales over all modules; they are folded into B."""
    from lragent_jax.models.peft import MODULES

    return sorted({peft.scale(f"model.layers.{layer}.{MODULES[target]}") for layer, target in adapter.weights})


def _figures(adapter: "Adapter", config: "LlamaConfig | None") -> dict[str, Any]:
    layers = {layer for layer, _ in adapter.weights}
    return {
        "parameters": sum(pair.lora_a.size + pair.lora_b.size for pair in adapter.weights.values()),
        "layers": len(layers) if config is None else f"{len(layers)} of {config.num_layers}",
        "ranks": {target: adapter.rank(target) for target in adapter.targets},
        "content_hash": adapter.content_hash,
        "a_group": adapter.a_group_hash,
    }


def _print(described: Mapping[str, Any]) -> None:
    """Nested values as an indented list."""
    from rich.console import Console

    console = Console()

    def show(values: Mapping[str, Any], indent: int) -> None:
        width = max(len(name) for name in values)
        for name, value in values.items():
            if isinstance(value, Mapping) and value:
                console.print(f"{' ' * indent}{name}", markup=False, highlight=False)
                show(value, indent + 2)
            elif value not in ({}, []):
                text = f"{value:,}" if isinstance(value, int) and name.endswith(("parameters", "_per_token")) else value
                console.print(f"{' ' * indent}{name:{width}}  {text}", markup=False, highlight=False, soft_wrap=True)

    show(described, 0)
