"""Blocks of keys, which a pool's pages hold in pieces: where the pieces lie, and having them copied.

Whatever must not be read is asked for at a page that lies outside of its pool: the copy engine then writes zeros, so
rows without an adapter and pages behind a row's keys take no branch of their own.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax


def padded_rank(rank: int) -> int:
    """What a wgmma sums over comes in sixteens."""
    return -(-rank // 16) * 16


def cdiv(a, b: int):
    return lax.div(a + (b - 1), jnp.int32(b))


@dataclasses.dataclass(frozen=True)
class Block:
    """So many keys, in pages of `p`."""

    keys: int
    p: int

    @property
    def slots_per_copy(self) -> int:
        return min(self.p, self.keys)

    @property
    def copies(self) -> int:
        """How many pieces it comes in."""
        return self.keys // self.slots_per_copy

    def ranks_per_copy(self, rank: int) -> int:
        """Rows of a low-rank page that a copy brings: all, unless other pages' lanes or zeros lie between them."""
        return rank if self.copies == 1 and rank % 16 == 0 else 8

    def low_rank_copies(self, rank: int) -> int:
        """Copies that bring its low-rank keys or values."""
        return self.copies * (padded_rank(rank) // self.ranks_per_copy(rank)) if rank else 0


class Row(NamedTuple):
    """A row of the batch, as a kernel reads it. Pools and tables in device memory, the rest in scalars."""

    table: Any  # [B, W]
    b: Any
    kv_len: Any
    low_rank_table: Any = None  # [B, W]; None where no low-rank pages are read
    adapter: Any = None  # 0 where there is none

    def pieces(self, block: Block, index, p_base: int, p_low_rank: int) -> list[tuple[Any, Any, Any]]:
        """Of each piece of block `index`: base page, low-rank page, first slot in both.

        A page that the row does not hold is the first that its pool has not: `p_base`, `p_low_rank`.
        """
        return [
            self.locate(index * block.keys + i * block.slots_per_copy, block.p, p_base, p_low_rank)
            for i in range(block.copies)
        ]

    def locate(self, position, p: int, p_base: int, p_low_rank: int):
        held = position < self.kv_len
        column = jnp.where(held, lax.div(position, jnp.int32(p)), 0)
        page = jnp.where(held, self.table[self.b, column], p_base)
        offset = lax.rem(position, jnp.int32(p))
        if self.low_rank_table is None:
            return page, page, offset
        held &= self.adapter > 0
        return page, jnp.where(held, self.low_rank_table[self.b, column], p_low_rank), offset


def copy_base(block: Block, base, pieces, head, K: int, lanes, target, barrier) -> None:
    """Copies these lanes of a kv head's slots to `target` [keys, lanes]. base: [P K, p, 2H]."""
    for i, (page, _, offset) in enumerate(pieces):
        rows = pl.ds(pl.multiple_of(offset, block.slots_per_copy), block.slots_per_copy)
        part = target.at[pl.ds(i * block.slots_per_copy, block.slots_per_copy)]
        plgpu.copy_gmem_to_smem(base.at[page * K + head, rows, lanes], part, barrier)


def copy_low_rank(block: Block, pool, pieces, rank: int, target, barrier) -> None:
    """Copies low-rank keys or values to `target` [padded_rank, keys]. pool: [P_lr, rank, p]."""
    for i, (_, page, offset) in enumerate(pieces):
        lanes = pl.ds(pl.multiple_of(offset, block.slots_per_copy), block.slots_per_copy)
        part = target.at[:, pl.ds(i * block.slots_per_copy, block.slots_per_copy)]
        copy_ranks(pool, page, lanes, rank, block.ranks_per_copy(rank), part, barrier)


def copy_ranks(pool, page, lanes, rank: int, rows: int, target, barrier) -> None:
    """Copies [rank, lanes] of a page, so many rows at a time, and zeros to the rows of `target` that pad the rank."""
    for row in range(0, padded_rank(rank), rows):
        at, first = (page, row) if row < rank else (pool.shape[0], 0)
        plgpu.copy_gmem_to_smem(pool.at[at, pl.ds(first, rows), lanes], target.at[pl.ds(row, rows)], barrier)
