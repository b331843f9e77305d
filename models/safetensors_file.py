"""One safetensors file: header checked on opening, tensors mapped from disk one at a time."""

import json
import math
import os
from pathlib import Path

import ml_dtypes
import numpy as np

from lragent_jax.models.errors import CheckpointError

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}

_LENGTH_BYTES = 8  # a little-endian u64 in front of the JSON header
_LARGEST_HEADER = 100_000_000  # the format's own limit


class SafetensorsFile:
    """Read access to the tensors of one file (github.com/huggingface/safetensors, "Format").

    Opening reads the header alone and proves that every tensor lies whole inside the file, so a truncated download
    is found before anything is loaded. Raises `CheckpointError` for a file that is missing, truncated or no
    safetensors file, and `KeyError` from the accessors for a name that is not in `keys()`.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            self._bytes = np.memmap(self.path, np.uint8, mode="r")
        except FileNotFoundError:
            raise CheckpointError(f"{self.path}: there is no such file") from None
        except IsADirectoryError:
            raise CheckpointError(f"{self.path} is a folder, not a safetensors file") from None
        except PermissionError:
            raise CheckpointError(f"{self.path} may not be read by this user") from None
        except ValueError:  # an empty file cannot be mapped
            raise CheckpointError(f"{self.path} is truncated: it is empty; download it again") from None
        header, self._data_start = self._read_header()
        self._tensors = self._read_tensors(header)

    def keys(self) -> list[str]:
        """The names of the tensors, in the order of the header."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][1]

    def dtype(self, name: str) -> np.dtype:
        """numpy's dtype of a tensor; bf16 and f8 are those of `ml_dtypes`."""
        return self._tensors[name][0]

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only array over the mapped file: only what is touched is read from disk.

        A tensor whose place in the file is not aligned for its dtype is copied.
        """
        dtype, shape, begin, end = self._tensors[name]
        tensor = np.asarray(self._bytes[self._data_start + begin : self._data_start + end]).view(dtype).reshape(shape)
        return tensor if tensor.flags.aligned else tensor.copy()

    def _read_header(self) -> tuple[dict, int]:
        size = self._bytes.size
        if bytes(self._bytes[:24]).startswith(b"version https://git-lfs"):
            raise CheckpointError(
                f"{self.path} is a git-lfs pointer, not the weights; run `git lfs pull` in its folder"
            )
        if size < _LENGTH_BYTES:
            raise CheckpointError(
                f"{self.path} is truncated: {size} bytes are no safetensors header; download it again"
            )
        length = int.from_bytes(bytes(self._bytes[:_LENGTH_BYTES]), "little")
        start = _LENGTH_BYTES + length
        if length > _LARGEST_HEADER or (size > _LENGTH_BYTES and self._bytes[_LENGTH_BYTES] != ord("{")):
            raise CheckpointError(f"{self.path} is no safetensors file: it does not begin with a header")
        if start > size:
            raise CheckpointError(
                f"{self.path} is truncated: its header needs {start} bytes, the file has {size}; download it again"
            )
        try:
            header = json.loads(bytes(self._bytes[_LENGTH_BYTES:start]))
        except ValueError as error:  # bad JSON or bad UTF-8
            raise CheckpointError(f"{self.path} is no safetensors file: its header is not JSON ({error})") from None
        if not isinstance(header, dict):
            raise CheckpointError(f"{self.path} is no safetensors file: its header is not a JSON object")
        header.pop("__metadata__", None)
        return header, start

    def _read_tensors(self, header: dict) -> dict[str, tuple[np.dtype, tuple[int, ...], int, int]]:
        tensors = {name: self._read_entry(name, entry) for name, entry in header.items()}
        expected = max((end for _, _, _, end in tensors.values()), default=0)
        stored = self._bytes.size - self._data_start
        if stored < expected:
            raise CheckpointError(
                f"{self.path} is truncated: its tensors need {self._data_start + expected} bytes, the file has "
                f"{self._bytes.size}; download it again"
            )
        # The format allows neither holes nor overlaps: a file that has them was not written by a sound writer.
        position = 0
        for name, (_, _, begin, end) in sorted(tensors.items(), key=lambda item: item[1][2:]):
            if begin != position:
                raise CheckpointError(
                    f"{self.path} is damaged: {name} begins at byte {begin} of the data, not {position}"
                )
            position = end
        if position != stored:
            raise CheckpointError(f"{self.path} is damaged: {stored - position} bytes follow its last tensor")
        return tensors

    def _read_entry(self, name: str, entry) -> tuple[np.dtype, tuple[int, ...], int, int]:
        try:
            code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            whole = isinstance(code, str) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        except (TypeError, KeyError, ValueError):
            whole = False
        if not whole:
            raise CheckpointError(f"{self.path} is no safetensors file: the header entry of {name} is {entry!r}")
        if code not in _DTYPES:
            raise CheckpointError(
                f"{self.path}: {name} has dtype {code}, which is not supported; there are: {', '.join(_DTYPES)}"
            )
        dtype = _DTYPES[code]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(
                f"{self.path} is damaged: {name} is {code} {list(shape)} but takes {end - begin} bytes"
            )
        return dtype, shape, begin, end
