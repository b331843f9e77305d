"""What a call is cut into: block sizes that validate themselves, and which ones suit a shape."""

import dataclasses

import jax
from jax.experimental import pallas as pl

from lragent_jax.kernels.lora_attention.pallas_triton.stream import padded

MAX_PLANNED_ROWS = 64  # (row, query) pairs up to which a plan is made; from there on tiles of queries fill a device
MAX_TILE_ROWS = 64  # query heads that share a decode program: the rows of one Hopper matrix instruction
MAX_READER_LANES = 256  # ranks of all low-rank caches that a decode program reads side by side


def validate(sizes, *blocks: str) -> None:
    for field in dataclasses.fields(sizes):
        value = getattr(sizes, field.name)
        if field.name in blocks and (value < 16 or value & (value - 1)):
            raise ValueError(f"{field.name} is {value}; it must be a power of two, at least 16")
        if value < 1 or (field.name == "num_warps" and value & (value - 1)):
            raise ValueError(f"{field.name} is {value}; it must be positive, num_warps a power of two")


@dataclasses.dataclass(frozen=True)
class PrefillBlockSizes:
    """block_q: queries per program. block_kv: keys per turn of its loop. Both are powers of two, at least 16."""

    block_q: int = 128
    block_kv: int = 64
    num_warps: int = 8
    num_stages: int = 3

    def __post_init__(self):
        validate(self, "block_q", "block_kv")


@dataclasses.dataclass(frozen=True)
class DecodeBlockSizes:
    """block_kv: keys per turn of a program's loop, a power of two, at least 16. rows_per_item: rows that share it.

    programs: how many of them the plan supposes to run at once.
    """

    block_kv: int = 64
    rows_per_item: int = 1
    num_warps: int = 4
    num_stages: int = 4
    programs: int = 264

    def __post_init__(self):
        validate(self, "block_kv")


BlockSizes = PrefillBlockSizes | DecodeBlockSizes

# In order of preference: the first that fits into shared memory is taken. For 16 and for 32 bits.
PREFILLS = tuple(
    tuple(PrefillBlockSizes(*sizes) for sizes in preferences)
    for preferences in (
        ((128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 16, 4, 2)),
        ((32, 32, 4, 2), (16, 16, 4, 2)),
    )
)
# Bytes that one program may have, by compute capability; newer ones have no less than the last.
SHARED_MEMORY = {8.0: 163 * 1024, 8.6: 99 * 1024, 8.7: 163 * 1024, 8.9: 99 * 1024, 9.0: 227 * 1024}


def heuristic(
    B: int, T: int, G: int, H: int, p: int, r_v: int, r_k: int, itemsize: int, shared_memory: int
) -> BlockSizes:
    """Which way to go and in what blocks. r_v, r_k: 0 where there is no such cache; shared_memory: bytes."""
    lanes = 2 * padded(H) + (padded(r_v) if r_v else 0) + (padded(r_k) if r_k else 0)
    if B * T > MAX_PLANNED_ROWS:
        for sizes in PREFILLS[itemsize == 4]:
            needs = (sizes.block_q * padded(H) + sizes.num_stages * sizes.block_kv * lanes) * itemsize
            small = sizes.block_q * padded(H) <= 2**14 and sizes.block_kv <= (64 if r_k else 8 * p)
            if needs <= shared_memory and small:
                break
        return dataclasses.replace(sizes, block_kv=min(sizes.block_kv, 8 * p))
    # Triton's tiles have powers of two for sides: so must the rows of an item, each of a padded G.
    rows = min(pl.next_power_of_2(B * T), max(1, MAX_TILE_ROWS // pl.next_power_of_2(G)))
    if r_v:
        rows = min(rows, max(1, MAX_READER_LANES // padded(r_v)))
        lanes += padded(r_v) * (rows - 1)
    block_kv = min(32 if itemsize == 4 or r_k else 64, 8 * p)
    # Programs of one row run in pairs on a multiprocessor. Fewer rows than Hopper's instructions take hold one stage in
    # registers, and leave less room for what is not a stage.
    few = rows * G < MAX_TILE_ROWS
    available = (
        shared_memory // 2 - 2**13 if rows == 1 else shared_memory - (2**8 * padded(H) + 2**13 if few else 2**14)
    )
    num_stages = available // (block_kv * lanes * itemsize) + few
    wide = rows * max(G, padded(r_v) // 4 if r_v else 0) > 32 or (r_k and rows > 1)
    return DecodeBlockSizes(
        *(block_kv, rows, 8 if wide else 4),
        num_stages=max(2, min(4 if block_kv == 64 or rows > 1 else 6, num_stages)),
        programs=264 if rows == 1 else 132,
    )


def shared_memory() -> int:
    """Bytes that a program may have on the device that JAX uses; an H100's where that is no GPU."""
    name = getattr(jax.devices()[0], "compute_capability", "9.0")
    if not name[0].isdigit():  # AMD's local memory
        return 64 * 1024
    capability = float(name)
    return SHARED_MEMORY.get(capability, 99 * 1024 if capability >= 12 else max(SHARED_MEMORY.values()))
