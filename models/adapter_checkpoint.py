"""Adapters as Orbax checkpoints, and the one door for adapter folders of any kind.

Orbax is imported where it is used: an engine of other adapters does not wait for that.
"""

import json
import os
from pathlib import Path

import jax
import numpy as np

from lragent_jax.models.adapter import Adapter, LoraWeights
from lragent_jax.models.adapter_bank import TARGETS
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import CheckpointError
from lragent_jax.models.json_file import read_json
from lragent_jax.models.new_folder import new_folder
from lragent_jax.models.peft import read_peft
from lragent_jax.models.peft_config import CONFIG_FILE as PEFT_CONFIG_FILE
from lragent_jax.models.problems import listing

MANIFEST_FILE = "lragent_adapter.json"
FORMAT = "lragent-adapter"
VERSION = 1

_WEIGHTS_FOLDER = "weights"


def save_adapter(folder: str | os.PathLike, adapter: Adapter, *, force: bool = False) -> None:
    """Writes `folder`: a manifest in JSON (format, version, content hash, file sizes) and an Orbax tree of f32 arrays.

    The folder appears whole or not at all. Raises `CheckpointError` for one that exists, unless `force` replaces it.
    """
    import orbax.checkpoint as ocp

    tree = {_key(*place): pair._asdict() for place, pair in adapter.weights.items()}
    with new_folder(folder, marker=MANIFEST_FILE, force=force) as draft:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(draft / _WEIGHTS_FOLDER, tree)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "content_hash": adapter.content_hash,
            "ranks": {target: adapter.rank(target) for target in adapter.targets},
            "places": [[layer, target] for layer, target in adapter.weights],
            "files": _file_sizes(draft),
        }
        (draft / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")


def restore_adapter(folder: str | os.PathLike) -> Adapter:
    """The adapter of `save_adapter`, bit for bit.

    Raises `CheckpointError` for a folder that is none, is of another version, lacks files or parts of them, or whose
    weights are not those that were saved.
    """
    import orbax.checkpoint as ocp

    folder = Path(folder).absolute()
    manifest = _read_manifest(folder)
    sizes = _file_sizes(folder)
    broken = [
        f"{name}: {sizes.get(name, 0)} of {size} bytes"
        for name, size in manifest["files"].items()
        if sizes.get(name) != size
    ]
    if broken:
        raise CheckpointError(listing(f"{folder} is truncated; copy it again:", broken))
    places = [(layer, target) for layer, target in manifest["places"]]
    names = {_key(*place): dict.fromkeys(LoraWeights._fields, 0) for place in places}
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.restore(folder / _WEIGHTS_FOLDER, item=names, restore_args=restore_args)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{folder / _WEIGHTS_FOLDER} is damaged: {error}") from error
    adapter = Adapter({place: LoraWeights(**tree[_key(*place)]) for place in places}, source=str(folder))
    if adapter.content_hash != manifest.get("content_hash"):
        raise CheckpointError(f"{folder} is damaged: its weights are not those that were saved")
    return adapter


def read_adapter(folder: str | os.PathLike, config: LlamaConfig) -> Adapter:
    """The adapter of a PEFT folder or of one written by `save_adapter`, whichever it is, checked against the model.

    Raises `CheckpointError` for a folder that is neither, and what `read_peft` and `restore_adapter` raise.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = ": it is a file" if folder.is_file() else ""
        raise CheckpointError(f"there is no adapter folder {folder}{found}")
    if (folder / PEFT_CONFIG_FILE).is_file():
        return read_peft(folder, config)
    if (folder / MANIFEST_FILE).is_file():
        adapter = restore_adapter(folder)
        adapter.check_fits(config)
        return adapter
    files = (PEFT_CONFIG_FILE, MANIFEST_FILE)
    inside = sorted({path.parent.name for file in files for path in folder.glob(f"*/{file}")})
    hint = f"; its subfolders are: {', '.join(inside)}" if inside else ""
    raise CheckpointError(f"{folder} is no adapter: it holds neither {PEFT_CONFIG_FILE} nor {MANIFEST_FILE}{hint}")


def _read_manifest(folder: Path) -> dict:
    path = folder / MANIFEST_FILE
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not of the format {FORMAT}")
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {manifest.get('version')!r}; this program reads version {VERSION}")
    places, files = manifest.get("places"), manifest.get("files")
    if not isinstance(places, list) or not all(_is_place(place) for place in places):
        raise CheckpointError(f"{path} is damaged: places={places!r} are no pairs of layer and target")
    if not isinstance(files, dict):
        raise CheckpointError(f"{path} is damaged: files={files!r} are no sizes by name")
    return manifest


def _is_place(place) -> bool:
    return isinstance(place, list) and len(place) == 2 and type(place[0]) is int and place[1] in TARGETS


def _file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file of the Orbax tree, by its path in `folder`."""
    files = sorted(path for path in (folder / _WEIGHTS_FOLDER).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _key(layer: int, target: str) -> str:
    return f"{layer}.{target}"
