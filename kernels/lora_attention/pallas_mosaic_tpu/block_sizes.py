"""How the TPU kernels cut their work, as a function of shapes alone."""

import dataclasses

LANES = 128
MIB = 2**20

# What a program may take of a core's VMEM, which holds 64 MiB (v5p, TPU7x) or 128 MiB (v5e, v6e).
VMEM_LIMIT = 48 * MIB


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """block_q: query tokens per program in prefill, a power of two ≥ 16; rows_per_item: batch rows per program in
    decode, a power of two; block_kv: keys that lie in VMEM at a time (twice: one block is read while the other is
    worked on); step_kv: keys that are worked on at a time. Both are positive multiples of 8, at run time cut to
    whole pages, at least one, and block_kv to whole steps."""

    block_q: int
    rows_per_item: int
    block_kv: int
    step_kv: int

    def __post_init__(self):
        for field, least in (("block_q", 16), ("rows_per_item", 1)):
            size = getattr(self, field)
            if size < least or size & (size - 1):
                raise ValueError(f"{field} is {size}; it must be a power of two, at least {least}")
        for field in ("block_kv", "step_kv"):
            size = getattr(self, field)
            if size <= 0 or size % 8:
                raise ValueError(f"{field} is {size}; it must be a positive multiple of 8")

    def pages(self, page_size: int, W: int) -> tuple[int, int]:
        """(pages per block, pages per step), for page tables of W columns."""
        step = min(W, max(1, self.step_kv // page_size))
        return step * max(1, min(-(-W // step), self.block_kv // (step * page_size))), step


def next_power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def heuristic(B: int, T: int, K: int, G: int, H: int, itemsize: int) -> BlockSizes:
    """Block sizes for one device's heads.

    A block of keys is about 2 MiB, so that the reads in flight outlast the latency of HBM at the bandwidth of every
    chip, and 256 to 2048 keys; a step is few enough of them for the compiler to unroll. A prefill tile is as many
    queries as make its work per byte of K and V exceed what the chips need (about 600 FLOP per byte on v6e), within
    what VMEM holds of its two accumulators.
    """
    slot_bytes = K * 2 * H * itemsize
    block_kv = min(2048, max(256, 2 * MIB // slot_bytes // LANES * LANES))
    while block_kv > LANES and 2 * block_kv * slot_bytes > 8 * MIB:
        block_kv //= 2
    block_q = 256
    # Per query row: q and o twice (pipelined), o, o_lr, m, l in f32; o_lr, m and l take whole rows of lanes.
    row_bytes = 4 * max(H, LANES) * itemsize + 4 * max(H, LANES) + 3 * 4 * LANES
    while block_q > 16 and K * G * block_q * row_bytes > 24 * MIB:
        block_q //= 2
    return BlockSizes(
        block_q=max(16, min(block_q, next_power(T))),
        rows_per_item=min(8, next_power(B)),
        block_kv=block_kv,
        step_kv=min(block_kv, 512 if itemsize == 2 else 256),
    )
