"""Models and adapters from one format to another."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from lragent_jax.models.adapter import Adapter, stack_adapters
from lragent_jax.models.adapter_checkpoint import MANIFEST_FILE, read_adapter, save_adapter
from lragent_jax.models.checkpoint import MANIFEST_FILE as MODEL_MANIFEST_FILE
from lragent_jax.models.checkpoint import save_checkpoint
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import CheckpointError, InputError
from lragent_jax.models.folder import read_config, read_model
from lragent_jax.models.huggingface import CONFIG_FILE
from lragent_jax.models.new_folder import check_free
from lragent_jax.models.peft import write_peft
from lragent_jax.models.peft_config import CONFIG_FILE as PEFT_CONFIG_FILE
from lragent_jax.models.weights import Progress
from lragent_jax.tokenizer import load_tokenizer

AdapterFormat = Literal["orbax", "peft"]
ADAPTER_FORMATS: tuple[AdapterFormat, ...] = ("orbax", "peft")


def is_adapter(path: str | os.PathLike) -> bool:
    """Whether a folder holds an adapter rather than a model."""
    path = Path(path)
    return (path / MANIFEST_FILE).is_file() or (
        (path / PEFT_CONFIG_FILE).is_file() and not (path / CONFIG_FILE).is_file()
    )


def convert_model(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    dtype: str = "bfloat16",
    force: bool = False,
    progress: Progress | None = None,
) -> LlamaConfig:
    """Writes a Hugging Face folder, a GGUF file or a checkpoint as an Orbax checkpoint, tokenizer included.

    Raises what `read_model`, `load_tokenizer` and `save_checkpoint` raise; `out` appears whole or not at all, and is
    refused before anything is read.
    """
    check_free(out, marker=MODEL_MANIFEST_FILE, force=force)
    tokenizer = load_tokenizer(source)
    config, _, params = read_model(source, dtype, progress=progress)
    save_checkpoint(out, config, params, force=force, write_beside=tokenizer.save if tokenizer else None)
    return config


def convert_adapter(
    source: str | os.PathLike,
    out: str | os.PathLike,
    model: str | os.PathLike,
    *,
    to: AdapterFormat = "orbax",
    force: bool = False,
) -> Adapter:
    """Writes a PEFT folder or an Orbax adapter in the other's format, checked against the `model` it belongs to.

    Raises what `read_config`, `read_adapter`, `save_adapter` and `write_peft` raise, for `out` before anything is read.
    """
    check_free(out, marker=_marker(to), force=force)
    config = read_config(model)
    adapter = read_adapter(source, config)
    _write(out, adapter, config, model, to, force)
    return adapter


def stack(
    sources: Mapping[str, str | os.PathLike],
    out: str | os.PathLike,
    model: str | os.PathLike,
    *,
    to: AdapterFormat = "orbax",
    force: bool = False,
) -> dict[str, Adapter]:
    """Makes adapters that were trained apart one A-group (`stack_adapters`) and writes a folder per agent under `out`.

    Raises `InputError` for names that are no folder names, `CheckpointError` if one of the folders is there already
    (unless `force` replaces it), before anything is written; and what `read_adapter` and `stack_adapters` raise.
    """
    stacked = read_stacked(sources, out, model, to=to, force=force)
    write_adapters(stacked, out, model, to=to, force=force)
    return stacked


def read_stacked(
    sources: Mapping[str, str | os.PathLike],
    out: str | os.PathLike,
    model: str | os.PathLike,
    *,
    to: AdapterFormat = "orbax",
    force: bool = False,
) -> dict[str, Adapter]:
    """What `stack` will write, and all that it checks; nothing is written."""
    for name in sources:
        if name in ("", ".", "..") or Path(name).name != name:
            raise InputError(f"{name!r} cannot be the name of a folder; call the agent something else")
    folders = [Path(out) / name for name in sources]
    if taken := [str(folder) for folder in folders if folder.exists() and not force]:
        raise CheckpointError(f"there already: {', '.join(taken)}; name another folder, or pass force to replace them")
    for folder in folders:
        check_free(folder, marker=_marker(to), force=force)
    config = read_config(model)
    adapters = [read_adapter(source, config) for source in sources.values()]
    return dict(zip(sources, stack_adapters(adapters), strict=True))


def write_adapters(
    adapters: Mapping[str, Adapter],
    out: str | os.PathLike,
    model: str | os.PathLike,
    *,
    to: AdapterFormat = "orbax",
    force: bool = False,
) -> None:
    """A folder per agent under `out`, each whole or not at all."""
    config = read_config(model)
    for name, adapter in adapters.items():
        _write(Path(out) / name, adapter, config, model, to, force)


def _marker(to: str) -> str:
    """The file that every adapter folder of a format holds. Raises `InputError` for a format that is none."""
    markers = {"orbax": MANIFEST_FILE, "peft": PEFT_CONFIG_FILE}
    if to not in markers:
        raise InputError(f"adapters are written as {' or '.join(ADAPTER_FORMATS)}, not {to!r}")
    return markers[to]


def _write(
    out: str | os.PathLike, adapter: Adapter, config: LlamaConfig, model: str | os.PathLike, to: str, force: bool
) -> None:
    if to == "orbax":
        save_adapter(out, adapter, force=force)
    else:
        write_peft(out, adapter, config, base_model=str(model), force=force)
