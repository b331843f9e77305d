"""What a prefill program works on and with: block sizes, arguments, shared memory, barriers, its tile of queries."""

import dataclasses
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lragent_jax.kernels.hopper import SHARED_MEMORY

BLOCK_Q = 64  # queries of a warpgroup: rows of one wgmma
COMPUTE_WARPGROUPS = 2
TILE_Q = BLOCK_Q * COMPUTE_WARPGROUPS
EXPANDED_KEYS = 64  # to which low-rank keys are added at a time: rows of one wgmma


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """block_kv: keys per turn, 64 or 128. num_stages: slots of the ring, each with K, V and low-rank keys of a turn."""

    block_kv: int
    num_stages: int

    def __post_init__(self):
        if self.block_kv not in (64, 128):
            raise ValueError(f"block_kv is {self.block_kv}; it must be 64 or 128")
        if self.num_stages < 2:
            raise ValueError(f"num_stages is {self.num_stages}; it must be at least 2, or copies wait for arithmetic")


def heuristic(head_dim: int, rank_v: int, rank_k: int) -> BlockSizes:
    """128 keys per turn, or 64 where shared memory would not hold two blocks of them beside the low-rank ones."""
    wide = BlockSizes(block_kv=128, num_stages=2)
    fits = shared_memory(head_dim, rank_v, rank_k, wide) <= SHARED_MEMORY
    return wide if fits else BlockSizes(block_kv=64, num_stages=2)


def shared_memory(head_dim: int, rank_v: int, rank_k: int, blocks: BlockSizes) -> int:
    """Bytes that a program takes: queries, what `Memory` holds of keys, values and B, and a little for barriers."""
    ranks = padded_rank(rank_v) + padded_rank(rank_k)
    per_key = blocks.num_stages * (2 * head_dim + ranks)
    lora_b = (ranks + 2 * padded_rank(rank_k)) * head_dim
    rope = 4 * blocks.num_stages * blocks.block_kv // EXPANDED_KEYS * 2 * head_dim if rank_k else 0
    return 2 * (TILE_Q * head_dim + blocks.block_kv * per_key + lora_b) + rope + 4 * 1024


def padded_rank(rank: int) -> int:
    """What a wgmma sums over comes in sixteens."""
    return -(-rank // 16) * 16


def cdiv(a, b: int):
    return lax.div(a + (b - 1), jnp.int32(b))


class Inputs(NamedTuple):
    """The kernel's arguments, in device memory."""

    q: Any  # [B, T, N H]
    base: Any  # [P K, p, 2H]
    table: Any  # [B, W]
    q_starts: Any  # [B]
    kv_lens: Any  # [B]
    low_rank_v: Any = None  # [P_lr, r_v, p]
    b_v: Any = None  # [A, r_v, K H]
    low_rank_table: Any = None  # [B, W]
    low_rank_k: Any = None  # [P_lr, r_k, p]
    b_k: Any = None  # [A, r_k, K H]
    b_k_turned: Any = None  # the same, halves of the head exchanged
    rope: Any = None  # [EXPANDED_KEYS, H] f16: cosines of these positions in the first half of the lanes, sines behind
    rope_starts: Any = None  # [blocks, parts, 2, H] f32: cosines and sines of where parts of EXPANDED_KEYS start
    adapter_ids: Any = None  # [B]


class Outputs(NamedTuple):
    o: Any  # [B, T, N H]
    lse: Any = None  # [B, N, T]


class Memory(NamedTuple):
    """Shared memory of a program. R: a rank rounded up to what a wgmma sums over."""

    q: Any  # [2, 64, H], at the end o
    k: Any  # [num_stages, block_kv, H]
    v: Any  # [num_stages, block_kv, H]
    low_rank_v: Any = None  # [num_stages, R_v, block_kv]
    b_v: Any = None  # [R_v, H]
    low_rank_k: Any = None  # [num_stages, R_k, block_kv]
    b_k: Any = None  # [R_k, H]
    b_k_turned: Any = None  # [R_k, H]
    b_k_rotated: Any = None  # [R_k, H]
    rope_starts: Any = None  # [num_stages, block_kv / EXPANDED_KEYS, 2, H] f32
    lse: Any = None  # [2, 64]


class Barriers(NamedTuple):
    q_ready: Any  # [2]
    k_ready: Any  # [num_stages]
    v_ready: Any  # [num_stages + 1]; the last one: what has landed and must be cleaned before it is ready
    k_free: Any  # [num_stages]
    v_free: Any  # [num_stages]
    turn: Any  # whose turn at the tensor cores it is: one for both warpgroups (prefill_turns), or one each
    pinned: Any = None  # [2]; nobody else's: see prefill_ahead
    b_ready: Any = None
    k_landed: Any = None  # [num_stages]; K, still without its low-rank part


@dataclasses.dataclass(frozen=True)
class Config:
    """What a kernel is compiled for. Ranks are 0 where there is no such pool."""

    T: int  # of a row
    H: int
    G: int
    K: int
    p: int
    r_v: int
    r_k: int
    num_adapters: int
    dtype: Any
    exp2_scale: float
    blocks: BlockSizes
    interpret: bool

    def slot(self, step):
        """Of the ring, where a block of keys lies."""
        return lax.rem(step, jnp.int32(self.blocks.num_stages))

    @property
    def slots_per_copy(self) -> int:
        return min(self.p, self.blocks.block_kv)

    @property
    def copies(self) -> int:
        """How many pieces a block of keys comes in."""
        return self.blocks.block_kv // self.slots_per_copy

    def ranks_per_copy(self, rank: int) -> int:
        """Rows of a low-rank page that a copy brings: all, unless other pages' lanes or zeros lie between them."""
        return rank if self.copies == 1 and rank % 16 == 0 else 8

    def low_rank_copies(self, rank: int) -> int:
        """Copies that bring a block of low-rank keys or values."""
        return self.copies * (padded_rank(rank) // self.ranks_per_copy(rank)) if rank else 0

    @property
    def v_arrivals(self) -> int:
        return self.copies + self.low_rank_copies(self.r_v)

    @property
    def name(self) -> str:
        ranks = "".join(f"_{target}{rank}" for target, rank in (("v", self.r_v), ("k", self.r_k)) if rank)
        return f"lora_prefill_h{self.H}_p{self.p}{ranks}_kv{self.blocks.block_kv}x{self.blocks.num_stages}"

    @property
    def k_lanes(self) -> int:
        """Width of the tiles of Q and K: the narrower, the fewer registers the rebuilding of K takes at a time."""
        return 32 if self.r_k else 64

    @property
    def expanded_parts(self) -> int:
        return self.blocks.block_kv // EXPANDED_KEYS

    @property
    def low_rank_v_lanes(self) -> int:
        return min(self.blocks.block_kv // 2, self.p)

    def memory(self, return_lse: bool) -> Memory:
        stages, block_kv = self.blocks.num_stages, self.blocks.block_kv
        R_v, R_k = padded_rank(self.r_v), padded_rank(self.r_k)

        def tiled(*shape, lanes=64):
            """Tiles of 8 rows, swizzled, as wgmma and the copy engine take it; a wgmma sums over `lanes` at a time."""
            transforms = (plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(2 * lanes))
            return plgpu.SMEM(shape, self.dtype, transforms=transforms)

        memory = Memory(
            q=tiled(COMPUTE_WARPGROUPS, BLOCK_Q, self.H, lanes=self.k_lanes),
            k=tiled(stages, block_kv, self.H, lanes=self.k_lanes),
            v=tiled(stages, block_kv, self.H),
            lse=plgpu.SMEM((COMPUTE_WARPGROUPS, BLOCK_Q), jnp.float32) if return_lse else None,
        )
        if self.r_v:
            low_rank = tiled(stages, R_v, block_kv, lanes=self.low_rank_v_lanes)
            memory = memory._replace(low_rank_v=low_rank, b_v=tiled(R_v, self.H, lanes=16))
        if self.r_k:
            low_rank = tiled(stages, R_k, block_kv, lanes=16)
            b_k = tiled(R_k, self.H, lanes=16)
            memory = memory._replace(
                low_rank_k=low_rank, b_k=b_k, b_k_turned=b_k, b_k_rotated=b_k,
                rope_starts=plgpu.SMEM((stages, self.expanded_parts, 2, self.H), jnp.float32),
            )  # fmt: skip
        return memory

    def barriers(self) -> Barriers:
        stages = self.blocks.num_stages
        k_copies = self.copies + self.low_rank_copies(self.r_k)
        b_copies = (padded_rank(self.r_v) + 2 * padded_rank(self.r_k)) // 8
        for_both = plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS)
        for_each = plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS)
        barriers = Barriers(
            q_ready=plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
            k_ready=plgpu.Barrier(num_arrivals=1 if self.r_k else k_copies, num_barriers=stages),
            v_ready=plgpu.Barrier(num_arrivals=self.v_arrivals, num_barriers=stages + 1),
            k_free=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
            v_free=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
            turn=for_both if self.r_k else for_each,
            b_ready=plgpu.Barrier(num_arrivals=b_copies) if b_copies else None,
        )
        if not self.r_k:
            return barriers._replace(pinned=plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS))
        return barriers._replace(k_landed=plgpu.Barrier(num_arrivals=k_copies + 1, num_barriers=stages))


class Tile(NamedTuple):
    """What a program works on, in scalars."""

    b: Any
    head: Any
    kv_head: Any
    q0: Any  # index of its first query among the row's
    start: Any  # that query's position
    kv_len: Any
    end: Any  # keys that the row's last query sees
    adapter: Any  # 0 where there is none, or none that exists
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
    return Tile(b, head, kv_head, q0, q_start + q0, kv_len, end, adapter, exists)
