"""Safetensors files are read bit for bit, and a damaged one is refused before anything is loaded."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lragent_jax.models.errors import CheckpointError
from lragent_jax.models.safetensors_file import SafetensorsFile


def write(path, header, data: bytes, length: int | None = None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, np.int8, np.int64, np.bool_])
def test_reads_what_the_reference_writer_wrote(tmp_path, dtype):
    tensors = {"b": np.arange(6).reshape(2, 3).astype(dtype), "a": np.zeros((0, 4), dtype), "c": np.ones((), dtype)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert sorted(file.keys()) == ["a", "b", "c"]
    for name, want in tensors.items():
        got = file.read(name)
        assert (file.shape(name), file.dtype(name)) == (want.shape, want.dtype)
        np.testing.assert_array_equal(got, want, strict=True)
        assert not got.flags.writeable


def test_reads_bfloat16_and_unaligned_tensors(tmp_path):
    half = np.arange(3, dtype=np.float32).astype(ml_dtypes.bfloat16)
    wide = np.array([1.5, -2.0], np.float32)
    header = {
        "half": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]},
        "wide": {"dtype": "F32", "shape": [2], "data_offsets": [6, 14]},
    }
    for padding in range(4):  # moves the data through every alignment
        header["__metadata__"] = {"pad": " " * padding}
        file = SafetensorsFile(write(tmp_path / "x", header, half.tobytes() + wide.tobytes()))
        assert file.keys() == ["half", "wide"]
        np.testing.assert_array_equal(file.read("half"), half, strict=True)
        np.testing.assert_array_equal(file.read("wide"), wide, strict=True)
        assert file.read("wide").flags.aligned


def test_every_truncation_is_found(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.arange(4, dtype=np.float32), "b": np.ones((2, 2), np.float32)}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"x\.safetensors is truncated: .*download it again"):
            SafetensorsFile(path)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "trailing bytes": ({"a": ENTRY}, 12, "4 bytes follow its last tensor"),
    "a hole": ({"a": {**ENTRY, "data_offsets": [4, 12]}}, 12, "a begins at byte 4 of the data, not 0"),
    "an overlap": ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, 12, "b begins at byte 4 of the data, not 8"),
    "the wrong size": ({"a": {**ENTRY, "shape": [3]}}, 8, r"a is F32 \[3\] but takes 8 bytes"),
    "an unknown dtype": ({"a": {**ENTRY, "dtype": "F4"}}, 8, "a has dtype F4, which is not supported"),
    "a negative size": ({"a": {**ENTRY, "shape": [-2]}}, 8, "the header entry of a is"),
    "a list for a dtype": ({"a": {**ENTRY, "dtype": ["F32"]}}, 8, "the header entry of a is"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "the header entry of a is"),
    "a number for an entry": ({"a": 3}, 8, "the header entry of a is"),
    "bad JSON": (b"{'a': 1}", 8, "its header is not JSON"),
    "bad UTF-8": (b'{"\xff": 1}', 8, "its header is not JSON"),
    "no header": (b"PK\x03\x04zip", 8, "does not begin with a header"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(tmp_path, case):
    header, size, message = DAMAGED[case]
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(write(tmp_path / "x", header, bytes(size)))


def test_what_is_no_safetensors_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="does not begin with a header"):
        SafetensorsFile(write(tmp_path / "x", {"a": ENTRY}, bytes(8), length=10**15))
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        SafetensorsFile(tmp_path / "pointer")
    with pytest.raises(CheckpointError, match="no such file"):
        SafetensorsFile(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is a folder"):
        SafetensorsFile(tmp_path)
