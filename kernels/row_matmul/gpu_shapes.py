"""What the products' kernel for NVIDIA Hopper is compiled for: shapes, and how they are cut into blocks."""

import dataclasses
import math

from lragent_jax.kernels.hopper import SHARED_MEMORY

TILE = 64  # columns of a weight in one instruction of the matrix unit
LANES = 128  # numbers of a row that the registers' layout takes together
NUM_SMS = 132


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """tiles: of 64 columns that a block makes, of either weight where two are gated.

    block_k: rows of the weights in a stage, 128 or 256. stages: of weights in flight.
    """

    tiles: int
    block_k: int
    stages: int

    def __post_init__(self):
        if self.tiles < 1 or self.block_k not in (LANES, 2 * LANES) or self.stages < 2:
            raise ValueError(f"{self} needs at least one tile, 128 or 256 rows and two stages")


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What the kernel is compiled for."""

    rows: int
    width: int  # of x
    outs: tuple[int, ...]  # of the weights
    gated: bool
    residual: bool
    eps: float | None  # None: no norm
    keep_normed: bool
    tiles: int
    block_k: int
    stages: int
    interpret: bool
    shrinks: tuple[tuple[int, int], ...] = ()  # of each: tables, rank

    @property
    def padded(self) -> int:
        """Columns of the matrix unit that take the rows."""
        return -(-self.rows // 8) * 8

    @property
    def per_stage(self) -> int:
        """Tiles of weights in a stage."""
        return self.tiles * (2 if self.gated else 1)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Of every weight; gated ones share theirs."""
        return tuple(out // (TILE * self.tiles) for out in (self.outs[:1] if self.gated else self.outs))

    @property
    def squared_at_once(self) -> int:
        """Rows whose squares a thread has under way: 128 numbers of them."""
        return math.gcd(self.rows, max(1, 128 * LANES // self.width))

    @property
    def num_blocks(self) -> int:
        """That make tiles; those behind them make a row's X A each."""
        return sum(self.blocks)

    @property
    def grid(self) -> int:
        return self.num_blocks + sum(tables * self.rows for tables, _ in self.shrinks)

    @property
    def turns(self) -> int:
        return self.width // self.block_k

    def stage_bytes(self) -> int:
        return 2 * self.block_k * (TILE * self.per_stage + self.padded + (self.eps is not None))

    def fixed_bytes(self) -> int:
        """Beside the stages: rows that are being multiplied, the residual, scratch for sums, barriers, alignment."""
        rows = (2 + self.keep_normed) * self.block_k + self.residual * self.tiles * TILE
        return rows * self.padded * 2 + 3 * 1024


def heuristic(shapes: Shapes) -> BlockSizes:
    """One wave of blocks: up to two on a processor, which then share its memory. Long turns, but not then."""
    resident = 1 if shapes.grid <= NUM_SMS else 2
    long = resident == 1 and not shapes.gated and shapes.width % (2 * LANES) == 0
    shapes = dataclasses.replace(shapes, block_k=(1 + long) * LANES)
    stages = (SHARED_MEMORY // resident - shapes.fixed_bytes() - 1024) // shapes.stage_bytes()
    return BlockSizes(tiles=shapes.tiles, block_k=shapes.block_k, stages=max(2, min(stages, shapes.turns, 16)))
