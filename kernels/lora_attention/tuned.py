"""Block sizes that were measured: data per kind of device, which goes before a kernel's heuristic.

`scripts/tune_kernels.py` writes `tuned/<kind of device>.json`:

    {"device_kind": "NVIDIA H100 80GB HBM3",
     "entries": [{"implementation": "pallas_triton", "path": "decode",
                  "shape": {"rows": 1, "G": 4, "H": 128, "p": 64, "r_v": 16, "r_k": 0},
                  "block_sizes": {"block_kv": 64, …}}]}
"""

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any, TypeVar

import jax
from jaxtyping import Array

from lragent_jax.kernels.lora_attention.arguments import LowRank

FOLDER = Path(__file__).with_name("tuned")
PATHS = ("prefill", "decode")

BlockSizes = TypeVar("BlockSizes")


@dataclasses.dataclass(frozen=True)
class ShapeClass:
    """What calls have in common that run best with the same block sizes, of 2-byte dtypes.

    rows: queries in the batch, up to the next power of two; 0 in prefill, which has many whatever their number.
    G: query heads per kv head. H: head dim. p: page size. r_v, r_k: up to the next of 16, 32, 64; 0: no such cache.
    """

    rows: int
    G: int
    H: int
    p: int
    r_v: int
    r_k: int

    @classmethod
    def of(cls, path: str, *, rows: int, G: int, H: int, p: int, r_v: int, r_k: int) -> "ShapeClass":
        """The class of a call with so many queries in its batch, and low-rank caches of these ranks (0: none)."""
        r_v, r_k = (r and max(16, power_of_two(r)) for r in (r_v, r_k))
        return cls(rows=0 if path == "prefill" else power_of_two(rows), G=G, H=H, p=p, r_v=r_v, r_k=r_k)


@dataclasses.dataclass(frozen=True)
class Entry:
    """block_sizes: fields of the dataclass that belongs to (implementation, path)."""

    implementation: str
    path: str
    shape: ShapeClass
    block_sizes: dict[str, int]


def power_of_two(size: int) -> int:
    """The next one, from `size` on."""
    return 1 << (size - 1).bit_length()


def slug(device_kind: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_")


def write(file: Path, device_kind: str, entries: tuple[Entry, ...]) -> None:
    content = {"device_kind": device_kind, "entries": [dataclasses.asdict(entry) for entry in entries]}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")


def read(file: Path) -> tuple[Entry, ...]:
    """A file's entries.

    Raises:
      ValueError: it is not what `write` writes for the kind of device that it is named after.
    """
    try:
        content = json.loads(file.read_text())
        if slug(content["device_kind"]) != file.stem:
            raise ValueError(f"it is for {content['device_kind']!r}")
        entries = tuple(parse_entry(entry) for entry in content["entries"])
    except (KeyError, TypeError, ValueError) as reason:
        raise ValueError(
            f"{file} holds no tuned block sizes: {reason!r}; write it with scripts/tune_kernels.py"
        ) from None
    found = [(entry.implementation, entry.path, entry.shape) for entry in entries]
    if len(set(found)) < len(found):
        raise ValueError(f"{file} holds two entries for one shape; write it with scripts/tune_kernels.py")
    return entries


def parse_entry(entry: dict[str, Any]) -> Entry:
    numbers = {**entry["shape"], **entry["block_sizes"]}
    if wrong := {name: value for name, value in numbers.items() if type(value) is not int or value < 0}:
        raise ValueError(f"{wrong} must be whole numbers, not negative")
    if entry["path"] not in PATHS:
        raise ValueError(f"path {entry['path']!r} is none of {', '.join(PATHS)}")
    return Entry(**entry | {"shape": ShapeClass(**entry["shape"])})


@functools.cache
def table(device_kind: str) -> dict[tuple[str, str, ShapeClass], dict[str, int]]:
    """What is known of a kind of device; nothing of most."""
    file = FOLDER / f"{slug(device_kind)}.json"
    entries = read(file) if file.exists() else ()
    return {(entry.implementation, entry.path, entry.shape): entry.block_sizes for entry in entries}


def tuned_block_sizes(
    implementation: str, path: str, kind: type[BlockSizes], q: Array, base: Array, low_rank: LowRank | None
) -> BlockSizes | None:
    """The block sizes, of dataclass `kind`, that were found best for these shapes on this machine's device.

    None where nobody measured: on other devices, at other shapes, in float32. The device is JAX's default one, also
    while a program is compiled for another.
    """
    if q.dtype.itemsize != 2:
        return None
    B, T, N, H = q.shape
    K, p = base.shape[1:3]
    r_v, r_k = (0 if pool is None else pool.shape[1] for pool in low_rank or LowRank(None))
    shape = ShapeClass.of(path, rows=B * T, G=N // K, H=H, p=p, r_v=r_v, r_k=r_k)
    found = table(jax.devices()[0].device_kind).get((implementation, path, shape))
    return None if found is None else kind(**found)
