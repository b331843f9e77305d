"""Tuned block sizes: what files may hold, which calls they apply to, and the tuner that writes them."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from script_modules import load_script

from lragent_jax.kernels.lora_attention import LowRank, tuned, xla
from lragent_jax.kernels.lora_attention.tuned import Entry, ShapeClass, tuned_block_sizes

ROOT = Path(__file__).parents[1]

tune_kernels = load_script("tune_kernels")
SHAPE = ShapeClass(rows=8, G=4, H=16, p=8, r_v=16, r_k=0)
ENTRY = Entry("xla", "decode", SHAPE, {"block_kv": 64})
THIS = jax.devices()[0].device_kind


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tuned")
    tuned.table.cache_clear()
    yield tuned.FOLDER
    tuned.table.cache_clear()


def lookup(B: int = 8, T: int = 1, r_v: int = 16, path: str = "decode", dtype: Any = jnp.bfloat16, name: str = "xla"):
    q, base = jnp.zeros((B, T, 8, 16), dtype), jnp.zeros((1, 2, 8, 32), dtype)
    low_rank = LowRank(jnp.zeros((1, r_v, 8), dtype)) if r_v else None
    return tuned_block_sizes(name, path, xla.BlockSizes, q, base, low_rank)


def file_of(kind: str) -> Path:
    return tuned.FOLDER / f"{tuned.slug(kind)}.json"


# Files.


def test_a_file_is_read_as_it_was_written(folder):
    entries = (ENTRY, dataclasses.replace(ENTRY, path="prefill", shape=dataclasses.replace(SHAPE, rows=0)))
    tuned.write(file_of("Abacus 9000 (SXM)"), "Abacus 9000 (SXM)", entries)
    assert tuned.read(folder / "abacus_9000_sxm.json") == entries


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"device_kind": "Slide rule"}, "it is for 'Slide rule'"),
        ({"entries": 3}, "not iterable"),
        ({"entries": [{"implementation": "xla"}]}, "KeyError"),
        ({"path": "encode"}, "path 'encode' is none of prefill, decode"),
        ({"shape": {"rows": 1}}, "missing .* required"),
        ({"block_sizes": {"block_kv": 64.5}}, "must be whole numbers"),
        ({"block_sizes": {"block_kv": -64}}, "must be whole numbers"),
        ({"us": 12}, "unexpected keyword"),
        ({"twice": None}, "two entries for one shape"),
    ],
)
def test_a_broken_file_says_so(broken, reason, folder):
    file = file_of("Abacus")
    tuned.write(file, "Abacus", (ENTRY,))
    content = json.loads(file.read_text())
    if set(broken) <= {"device_kind", "entries"}:
        content |= broken
    elif "twice" in broken:
        content["entries"] *= 2
    else:
        content["entries"][0] |= broken
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=reason):
        tuned.read(file)


def test_a_file_that_is_no_json_says_so(folder):
    folder.mkdir()
    file_of("Abacus").write_text("{")
    with pytest.raises(ValueError, match="holds no tuned block sizes"):
        tuned.read(file_of("Abacus"))


# Which calls they apply to.


def test_the_heuristic_stands_where_nobody_measured(folder):
    assert lookup() is None
    tuned.write(file_of(THIS), THIS, (ENTRY,))
    tuned.table.cache_clear()
    assert lookup() == xla.BlockSizes(64)
    assert lookup(B=5) == lookup(B=2, T=4) == lookup(r_v=8) == xla.BlockSizes(64)  # the same class
    assert lookup(B=9) is None
    assert lookup(B=4) is None
    assert lookup(r_v=17) is None
    assert lookup(r_v=0) is None
    assert lookup(path="prefill") is None
    assert lookup(name="pallas_triton") is None
    assert lookup(dtype=jnp.float32) is None


def test_prefill_has_one_class_for_any_length(folder):
    shape = dataclasses.replace(SHAPE, rows=0)
    tuned.write(file_of(THIS), THIS, (dataclasses.replace(ENTRY, path="prefill", shape=shape),))
    assert lookup(T=100, path="prefill") == lookup(B=1, T=777, path="prefill") == xla.BlockSizes(64)


def test_what_was_measured_on_another_device_is_not_taken(folder):
    tuned.write(file_of("Abacus"), "Abacus", (ENTRY,))
    assert lookup() is None


def test_values_that_the_kernel_refuses_are_an_error(folder):
    tuned.write(file_of(THIS), THIS, (dataclasses.replace(ENTRY, block_sizes={"block_kv": 12}),))
    with pytest.raises(ValueError, match="block_kv is 12"):
        lookup()


def test_what_is_shipped_is_valid():
    """Block sizes too: every entry makes those that its kernel takes."""
    for file in sorted((ROOT / "kernels" / "lora_attention" / "tuned").glob("*")):
        for entry in tuned.read(file):
            kernel = tune_kernels.KERNELS[entry.implementation, entry.path]
            case = tune_kernels.AttentionCase(8192, T=8192 if entry.path == "prefill" else 1)
            assert dataclasses.replace(kernel.heuristic(case, tune_kernels.Heads()), **entry.block_sizes)


# The tuner.


def xla_heuristic(case, heads):
    return xla.BlockSizes(16)


XLA = tune_kernels.Kernel(xla_heuristic, {"block_kv": (8, 12, 16, 24)})


def tune(monkeypatch, capsys, *arguments: str) -> tuple[dict, str]:
    monkeypatch.setitem(tune_kernels.KERNELS, ("xla", "decode"), XLA)
    monkeypatch.setattr(tune_kernels, "CALLS_PER_TURN", {"decode": 1})
    monkeypatch.setattr(tune_kernels, "measure_device", lambda: tune_kernels.DeviceSpeed(1e10, 1e11))
    toy = ["--context", "32", "--heads", "4", "2", "16", "--page-size", "8", "--chain", "1e-5"]
    monkeypatch.setattr(sys, "argv", ["tune_kernels.py", *toy, "--implementations", "xla", *arguments])
    tune_kernels.main()
    out, err = capsys.readouterr()
    return json.loads(out.splitlines()[-1]), err


def test_it_says_beforehand_how_long_it_takes(folder, monkeypatch, capsys):
    report, err = tune(monkeypatch, capsys, "--dry-run")
    assert "20 candidates for 5 shapes, about 60 s" in err  # 16, 8, 24 and one more, of the shapes of decode
    assert report["candidates"] == 20
    assert not folder.exists()


def test_what_it_finds_is_found_again(folder, monkeypatch, capsys):
    monkeypatch.setattr(tune_kernels, "FOLDER", folder, raising=False)
    monkeypatch.setattr(tune_kernels, "cases", lambda path, S: [tune_kernels.AttentionCase(S, B=2)])
    seconds = iter([3e-3, 1e-3, 2e-3])
    monkeypatch.setattr(tune_kernels, "median_seconds", lambda run: run() and next(seconds))
    other = dataclasses.replace(ENTRY, block_sizes={"block_kv": 8})
    tuned.write(file_of(THIS), THIS, (other,))
    report, err = tune(monkeypatch, capsys, "--folder", str(folder))
    [shape] = report["shapes"]
    assert shape["best"] == {"block_kv": 8}
    assert shape["us"] < shape["heuristic_us"]
    assert "0 s left" in err
    tuned.table.cache_clear()
    entries = tuned.read(file_of(THIS))
    assert entries[0] == other
    assert [entry.block_sizes for entry in entries] == [{"block_kv": 8}, {"block_kv": 8}]
    q, base = jnp.zeros((2, 1, 4, 16), jnp.bfloat16), jnp.zeros((1, 2, 8, 32), jnp.bfloat16)
    low_rank = LowRank(jnp.zeros((1, 16, 8), jnp.bfloat16))
    assert tuned_block_sizes("xla", "decode", xla.BlockSizes, q, base, low_rank) == xla.BlockSizes(8)


def test_a_wrong_or_refused_candidate_is_skipped_with_its_reason(folder, monkeypatch, capsys):
    def broken(q, *args, block_sizes, **kwargs):
        if block_sizes.block_kv == 24:
            raise NotImplementedError("24 keys do not fit")
        return xla.lora_attention(q, *args, **kwargs) * (1.5 if block_sizes.block_kv == 8 else 1)

    fake = [dataclasses.make_dataclass("Fake", ["name", "load"], frozen=True)("xla", lambda: broken)]
    monkeypatch.setattr(tune_kernels, "IMPLEMENTATIONS", fake)
    monkeypatch.setattr(tune_kernels, "cases", lambda path, S: [tune_kernels.AttentionCase(S)])
    report, err = tune(monkeypatch, capsys, "--folder", str(folder))
    assert report["shapes"][0]["best"] == {"block_kv": 16}
    assert report["entries"] == 0  # the heuristic's own
    assert "BlockSizes(block_kv=24): skipped, 24 keys do not fit" in err
    assert "BlockSizes(block_kv=8): skipped, the result is off by 5.0e-01" in err


def test_fields_that_helped_are_joined():
    @dataclasses.dataclass(frozen=True)
    class Two:
        a: int = 1
        b: int = 1

    assert tune_kernels.joined({Two(): 3.0, Two(a=2): 2.0, Two(a=3): 2.5, Two(b=2): 1.0}) == Two(2, 2)
    assert tune_kernels.joined({Two(): 1.0, Two(a=2): 2.0, Two(b=2): 3.0}) is None  # nothing helped
    assert tune_kernels.joined({Two(): 3.0, Two(a=2): 2.0, Two(b=2): 4.0}) is None  # measured already


def test_entries_that_no_longer_win_are_taken_out():
    other = dataclasses.replace(ENTRY, path="prefill")
    assert tune_kernels.merged((ENTRY, other), [], [ENTRY]) == (other,)


@pytest.mark.parametrize("key", list(tune_kernels.KERNELS), ids=" ".join)
def test_candidates_are_few_and_valid(key):
    for case in tune_kernels.cases(key[1], 8192):
        found = tune_kernels.candidates(tune_kernels.KERNELS[key], case, tune_kernels.Heads())
        assert 2 <= len(found) <= 12
        assert len(set(found)) == len(found)
