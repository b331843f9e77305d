"""GGUF files: metadata, a place for every tensor, the bytes.

The header is parsed here: the `gguf` package's reader takes seconds for the vocabulary of one file and finds a
truncated one by failing in numpy. Its tables of block formats and its dequantisation are used as they are.
(Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.)
"""

import dataclasses
import functools
import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize

from lragent_jax.models.errors import CheckpointError
from lragent_jax.models.problems import listing

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
NUMBERS_AT_ONCE = 1 << 22  # dequantised together; bounds the f32 copies that takes

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies: `shape` in numpy's order, the name of its block format, its bytes in the file."""

    shape: tuple[int, ...]
    format: str
    offset: int
    num_bytes: int


class GGUFFile:
    """One file's `metadata` and `tensors`, both by name; numbers are read with `read`.

    Opening proves that every tensor lies whole inside the file. Raises `CheckpointError` for a file that is missing,
    truncated, no GGUF, or of a version or byte order that is not read here.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self.metadata, self.tensors = _Header(data, self.path).read()
        except FileNotFoundError:
            raise CheckpointError(f"there is no file {self.path}") from None
        except (OSError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error

    def unreadable(self, name: str) -> str | None:
        """Why a tensor cannot be turned into numbers here, if it cannot."""
        block_format = self.tensors[name].format
        return None if _is_readable(block_format) else f"{block_format}, which the gguf package does not dequantise"

    def read(self, name: str, dtype: np.dtype) -> np.ndarray:
        """The tensor's numbers as `dtype`, dequantised a few rows at a time."""
        tensor = self.tensors[name]
        *outer, width = tensor.shape
        num_rows = math.prod(outer)
        row_bytes = tensor.num_bytes // num_rows
        numbers = np.empty((num_rows, width), dtype)
        step = max(1, NUMBERS_AT_ONCE // width)
        for start in range(0, num_rows, step):
            rows = min(step, num_rows - start)
            stored = np.fromfile(self.path, np.uint8, rows * row_bytes, offset=tensor.offset + start * row_bytes)
            blocks = stored.reshape(rows, row_bytes)
            with np.errstate(
                over="ignore", invalid="ignore"
            ):  # what does not fit becomes infinity, for the caller to find
                numbers[start : start + rows] = dequantize(blocks, gguf.GGMLQuantizationType[tensor.format])
        return numbers.reshape(tensor.shape)


@functools.cache
def _is_readable(block_format: str) -> bool:
    code = gguf.GGMLQuantizationType[block_format]
    try:
        dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[code][1]), np.uint8), code)
    except NotImplementedError:
        return False
    return True


class _Header:
    """A cursor over the head of a file."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.position = data, path, 0

    def read(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        magic = bytes(self.data[:4])
        if magic != b"GGUF":
            raise CheckpointError(f"{self.path} is no GGUF file: it begins with {magic!r}")
        self.position = 4
        version = self.scalar("<I")
        if version not in VERSIONS:
            hint = "it is big-endian" if version & 0xFFFF == 0 else f"versions {VERSIONS} are"
            raise CheckpointError(f"{self.path} has GGUF version {version}, which is not read here: {hint}")
        num_tensors, num_fields = self.scalar("<Q"), self.scalar("<Q")
        metadata = {}
        for _ in range(num_fields):
            name = self.string()
            metadata[name] = self.value(self.scalar("<I"))
        entries = [self.entry() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise CheckpointError(f"{self.path} is damaged: general.alignment = {alignment!r}")
        start = -(-self.position // alignment) * alignment
        return metadata, self.tensors(entries, start)

    def tensors(self, entries: list[tuple[str, tuple[int, ...], int, int]], start: int) -> dict[str, GGUFTensor]:
        tensors, problems = {}, []
        for name, shape, code, offset in entries:
            try:
                block_format = gguf.GGMLQuantizationType(code)
            except ValueError:
                raise CheckpointError(f"{self.path}: {name} is of type {code}, which this gguf package lacks") from None
            block_size, block_bytes = gguf.GGML_QUANT_SIZES[block_format]
            num_bytes = math.prod(shape) // block_size * block_bytes
            if not shape or 0 in shape or shape[-1] % block_size:
                problems.append(f"{name} of shape {list(shape)} cannot be {block_format.name}")
            elif start + offset + num_bytes > len(self.data):
                problems.append(f"{name} ends at byte {start + offset + num_bytes}, the file at {len(self.data)}")
            tensors[name] = GGUFTensor(shape, block_format.name, start + offset, num_bytes)
        if problems:
            raise CheckpointError(listing(f"{self.path} is truncated or damaged:", problems))
        return tensors

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape in numpy's order, type, offset)"""
        name = self.string()
        shape = tuple(self.scalar("<Q") for _ in range(self.scalar("<I")))[::-1]
        return name, shape, self.scalar("<I"), self.scalar("<Q")

    def scalar(self, code: str) -> Any:
        [value] = struct.unpack(code, self.take(struct.calcsize(code)))
        return value

    def string(self) -> str:
        return self.take(self.scalar("<Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            value = self.scalar(_SCALARS[kind])
            # The shortest decimal that is the same float32: 1e-05, where Python would widen it to 9.99999974e-06.
            return float(str(np.float32(value))) if kind == _FLOAT32 else value
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise CheckpointError(f"{self.path} is damaged: metadata of type {kind}")
        kind, length = self.scalar("<I"), self.scalar("<Q")
        if kind in _SCALARS:
            code = _SCALARS[kind][1:]
            return list(struct.unpack(f"<{length}{code}", self.take(length * struct.calcsize(f"<{code}"))))
        return [self.value(kind) for _ in range(length)]

    def take(self, length: int) -> bytes:
        end = self.position + length
        if end > len(self.data):
            raise CheckpointError(f"{self.path} is truncated: its header does not end within {len(self.data)} bytes")
        taken = self.data[self.position : end]
        self.position = end
        return taken
