"""The one door for models of any kind: a Hugging Face folder, a GGUF file, or a checkpoint of ours."""

import enum
import os
from pathlib import Path
from typing import Any

from flax import nnx

from lragent_jax.models import checkpoint, gguf, huggingface
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import CheckpointError
from lragent_jax.models.gguf_file import GGUFFile
from lragent_jax.models.llama import Params
from lragent_jax.models.weights import Progress, Shardings


class ModelKind(enum.Enum):
    HUGGINGFACE = "Hugging Face folder"
    GGUF = "GGUF file"
    CHECKPOINT = "Orbax checkpoint"


def find_model(path: str | os.PathLike) -> tuple[ModelKind, Path]:
    """What lies at `path`, and where: for a folder with one GGUF file, that file. `CheckpointError` if none."""
    path = Path(path)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return ModelKind.GGUF, path
    if path.is_file():
        raise CheckpointError(f"{path} is a file that is no .gguf; name the folder of the model")
    if not path.is_dir():
        raise CheckpointError(f"there is no model at {path}; nothing is downloaded: name a folder or file on this disk")
    if (path / checkpoint.MANIFEST_FILE).is_file():
        return ModelKind.CHECKPOINT, path
    if (path / huggingface.CONFIG_FILE).is_file():
        return ModelKind.HUGGINGFACE, path
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
    if len(files) == 1:
        return ModelKind.GGUF, files[0]
    if files:
        raise CheckpointError(f"{path} holds {len(files)} GGUF files; name one: {', '.join(f.name for f in files)}")
    hint = "; it is an adapter, name the model it was trained on" if (path / "adapter_config.json").is_file() else ""
    raise CheckpointError(
        f"{path} is no model: it holds neither {huggingface.CONFIG_FILE} (Hugging Face) nor {checkpoint.MANIFEST_FILE} "
        f"(Orbax) nor a .gguf file{hint}"
    )


def read_config(path: str | os.PathLike) -> LlamaConfig:
    """The configuration of the model at `path`; raises as `read_model` does."""
    kind, path = find_model(path)
    if kind is ModelKind.GGUF:
        return gguf.config_from_gguf(GGUFFile(path))
    if kind is ModelKind.CHECKPOINT:
        return checkpoint.read_checkpoint_config(path)
    return huggingface.read_huggingface_config(path)


def read_model(
    path: str | os.PathLike, dtype: Any, shardings: Shardings = None, progress: Progress | None = None
) -> tuple[LlamaConfig, nnx.GraphDef, Params]:
    """Reads the model at `path` onto the device, whatever its kind.

    Arguments and errors are those of `read_huggingface`, `read_gguf` and `restore_checkpoint`; besides them
    `CheckpointError` for a path that is none of the three.
    """
    kind, path = find_model(path)
    read = {
        ModelKind.HUGGINGFACE: huggingface.read_huggingface,
        ModelKind.GGUF: gguf.read_gguf,
        ModelKind.CHECKPOINT: checkpoint.restore_checkpoint,
    }[kind]
    return read(path, dtype, shardings, progress)
