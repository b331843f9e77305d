"""What a prefill program works on and with: block sizes, arguments, shared memory, barriers, its tile of queries."""

import dataclasses
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lragent_jax.kernels.hopper import tiled
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.pages import Block, Row, cdiv, padded_rank

BLOCK_Q = 64  # queries of a warpgroup: rows of one wgmma
COMPUTE_WARPGROUPS = 2
TILE_Q = BLOCK_Q * COMPUTE_WARPGROUPS


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """block_kv: keys per turn, 64 or 128. num_stages: slots of the ring, each with K, V and L of a turn."""

    block_kv: int
    num_stages: int

    def __post_init__(self):
        if self.block_kv not in (64, 128):
            raise ValueError(f"block_kv is {self.block_kv}; it must be 64 or 128")
        if self.num_stages < 2:
            raise ValueError(f"num_stages is {self.num_stages}; it must be at least 2, or copies wait for arithmetic")


def heuristic() -> BlockSizes:
    """Two blocks of 128 keys fit shared memory for every head dim and rank that the kernel takes."""
    return BlockSizes(block_kv=128, num_stages=2)


def shared_memory(head_dim: int, rank: int, blocks: BlockSizes) -> int:
    """Bytes that a program takes: queries, what `Memory` holds of keys, values and B, and a little for barriers.

    rank: that of the values which do not come expanded.
    """
    rank = padded_rank(rank)
    per_key = blocks.num_stages * (2 * head_dim + rank)
    return 2 * (TILE_Q * head_dim + blocks.block_kv * per_key + rank * head_dim) + 4 * 1024


class Inputs(NamedTuple):
    """The kernel's arguments, in device memory."""

    q: Any  # [B, T, N H]
    base: Any  # [P K, p, 2H]
    table: Any  # [B, W]
    q_starts: Any  # [B]
    kv_lens: Any  # [B]
    keys: Any = None  # [B K, S, H]: read in place of the base ones
    values: Any = None  # [B K, S, H]: likewise
    low_rank: Any = None  # [P_lr, r, p]: of values, where they do not come expanded
    lora_b: Any = None  # [A, r, K H]
    low_rank_table: Any = None  # [B, W]
    adapter_ids: Any = None  # [B]


class Outputs(NamedTuple):
    o: Any  # [B, T, N H]
    lse: Any = None  # [B, N, T]


class Memory(NamedTuple):
    """Shared memory of a program. R: the rank rounded up to what a wgmma sums over."""

    q: Any  # [2, 64, H], at the end o
    k: Any  # [num_stages, block_kv, H]
    v: Any  # [num_stages, block_kv, H]
    low_rank: Any = None  # [num_stages, R, block_kv]
    lora_b: Any = None  # [R, H]
    lse: Any = None  # [2, 64]


class Barriers(NamedTuple):
    q_ready: Any  # [2]
    k_ready: Any  # [num_stages]
    v_ready: Any  # [num_stages + 1]; the last one: what has landed and must be cleaned before it is ready
    k_free: Any  # [num_stages]
    v_free: Any  # [num_stages]
    turn: Any  # [2]: whose turn at the tensor cores it is
    pinned: Any  # [2]; nobody else's: see prefill_schedule
    b_ready: Any = None


@dataclasses.dataclass(frozen=True)
class Config:
    """What a kernel is compiled for. r: rank of the values that are not expanded; 0 where there are none."""

    T: int  # of a row
    H: int
    G: int
    K: int
    p: int
    r: int
    expanded_keys: bool
    expanded_values: bool
    num_adapters: int
    dtype: Any
    exp2_scale: float
    blocks: BlockSizes
    interpret: bool

    def slot(self, step):
        """Of the ring, where a block of keys lies."""
        return lax.rem(step, jnp.int32(self.blocks.num_stages))

    @property
    def block(self) -> Block:
        return Block(self.blocks.block_kv, self.p)

    @property
    def k_arrivals(self) -> int:
        return 1 if self.expanded_keys else self.block.copies

    @property
    def v_arrivals(self) -> int:
        return (1 if self.expanded_values else self.block.copies) + self.block.low_rank_copies(self.r)

    @property
    def name(self) -> str:
        parts = [f"v{self.r}" if self.r else "", "k" * self.expanded_keys, "v" * self.expanded_values]
        which = "".join(f"_{part}" for part in parts if part)  # "_v16": P L; "_k_v": both come expanded
        return f"lora_prefill_h{self.H}_p{self.p}{which}_kv{self.blocks.block_kv}x{self.blocks.num_stages}"

    @property
    def low_rank_lanes(self) -> int:
        return min(self.blocks.block_kv // 2, self.p)

    def memory(self, return_lse: bool) -> Memory:
        stages, block_kv, dtype = self.blocks.num_stages, self.blocks.block_kv, self.dtype
        memory = Memory(
            q=tiled(COMPUTE_WARPGROUPS, BLOCK_Q, self.H, dtype=dtype),
            k=tiled(stages, block_kv, self.H, dtype=dtype),
            v=tiled(stages, block_kv, self.H, dtype=dtype),
            lse=plgpu.SMEM((COMPUTE_WARPGROUPS, BLOCK_Q), jnp.float32) if return_lse else None,
        )
        if not self.r:
            return memory
        R = padded_rank(self.r)
        return memory._replace(
            low_rank=tiled(stages, R, block_kv, dtype=dtype, swizzle=2 * self.low_rank_lanes),
            lora_b=tiled(R, self.H, dtype=dtype, swizzle=32),
        )

    def barriers(self) -> Barriers:
        stages = self.blocks.num_stages
        one_for_each = plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS)
        return Barriers(
            q_ready=one_for_each,
            k_ready=plgpu.Barrier(num_arrivals=self.k_arrivals, num_barriers=stages),
            v_ready=plgpu.Barrier(num_arrivals=self.v_arrivals, num_barriers=stages + 1),
            k_free=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
            v_free=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
            turn=one_for_each,
            pinned=one_for_each,
            b_ready=plgpu.Barrier(num_arrivals=padded_rank(self.r) // 8) if self.r else None,
        )


class Tile(NamedTuple):
    """What a program works on, in scalars."""

    row: Row
    head: Any
    kv_head: Any
    q0: Any  # index of its first query among the row's
    start: Any  # that query's position
    end: Any  # keys that the row's last query sees
    exists: Any  # whether the row's adapter does

    def steps(self, cfg: Config, warpgroup):
        """Blocks of keys that the warpgroup's queries see: none if all of them are padding."""
        first = self.start + warpgroup * BLOCK_Q
        seen = jnp.maximum(jnp.minimum(self.end, first + BLOCK_Q), 0)
        return jnp.where(first < self.end, cdiv(seen, cfg.blocks.block_kv), 0)


def this_tile(cfg: Config, inputs: Inputs) -> Tile:
    """Late tiles see the most keys and start first. Heads run fastest: those of one kv head meet in the cache."""
    b, tile, head = (lax.axis_index(axis) for axis in ("row", "tile", "head"))
    q0 = (lax.axis_size("tile") - 1 - tile) * TILE_Q
    q_start, kv_len = inputs.q_starts[b], inputs.kv_lens[b]
    adapter, exists = jnp.int32(0), jnp.bool_(True)
    if cfg.num_adapters:
        adapter = inputs.adapter_ids[b]
        exists = (adapter >= 0) & (adapter < cfg.num_adapters)
        adapter = jnp.where(exists, adapter, 0)
    end = jnp.minimum(kv_len, q_start + cfg.T)
    kv_head = lax.div(head, jnp.int32(cfg.G))
    row = Row(inputs.table, b, kv_len, inputs.low_rank_table, adapter)
    return Tile(row, head, kv_head, q0, q_start + q0, end, exists)
