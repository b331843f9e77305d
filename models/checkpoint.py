"""A model as an Orbax checkpoint: a manifest in JSON beside an Orbax tree, restored into any shardings.

Orbax is imported where it is used: an engine of other weights does not wait for that.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from lragent_jax.models.config import Llama3RopeScaling, LlamaConfig
from lragent_jax.models.errors import CheckpointError, ConfigError
from lragent_jax.models.json_file import read_json
from lragent_jax.models.llama import Params, abstract_params
from lragent_jax.models.new_folder import new_folder
from lragent_jax.models.problems import listing
from lragent_jax.models.weights import Progress, Shardings, leaf_names, leaf_shardings, weight_dtype

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

MANIFEST_FILE = "lragent_model.json"
FORMAT = "lragent-model"
VERSION = 1

_PARAMS_FOLDER = "params"
_CONCURRENT_GB = 4  # how much of the weights the host holds on their way to and from the disk


def save_checkpoint(
    folder: str | os.PathLike,
    config: LlamaConfig,
    params: Params,
    *,
    force: bool = False,
    write_beside: Callable[[Path], None] | None = None,
) -> None:
    """Writes `folder`: a manifest in JSON (format, version, dtype, configuration) and the parameters in Orbax.

    `write_beside` is called with the new folder to add files to it, such as a tokenizer's. The folder appears whole
    or not at all. Raises `CheckpointError` for one that exists, unless `force` replaces it, and `ValueError` for
    parameters that the configuration does not describe.
    """
    import orbax.checkpoint as ocp

    dtype = jax.tree.leaves(params)[0].dtype
    _, abstract = abstract_params(config, dtype)
    if problems := _differences(_flat(params), _flat(abstract), "the parameters"):
        raise ValueError(listing("these parameters do not agree with the configuration:", problems))
    manifest = {"format": FORMAT, "version": VERSION, "dtype": dtype.name, "config": dataclasses.asdict(config)}
    with new_folder(folder, marker=MANIFEST_FILE, force=force) as draft:
        (draft / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        with _checkpointer() as checkpointer:
            checkpointer.save(draft / _PARAMS_FOLDER, args=ocp.args.PyTreeSave(_nested(_flat(params))))
        if write_beside is not None:
            write_beside(draft)


def restore_checkpoint(
    folder: str | os.PathLike, dtype: Any = None, shardings: Shardings = None, progress: Progress | None = None
) -> tuple[LlamaConfig, nnx.GraphDef, Params]:
    """The model of `save_checkpoint`; bit for bit where `dtype` is that of the checkpoint, or `None`.

    Weights lie as `shardings` says (`None`: on the default device). Raises `CheckpointError` for a folder that is
    none, is of another version, is damaged or holds numbers that are not finite.
    """
    folder = Path(folder).absolute()
    config, stored_dtype = _read_manifest(folder)
    graphdef, abstract = abstract_params(config, weight_dtype(stored_dtype if dtype is None else dtype))
    with _checkpointer() as checkpointer:
        _check_stored(checkpointer, folder, abstract)
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
        if progress is not None:
            progress(0, total, str(folder))
        params = _restore(checkpointer, folder / _PARAMS_FOLDER, abstract, shardings)
    finite = jax.tree.leaves(_are_finite(params))
    if bad := [name for name, is_finite in zip(leaf_names(params), finite, strict=True) if not is_finite]:
        raise CheckpointError(listing(f"{folder} holds NaN, infinity or numbers too large for its dtype:", bad))
    if progress is not None:
        progress(total, total, str(folder))
    return config, graphdef, params


def read_checkpoint_config(folder: str | os.PathLike) -> LlamaConfig:
    """The configuration alone; raises as `restore_checkpoint` does."""
    return _read_manifest(Path(folder).absolute())[0]


def _read_manifest(folder: Path) -> tuple[LlamaConfig, str]:
    """(configuration, dtype of the stored weights)"""
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    path = folder / MANIFEST_FILE
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not of the format {FORMAT}")
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {manifest.get('version')!r}; this program reads version {VERSION}")
    try:
        fields = dict(manifest["config"])
        scaling = fields["rope_scaling"]
        fields["rope_scaling"] = None if scaling is None else Llama3RopeScaling(**scaling)
        fields["eos_token_ids"] = tuple(fields["eos_token_ids"])
        return LlamaConfig(**fields), weight_dtype(manifest["dtype"]).name
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _checkpointer() -> "ocp.Checkpointer":
    import orbax.checkpoint as ocp

    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(save_concurrent_gb=_CONCURRENT_GB, restore_concurrent_gb=_CONCURRENT_GB)
    )


def _check_stored(checkpointer: "ocp.Checkpointer", folder: Path, abstract: Params) -> None:
    """Compares what Orbax says it holds with the declaration, before anything big is read."""
    try:
        metadata = checkpointer.metadata(folder / _PARAMS_FOLDER).item_metadata
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / _PARAMS_FOLDER} is missing or damaged: {error}") from error
    if metadata is None:
        raise CheckpointError(f"{folder / _PARAMS_FOLDER} is missing or damaged: Orbax finds no arrays there")
    paths = jax.tree_util.tree_flatten_with_path(metadata.tree)[0]
    stored = {".".join(str(key.key) for key in path): leaf for path, leaf in paths}
    if problems := _differences(stored, _flat(abstract), MANIFEST_FILE):
        raise CheckpointError(listing(f"the parameters in {folder} do not agree with its {MANIFEST_FILE}:", problems))


def _restore(checkpointer: "ocp.Checkpointer", folder: Path, abstract: Params, shardings: Shardings) -> Params:
    import orbax.checkpoint as ocp

    default = jnp.zeros(()).sharding
    placed = jax.tree.unflatten(
        jax.tree.structure(abstract),
        [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or default)
            for leaf, sharding in zip(jax.tree.leaves(abstract), leaf_shardings(abstract, shardings), strict=True)
        ],
    )
    item = _nested(_flat(placed))
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    try:
        tree = checkpointer.restore(folder, args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args))
    except jax.errors.JaxRuntimeError:  # out of device memory, for one: that is no fault of the folder
        raise
    except Exception as error:  # Orbax raises nothing more specific for an array it cannot read
        raise CheckpointError(f"{folder} is damaged: {error.__cause__ or error}") from error
    leaves = [_at(tree, name) for name in leaf_names(abstract)]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


@jax.jit
def _are_finite(params: Params) -> Params:
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), params)


def _flat(params: Any) -> dict[str, Any]:
    return dict(zip(leaf_names(params), jax.tree.leaves(params), strict=True))


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dictionaries within dictionaries, one level per dot."""
    nested: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split(".")
        level = nested
        for parent in parents:
            level = level.setdefault(parent, {})
        level[last] = leaf
    return nested


def _at(nested: Any, name: str) -> Any:
    for key in name.split("."):
        nested = nested[key]
    return nested


def _differences(got: Mapping[str, Any], want: Mapping[str, Any], source: str) -> list[str]:
    return [
        *(f"missing: {name}" for name in want if name not in got),
        *(f"unused: {name}" for name in got if name not in want),
        *(
            f"mis-shaped: {name} is {list(got[name].shape)}, expected {list(want[name].shape)}"
            for name in want
            if name in got and tuple(got[name].shape) != tuple(want[name].shape)
        ),
    ]
