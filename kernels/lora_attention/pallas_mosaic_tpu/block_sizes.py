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
    worked on), a positive multiple of 8; at run time cut to whole pages, at least one."""

    block_q: int
    rows_per_item: int
    block_kv: int

    def __post_init__(self):
        for field, least in (("block_q", 16), ("rows_per_item", 1)):
            size = getattr(self, field)
            if size < least or size & (size - 1):
                raise ValueError(f"{field} is {size}; it must be a power of two, at least {least}")
        if self.block_kv <= 0 or self.block_kv % 8:
            raise ValueError(f"block_kv is {self.block_kv}; it must be a positive multiple of 8")


def next_power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def heuristic(B: int, T: int, K: int, G: int, H: int, itemsize: int) -> BlockSizes:
    """Block sizes for one device's heads.

    A block of keys is about 2 MiB, so that the reads in flight outlast the latency of HBM at the bandwidth of every
    chip, and 256 to 2048 keys (512 in prefill, where scores of a block fill VMEM). A prefill tile is as many queries
    as make its work per byte of K and V exceed what the chips need (about 600 FLOP per byte on v6e), within what VMEM
    holds of its two accumulators.
    """
    slot_bytes = K * 2 * H * itemsize
    most = 512 if T > 1 else 2048
    block_kv = min(most, max(256, next_power(2 * MIB // slot_bytes)))
    while block_kv > LANES and 2 * block_kv * slot_bytes > 8 * MIB:
        block_kv //= 2
    heads = K * G
    block_q = 512
    # Per query row: q and o twice (pipelined), o, o_lr, m, l in f32; o_lr, m and l take whole rows of lanes.
    row_bytes = 4 * max(H, LANES) * itemsize + 4 * max(H, LANES) + 3 * 4 * LANES
    while block_q > 16 and (heads * block_q * row_bytes > 20 * MIB or G * block_q > 1024):
        block_q //= 2
    return BlockSizes(
        block_q=max(16, min(block_q, next_power(T))),
        rows_per_item=min(8, next_power(B)),
        block_kv=block_kv,
    )
