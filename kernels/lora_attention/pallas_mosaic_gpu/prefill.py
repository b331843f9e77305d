"""Prefill: many new queries per row, one program per (row, tile of queries, query head).

Two warpgroups compute, 64 queries each, and a third one feeds them: it follows the page table and has the tensor
memory accelerator bring K, V and low-rank pages into a ring of shared-memory slots. The two take turns at the tensor
cores, one multiplying while the other does its softmax (Flash Attention 3, arXiv 2407.08608; the schedule is that of
JAX's own Mosaic kernel). Beside o = P V a second accumulator o_lr = P L is kept, and B is applied to it once, at the
end: P (V + L B) = P V + (P L) B.

Whatever must not be read is asked for at a page that lies outside of its pool: the copy engine then writes zeros, so
rows without an adapter and pages behind a row's keys take no branch of their own. Only the last page that a row holds
can carry slots that are not its own; the feeding warpgroup clears them before anyone else sees them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from lragent_jax.kernels.lora_attention.arguments import LoraB, LowRank, PageTable

BLOCK_Q = 64  # queries of a warpgroup: rows of one wgmma
COMPUTE_WARPGROUPS = 2
TILE_Q = BLOCK_Q * COMPUTE_WARPGROUPS
LOG2_E = math.log2(math.e)

# Registers per thread of the warpgroups that compute, copy, and expand keys: 512 or fewer for the four or three of them.
REGISTERS = (232, 40, 0)
REGISTERS_WITH_KEYS = (192, 40, 88)

SHARED_MEMORY = 227 * 1024


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
    """Bytes that a program takes: queries, what `Memory` holds of keys and values, and a little for barriers."""
    ranks = padded_rank(rank_v) + padded_rank(rank_k)
    per_key = blocks.num_stages * (2 * head_dim + ranks) + (head_dim if rank_k else 0)
    return 2 * (TILE_Q * head_dim + blocks.block_kv * per_key + ranks * head_dim) + 4 * 1024


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
    rope: Any = None  # [W p, H] f16: cosines in the first half of the lanes, sines in the second
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
    rope: Any = None  # [block_kv, H]
    lse: Any = None  # [2, 64]


class Barriers(NamedTuple):
    q_ready: Any  # [2]
    k_ready: Any  # [num_stages]
    v_ready: Any  # [num_stages + 1]; the last one: what has landed and must be cleaned before it is ready
    k_free: Any  # [num_stages]
    v_free: Any  # [num_stages]
    turn: Any  # whose turn at the tensor cores it is
    b_ready: Any = None
    k_landed: Any = None  # [num_stages]; K, still without its low-rank part
    rope_landed: Any = None
    rope_free: Any = None


@dataclasses.dataclass(frozen=True)
class Config:
    """What a kernel is compiled for. Ranks are 0 where there is no such pool."""

    T: int  # before padding
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
    def low_rank_v_lanes(self) -> int:
        return min(self.blocks.block_kv // 2, self.p)

    def memory(self, return_lse: bool) -> Memory:
        stages, block_kv = self.blocks.num_stages, self.blocks.block_kv
        R_v, R_k = padded_rank(self.r_v), padded_rank(self.r_k)

        def tiled(*shape, lanes=64, dtype=self.dtype):
            """Tiles of 8 rows, swizzled, as wgmma and the copy engine both take it; as many lanes as wgmmas sum over."""
            transforms = (plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(2 * lanes))
            return plgpu.SMEM(shape, dtype, transforms=transforms)

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
            rope = tiled(block_kv, self.H, lanes=self.k_lanes, dtype=jnp.float16)
            memory = memory._replace(low_rank_k=low_rank, b_k=tiled(R_k, self.H, lanes=16), rope=rope)
        return memory

    def barriers(self) -> Barriers:
        stages = self.blocks.num_stages
        k_copies = self.copies + self.low_rank_copies(self.r_k)
        b_copies = (padded_rank(self.r_v) + padded_rank(self.r_k)) // 8
        barriers = Barriers(
            q_ready=plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
            k_ready=plgpu.Barrier(num_arrivals=1 if self.r_k else k_copies, num_barriers=stages),
            v_ready=plgpu.Barrier(num_arrivals=self.v_arrivals, num_barriers=stages + 1),
            k_free=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
            v_free=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
            turn=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
            b_ready=plgpu.Barrier(num_arrivals=b_copies) if b_copies else None,
        )
        if not self.r_k:
            return barriers
        landed = plgpu.Barrier(num_arrivals=k_copies, num_barriers=stages)
        return barriers._replace(k_landed=landed, rope_landed=plgpu.Barrier(), rope_free=plgpu.Barrier())


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


# The warpgroup that copies.


def feed(cfg: Config, tile: Tile, steps, inputs: Inputs, smem: Memory, barriers: Barriers) -> None:
    """Fills slot after slot with keys and values, as the other warpgroups get done with them."""
    block_kv, stages = cfg.blocks.block_kv, cfg.blocks.num_stages
    for pool, rank, target in ((inputs.b_v, cfg.r_v, smem.b_v), (inputs.b_k, cfg.r_k, smem.b_k)):
        if rank:
            adapter = jnp.where(tile.adapter > 0, tile.adapter, cfg.num_adapters)
            lanes = pl.ds(tile.kv_head * cfg.H, cfg.H)
            copy_ranks(pool, adapter, lanes, rank, 8, target, barriers.b_ready)

    def locate_block(step):
        return [locate(cfg, tile, inputs, step * block_kv + i * cfg.slots_per_copy) for i in range(cfg.copies)]

    def copy_block(step, pieces):
        slot = lax.rem(step, jnp.int32(stages))
        next_pieces = locate_block(step + 1)  # a read of device memory, under way while this block waits for its slot
        partly_filled = tile.kv_len < (step + 1) * block_kv
        k_landed = (barriers.k_landed if cfg.r_k else barriers.k_ready).at[slot]
        v_landed = barriers.v_ready.at[jnp.where(partly_filled, stages, slot)]

        pl.when(step >= stages)(lambda: plgpu.barrier_wait(barriers.k_free.at[slot]))
        copy_base(cfg, inputs, pieces, 0, smem.k.at[slot], k_landed)
        if cfg.r_k:
            copy_low_rank(cfg, inputs.low_rank_k, pieces, cfg.r_k, smem.low_rank_k.at[slot], k_landed)
            pl.when(step > 0)(lambda: plgpu.barrier_wait(barriers.rope_free))
            plgpu.copy_gmem_to_smem(inputs.rope.at[pl.ds(step * block_kv, block_kv)], smem.rope, barriers.rope_landed)
        pl.when(step >= stages)(lambda: plgpu.barrier_wait(barriers.v_free.at[slot]))
        copy_base(cfg, inputs, pieces, cfg.H, smem.v.at[slot], v_landed)
        if cfg.r_v:
            copy_low_rank(cfg, inputs.low_rank_v, pieces, cfg.r_v, smem.low_rank_v.at[slot], v_landed)

        @pl.when(partly_filled)
        def _clean():
            plgpu.barrier_wait(v_landed)
            clear_from(cfg, smem, slot, tile.kv_len - step * block_kv)
            plgpu.commit_smem()
            for _ in range(cfg.v_arrivals):
                plgpu.barrier_arrive(barriers.v_ready.at[slot])

        return next_pieces

    lax.fori_loop(0, steps, copy_block, locate_block(jnp.int32(0)))

    @pl.loop(jnp.maximum(steps - stages, 0), steps)
    def _drain(step):
        slot = lax.rem(step, jnp.int32(stages))
        plgpu.barrier_wait(barriers.k_free.at[slot])
        plgpu.barrier_wait(barriers.v_free.at[slot])

    if cfg.r_k:
        pl.when(steps > 0)(lambda: plgpu.barrier_wait(barriers.rope_free))


def locate(cfg: Config, tile: Tile, inputs: Inputs, position):
    """Where a key lies: page and kv head in the base pool, low-rank page, offset in both. Nowhere if the row lacks it."""
    held = position < tile.kv_len
    column = jnp.where(held, lax.div(position, jnp.int32(cfg.p)), 0)
    page = jnp.where(held, inputs.table[tile.b, column] * cfg.K + tile.kv_head, inputs.base.shape[0])
    offset = lax.rem(position, jnp.int32(cfg.p))
    if not cfg.num_adapters:
        return page, page, offset
    held &= tile.adapter > 0
    nowhere = max(pool.shape[0] for pool in (inputs.low_rank_v, inputs.low_rank_k) if pool is not None)
    return page, jnp.where(held, inputs.low_rank_table[tile.b, column], nowhere), offset


def copy_base(cfg: Config, inputs: Inputs, pieces, lane: int, target, barrier) -> None:
    """Copies a block of K (lane 0) or V (lane H) to `target` [block_kv, H]."""
    for i, (page, _, offset) in enumerate(pieces):
        rows = pl.ds(pl.multiple_of(offset, cfg.slots_per_copy), cfg.slots_per_copy)
        part = target.at[pl.ds(i * cfg.slots_per_copy, cfg.slots_per_copy)]
        plgpu.copy_gmem_to_smem(inputs.base.at[page, rows, pl.ds(lane, cfg.H)], part, barrier)


def copy_low_rank(cfg: Config, pool, pieces, rank: int, target, barrier) -> None:
    """Copies a block of low-rank keys or values to `target` [R, block_kv]."""
    for i, (_, page, offset) in enumerate(pieces):
        lanes = pl.ds(pl.multiple_of(offset, cfg.slots_per_copy), cfg.slots_per_copy)
        part = target.at[:, pl.ds(i * cfg.slots_per_copy, cfg.slots_per_copy)]
        copy_ranks(pool, page, lanes, rank, cfg.ranks_per_copy(rank), part, barrier)


def copy_ranks(pool, page, lanes, rank: int, rows: int, target, barrier) -> None:
    """Copies [rank, lanes] of a page, so many rows at a time, and zeros to the rows of `target` that pad the rank."""
    for row in range(0, padded_rank(rank), rows):
        at, first = (page, row) if row < rank else (pool.shape[0], 0)
        plgpu.copy_gmem_to_smem(pool.at[at, pl.ds(first, rows), lanes], target.at[pl.ds(row, rows)], barrier)


def clear_from(cfg: Config, smem: Memory, slot, limit) -> None:
    """Zeroes the values of a block's keys from `limit` on: 0 times what lies there would be NaN if that is."""

    def keep(part, dim, count, lanes=64):  # `part`: four tiles of 8 rows, its keys on axis `dim`
        layout = plgpu.Layout.SMEM_GMEM_COPY(part.shape, cfg.dtype, 2 * lanes)
        index = plgpu.broadcasted_iota(jnp.int32, part.shape, dim, layout=layout)
        values = plgpu.layout_cast(part[...], layout)
        part[...] = jnp.where(index < count, values, jnp.zeros_like(values))

    rows = 4 * 8 * 64 // cfg.H

    @pl.loop(lax.div(limit, jnp.int32(rows)), cfg.blocks.block_kv // rows)
    def _values(i):
        row = pl.multiple_of(i * rows, rows)
        keep(smem.v.at[slot, pl.ds(row, rows)], 0, limit - row)

    if cfg.r_v:

        @pl.loop(0, padded_rank(cfg.r_v) // 16)
        def _low_rank_values(i):
            rows = pl.ds(pl.multiple_of(i * 16, 16), 16)
            keep(smem.low_rank_v.at[slot, rows], 1, limit, lanes=cfg.low_rank_v_lanes)


# The warpgroup that adds low-rank keys.


def expand_keys(cfg: Config, steps, smem: Memory, barriers: Barriers) -> None:
    """K += RoPE(L B) for slot after slot, 64 keys and some lanes of both halves of the head at a time."""
    half, width = cfg.H // 2, cfg.k_lanes
    plgpu.barrier_wait(barriers.b_ready)

    @pl.loop(0, steps)
    def _block(step):
        slot = lax.rem(step, jnp.int32(cfg.blocks.num_stages))
        plgpu.barrier_wait(barriers.k_landed.at[slot])
        plgpu.barrier_wait(barriers.rope_landed)
        for row in range(0, cfg.blocks.block_kv, 64):
            keys = pl.ds(row, 64)
            low_rank = smem.low_rank_k.at[slot, :, keys].transpose((1, 0))  # [64, R_k]
            for lane in range(0, half, width):
                first, second = pl.ds(lane, width), pl.ds(half + lane, width)
                x, y = (shared_product(cfg, low_rank, smem.b_k.at[:, lanes]) for lanes in (first, second))
                cos, sin = (read(smem.rope.at[keys, lanes]) for lanes in (first, second))
                add(smem.k.at[slot, keys, first], x * cos - y * sin)
                add(smem.k.at[slot, keys, second], y * cos + x * sin)
        plgpu.commit_smem()
        plgpu.barrier_arrive(barriers.rope_free)
        plgpu.barrier_arrive(barriers.k_ready.at[slot])


def shared_product(cfg: Config, a, b):
    """a b of two refs in shared memory."""

    def multiply(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def read(ref):
    return plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA).astype(jnp.float32)


def add(ref, x) -> None:
    ref[...] = (read(ref) + x).astype(ref.dtype)


# The warpgroups that compute.


class Softmax(NamedTuple):
    """An online softmax over base 2, f32 in registers: sums under the weights exp2(score - m), and the weights' sum."""

    o: Any  # [64, H]
    o_lr: Any  # [64, R_v] or None
    m: Any  # [64]
    l: Any  # [64]  # noqa: E741


def empty(cfg: Config) -> Softmax:
    row, tile = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA

    def full(fill, shape, layout):
        return plgpu.layout_cast(jnp.full(shape, fill, jnp.float32), layout)

    o_lr = full(0, (BLOCK_Q, padded_rank(cfg.r_v)), tile) if cfg.r_v else None
    return Softmax(
        full(0, (BLOCK_Q, cfg.H), tile), o_lr, full(-jnp.inf, (BLOCK_Q,), row), full(0, (BLOCK_Q,), row)
    )


def multiply_add(cfg: Config, terms, meanwhile: Callable[[], None] | None = None) -> tuple:
    """acc + a1 b1 + a2 b2 .. for every (acc, ((a1, b1), (a2, b2) ..)), all a in registers and all b in shared memory."""
    if cfg.interpret:  # the interpreter multiplies only what lies in shared memory
        if meanwhile is not None:
            meanwhile()
        dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
        return tuple(acc + sum(dot(a, b[...]) for a, b in products) for acc, products in terms)

    def issue(accumulators):
        for acc, (_, products) in zip(accumulators, terms, strict=True):
            for a, b in products:
                plgpu.wgmma(acc, a, b)
        if meanwhile is not None:
            meanwhile()

    return pl.run_state(issue)(tuple(plgpu.ACC.init(acc) for acc, _ in terms))


def compute(
    cfg: Config, tile: Tile, warpgroup, all_steps, inputs: Inputs, outputs: Outputs, smem: Memory, barriers: Barriers
) -> None:
    """64 queries against all keys that they see."""
    first = tile.start + warpgroup * BLOCK_Q
    steps = tile.steps(cfg, warpgroup)
    unmasked = jnp.clip(lax.div(first + 1, jnp.int32(cfg.blocks.block_kv)), 0, steps)
    queries = pl.ds(tile.q0 + warpgroup * BLOCK_Q, BLOCK_Q)
    lanes = pl.ds(tile.head * cfg.H, cfg.H)
    q = smem.q.at[warpgroup]  # [64, H]

    plgpu.copy_gmem_to_smem(inputs.q.at[tile.b, queries, lanes], q, barriers.q_ready.at[warpgroup])
    plgpu.barrier_wait(barriers.q_ready.at[warpgroup])
    pl.when(steps > 0)(lambda: plgpu.barrier_wait(barriers.k_ready.at[0]))
    pl.when(warpgroup == 1)(lambda: take_turn(barriers))
    body = functools.partial(attend_block, cfg, first, steps, q, smem, barriers)
    state = lax.fori_loop(0, unmasked, functools.partial(body, masked=False), empty(cfg))
    state = lax.fori_loop(unmasked, steps, functools.partial(body, masked=True), state)

    @pl.loop(steps, all_steps)
    def _skip(step):  # blocks that only the other warpgroup needs
        slot = lax.rem(step, jnp.int32(cfg.blocks.num_stages))
        plgpu.barrier_arrive(barriers.k_free.at[slot])
        plgpu.barrier_arrive(barriers.v_free.at[slot])
        take_turn(barriers)
        take_turn(barriers)

    pl.when(warpgroup == 0)(lambda: take_turn(barriers))
    finish(cfg, tile, first, state, q, smem, barriers)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q, outputs.o.at[tile.b, queries, lanes])
    if outputs.lse is not None:
        plgpu.copy_smem_to_gmem(smem.lse.at[warpgroup], outputs.lse.at[tile.b, tile.head, queries])
    plgpu.wait_smem_to_gmem(0)


def take_turn(barriers: Barriers) -> None:
    plgpu.barrier_arrive(barriers.turn)
    plgpu.barrier_wait(barriers.turn)


def attend_block(
    cfg: Config, first, steps, q, smem: Memory, barriers: Barriers, step, state: Softmax, *, masked: bool
) -> Softmax:
    """The state after one more block of keys. Its K has been waited for; the next block's is, too, on return."""
    block_kv, stages = cfg.blocks.block_kv, jnp.int32(cfg.blocks.num_stages)
    slot, next_slot = lax.rem(step, stages), lax.rem(step + 1, stages)

    def score(scores):
        plgpu.wgmma(scores, q, smem.k.at[slot].transpose((1, 0)))
        take_turn(barriers)
        return scores[...]

    scores = pl.run_scoped(score, plgpu.ACC((BLOCK_Q, block_kv), jnp.float32))
    plgpu.barrier_arrive(barriers.k_free.at[slot])
    if masked:
        query, key = (
            plgpu.broadcasted_iota(jnp.int32, scores.shape, dim, layout=plgpu.Layout.WGMMA) for dim in range(2)
        )
        scores = jnp.where(key + (step * block_kv - first) <= query, scores, -jnp.inf)

    m = jnp.maximum(state.m, scores.max(axis=1) * cfg.exp2_scale)
    rescale = jnp.exp2(state.m - m)
    probs = jnp.exp2(scores * cfg.exp2_scale - lax.broadcast_in_dim(m, scores.shape, [0]))
    sums = state.l * rescale + probs.sum(axis=1)
    accumulators = tuple(
        a * lax.broadcast_in_dim(rescale, a.shape, [0]) for a in (state.o, state.o_lr) if a is not None
    )
    accumulators, m, sums, probs = lax.optimization_barrier((accumulators, m, sums, probs.astype(cfg.dtype)))
    plgpu.barrier_arrive(barriers.turn)
    plgpu.barrier_wait(barriers.v_ready.at[slot])
    plgpu.barrier_wait(barriers.turn)

    def await_next():
        pl.when(step + 1 < steps)(lambda: plgpu.barrier_wait(barriers.k_ready.at[next_slot]))

    values = [smem.v.at[slot]]
    if cfg.r_v:
        values.append(smem.low_rank_v.at[slot].transpose((1, 0)))
    terms = [(acc, ((probs, v),)) for acc, v in zip(accumulators, values, strict=True)]
    o, *o_lr = multiply_add(cfg, terms, meanwhile=await_next)
    plgpu.barrier_arrive(barriers.v_free.at[slot])
    return Softmax(o, o_lr[0] if o_lr else None, m, sums)


def finish(cfg: Config, tile: Tile, first, state: Softmax, o_smem, smem: Memory, barriers: Barriers) -> None:
    """Normalises, applies B, and leaves o and lse in shared memory; zero and -inf for padding."""
    # What does not exist answers with NaN: see arguments.LoraB.select.
    inverse = jnp.where(tile.exists, jnp.float32(1), jnp.float32(jnp.nan)) / state.l
    o = state.o * lax.broadcast_in_dim(inverse, state.o.shape, [0])
    if cfg.r_v:
        o_lr = state.o_lr * lax.broadcast_in_dim(inverse, state.o_lr.shape, [0])
        high = o_lr.astype(cfg.dtype)
        low = (o_lr - high.astype(jnp.float32)).astype(cfg.dtype)  # both together: o_lr to twice as many bits
        plgpu.barrier_wait(barriers.b_ready)

        (o,) = multiply_add(cfg, [(o, ((high, smem.b_v), (low, smem.b_v)))])

    def live(shape, layout):
        position = first + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
        return (position >= 0) & (position < tile.end)

    o_smem[...] = jnp.where(live(o.shape, plgpu.Layout.WGMMA), o, 0.0).astype(cfg.dtype)
    if smem.lse is not None:
        lse = state.m * math.log(2) + jnp.log(state.l)
        lse = jnp.where(live(lse.shape, plgpu.Layout.WGMMA.reduce(1)), lse, -jnp.inf)
        smem.lse.at[lax.axis_index("warpgroup")][...] = lse


def kernel_body(
    cfg: Config, inputs: Inputs, outputs: Outputs, smem: Memory, barriers: Barriers
) -> None:
    warpgroup = lax.axis_index("warpgroup")
    tile = this_tile(cfg, inputs)
    all_steps = jnp.maximum(tile.steps(cfg, 0), tile.steps(cfg, 1))
    computing, feeding, expanding = REGISTERS_WITH_KEYS if cfg.r_k else REGISTERS

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _compute():
        plgpu.set_max_registers(computing, action="increase")
        compute(cfg, tile, warpgroup, all_steps, inputs, outputs, smem, barriers)

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _feed():
        plgpu.set_max_registers(feeding, action="decrease")
        feed(cfg, tile, all_steps, inputs, smem, barriers)

    if cfg.r_k:

        @pl.when(warpgroup == COMPUTE_WARPGROUPS + 1)
        def _expand_keys():
            plgpu.set_max_registers(expanding, action="decrease")
            expand_keys(cfg, all_steps, smem, barriers)


def refuse_unsupported(q, base, low_rank: LowRank | None, sm_scale: float, blocks: BlockSizes) -> None:
    H, p = q.shape[3], base.shape[2]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"prefill on tensor cores takes bfloat16 and float16, not {q.dtype}")
    if H not in (64, 128):
        raise NotImplementedError(f"prefill takes head dims 64 and 128, not {H}")
    if p < 16 or (blocks.block_kv % p and p % blocks.block_kv):
        raise NotImplementedError(f"prefill takes pages of 16, 32, 64, 128 or a multiple of 128 slots, not {p}")
    if sm_scale <= 0:
        raise NotImplementedError(f"prefill takes a positive sm_scale, not {sm_scale}")
    ranks = [0 if pool is None else pool.shape[1] for pool in low_rank or LowRank(None)]
    if shared_memory(H, *ranks, blocks) > SHARED_MEMORY:
        raise NotImplementedError(f"prefill has too little shared memory for ranks {ranks} and {blocks}")
    for pool in low_rank or ():
        if pool is not None and (pool.shape[1] % 8 or pool.shape[1] > 64):
            raise NotImplementedError(f"prefill takes ranks 8, 16, 24 .. 64, not {pool.shape[1]}")


def prefill(
    q: Float[Array, "B T N H"],
    base: Float[Array, "P K p 2*H"],
    low_rank: LowRank | None,
    lora_b: LoraB | None,
    page_table: PageTable,
    adapter_ids: Int32[Array, " B"] | None,
    *,
    rope_inv_freq: Float[Array, " H//2"] | None,
    sm_scale: float,
    return_lse: bool,
    block_sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """See `api.lora_attention`; `block_sizes=None` asks the heuristic."""
    B, T, N, H = q.shape
    P, K, p = base.shape[:3]
    r_v, r_k = (0 if pool is None else pool.shape[1] for pool in low_rank or LowRank(None))
    blocks = block_sizes or heuristic(H, r_v, r_k)
    refuse_unsupported(q, base, low_rank, sm_scale, blocks)

    tiles = -(-T // TILE_Q)
    padded = jnp.pad(q, ((0, 0), (0, tiles * TILE_Q - T), (0, 0), (0, 0))).reshape(B, -1, N * H)
    inputs = Inputs(padded, base.reshape(P * K, p, 2 * H), page_table.base, page_table.q_starts, page_table.kv_lens)
    num_adapters = 0
    if low_rank is not None and lora_b is not None:
        num_adapters = max(b.shape[0] for b in lora_b if b is not None)
        b_v, b_k = (None if b is None else b.reshape(num_adapters, -1, K * H) for b in lora_b)
        rope = rope_table(-(-page_table.base.shape[1] * p // blocks.block_kv) * blocks.block_kv, rope_inv_freq)
        inputs = inputs._replace(
            low_rank_v=low_rank.v, low_rank_k=low_rank.k, b_v=b_v, b_k=b_k, rope=rope if r_k else None,
            low_rank_table=page_table.low_rank, adapter_ids=adapter_ids,
        )  # fmt: skip
    cfg = Config(
        *(T, H, N // K, K, p, r_v, r_k, num_adapters, q.dtype, sm_scale * LOG2_E), blocks=blocks, interpret=interpret
    )
    lse = jax.ShapeDtypeStruct((B, N, tiles * TILE_Q), jnp.float32) if return_lse else None
    o, lse = run_kernel(cfg, inputs, Outputs(jax.ShapeDtypeStruct(padded.shape, q.dtype), lse), (N, tiles, B))
    o = o[:, :T].reshape(q.shape)
    return (o, jnp.swapaxes(lse[..., :T], 1, 2)) if return_lse else o


def rope_table(num_positions: int, inv_freq) -> Float[Array, "S H"] | None:
    """Cosines and sines of all positions, side by side: the same for every layer, so XLA makes it once per step."""
    if inv_freq is None:
        return None
    angles = jnp.arange(num_positions, dtype=jnp.float32)[:, None] * inv_freq[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1).astype(jnp.float16)


def run_kernel(cfg: Config, inputs: Inputs, outputs: Outputs, grid: tuple[int, int, int]) -> Outputs:
    arrays, as_inputs = jax.tree.flatten(inputs)
    results, as_outputs = jax.tree.flatten(outputs)

    def body(*refs):
        scratch = refs[len(arrays) + len(results) :]
        kernel_body(
            cfg,
            jax.tree.unflatten(as_inputs, refs[: len(arrays)]),
            jax.tree.unflatten(as_outputs, refs[len(arrays) : len(arrays) + len(results)]),
            *scratch,
        )

    kernel = plgpu.kernel(
        body,
        out_type=tuple(results),
        scratch_types=(cfg.memory(outputs.lse is not None), cfg.barriers()),
        grid=grid,
        grid_names=("head", "tile", "row"),
        num_threads=COMPUTE_WARPGROUPS + (2 if cfg.r_k else 1),
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=cfg.name,
        **({"interpret": plgpu.InterpretGPUParams(detect_races=True)} if cfg.interpret else {}),
    )
    return jax.tree.unflatten(as_outputs, kernel(*arrays))
