"""The tensors of a model folder: of one safetensors file, or of the shards that an index names."""

import functools
from pathlib import Path

import numpy as np

from lragent_jax.models.errors import CheckpointError
from lragent_jax.models.json_file import read_json
from lragent_jax.models.problems import listing
from lragent_jax.models.safetensors_file import SafetensorsFile
from lragent_jax.models.weights import StoredTensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOATS = ("float32", "bfloat16", "float16", "float64")


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors by name, file after file, none of them read yet.

    Raises `CheckpointError` for a folder without safetensors, an index that disagrees with its shards, and damaged
    files.
    """
    if (folder / SINGLE_FILE).is_file():
        return _tensors_of(folder / SINGLE_FILE)
    if (folder / INDEX_FILE).is_file():
        return _tensors_of_shards(folder)
    if any(folder.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{folder} holds PyTorch weights only (pytorch_model.bin), which are not read here; convert them to "
            "safetensors, for example by saving the model once more with transformers"
        )
    if files := sorted(path.name for path in folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}, which would say which weight is in which of its "
            f"files: {', '.join(files[:3])}{', …' if len(files) > 3 else ''}"
        )
    raise CheckpointError(f"{folder} holds no weights: there is neither {SINGLE_FILE} nor {INDEX_FILE}")


def _tensors_of(path: Path) -> dict[str, StoredTensor]:
    file = SafetensorsFile(path)
    return {name: _stored_tensor(file, name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)


def _stored_tensor(file: SafetensorsFile, name: str) -> StoredTensor:
    shape, dtype = file.shape(name), file.dtype(name)
    return StoredTensor(
        name=name,
        shape=shape,
        num_bytes=int(np.prod(shape)) * dtype.itemsize,
        read=functools.partial(_read, file.path, name),
        unreadable=None if dtype.name in FLOATS else f"stored as {dtype.name}; weights must be {', '.join(FLOATS)}",
    )


def _read(path: Path, name: str) -> np.ndarray:
    # A map of its own for each tensor, dropped after the copy: pages of a map count as the process's memory as long
    # as it lives, and an array over one would change, or fault, with the file.
    tensor = SafetensorsFile(path).read(name)
    return tensor.astype(np.float32) if tensor.dtype == np.float64 else np.array(tensor)


def _tensors_of_shards(folder: Path) -> dict[str, StoredTensor]:
    index = folder / INDEX_FILE
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to file names")
    shards = sorted(set(shard_of.values()))
    if outside := [shard for shard in shards if Path(shard).name != shard]:
        raise CheckpointError(f"{index} names files outside its folder: {', '.join(outside)}")
    if absent := [shard for shard in shards if not (folder / shard).is_file()]:
        raise CheckpointError(f"{folder} lacks files that {INDEX_FILE} names: {', '.join(absent)}; download them")
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        # Of a tensor that lies in two shards the index says which one counts.
        tensors |= {name: t for name, t in _tensors_of(folder / shard).items() if shard_of.get(name, shard) == shard}
    if misplaced := [f"{name} is not in {shard}" for name, shard in shard_of.items() if name not in tensors]:
        raise CheckpointError(listing(f"{index} does not agree with its files:", misplaced))
    return tensors
