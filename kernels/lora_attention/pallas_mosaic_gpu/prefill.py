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

# Registers per thread: those that compute take what the one that copies leaves of the 64 Ki of a multiprocessor.
COMPUTE_REGISTERS = 232
MEMORY_REGISTERS = 40

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


def heuristic(head_dim: int, rank: int) -> BlockSizes:
    """128 keys per turn, twice as many in flight where heads are narrow."""
    return BlockSizes(block_kv=128, num_stages=4 if head_dim == 64 and rank <= 16 else 2)


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
    adapter_ids: Any = None  # [B]


class Outputs(NamedTuple):
    o: Any  # [B, T, N H]
    lse: Any = None  # [B, N, T]


class Memory(NamedTuple):
    """Shared memory of a program. R_v: r_v rounded up to what a wgmma sums over."""

    q: Any  # [2, 64, H], at the end o
    k: Any  # [num_stages, block_kv, H]
    v: Any  # [num_stages, block_kv, H]
    low_rank_v: Any = None  # [num_stages, R_v, block_kv]
    b_v: Any = None  # [R_v, H]
    lse: Any = None  # [2, 64]


class Barriers(NamedTuple):
    q_ready: Any  # [2]
    k_ready: Any  # [num_stages]
    v_ready: Any  # [num_stages + 1]; the last one: what has landed and must be cleaned before it is ready
    k_free: Any  # [num_stages]
    v_free: Any  # [num_stages]
    turn: Any  # whose turn at the tensor cores it is
    b_ready: Any = None


@dataclasses.dataclass(frozen=True)
class Config:
    """What a kernel is compiled for, beside the shapes of its arguments. r_v is 0 where there is no such pool."""

    T: int  # before padding
    H: int
    G: int
    K: int
    p: int
    r_v: int
    num_pages: int
    num_low_rank_pages: int
    num_adapters: int
    dtype: Any
    exp2_scale: float
    blocks: BlockSizes
    interpret: bool

    @property
    def R_v(self) -> int:
        return -(-self.r_v // 16) * 16

    @property
    def slots_per_copy(self) -> int:
        return min(self.p, self.blocks.block_kv)

    @property
    def copies(self) -> int:
        """How many pieces a block of keys comes in."""
        return self.blocks.block_kv // self.slots_per_copy

    @property
    def ranks_per_copy(self) -> int:
        """Rows of a low-rank page that a copy brings: all, unless other pages' lanes lie between them."""
        return self.R_v if self.copies == 1 and self.R_v == self.r_v else 8

    @property
    def v_arrivals(self) -> int:
        """Copies that make a block of values and low-rank values."""
        return self.copies * (1 + self.R_v // self.ranks_per_copy)

    @property
    def name(self) -> str:
        rank = f"_r{self.r_v}" if self.r_v else ""
        return f"lora_prefill_h{self.H}_p{self.p}{rank}_kv{self.blocks.block_kv}x{self.blocks.num_stages}"

    def memory(self, return_lse: bool) -> Memory:
        stages, block_kv = self.blocks.num_stages, self.blocks.block_kv

        def tiled(*shape, lanes=64):
            """Tiles of 8 rows, swizzled: as wgmma and the copy engine both take it."""
            transforms = (plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(2 * lanes))
            return plgpu.SMEM(shape, self.dtype, transforms=transforms)

        return Memory(
            q=tiled(COMPUTE_WARPGROUPS, BLOCK_Q, self.H),
            k=tiled(stages, block_kv, self.H),
            v=tiled(stages, block_kv, self.H),
            low_rank_v=tiled(stages, self.R_v, block_kv, lanes=min(64, self.p)) if self.r_v else None,
            b_v=tiled(self.R_v, self.H, lanes=16) if self.r_v else None,  # lanes: summed over at a time
            lse=plgpu.SMEM((COMPUTE_WARPGROUPS, BLOCK_Q), jnp.float32) if return_lse else None,
        )

    def barriers(self) -> Barriers:
        stages = self.blocks.num_stages
        return Barriers(
            q_ready=plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
            k_ready=plgpu.Barrier(num_arrivals=self.copies, num_barriers=stages),
            v_ready=plgpu.Barrier(num_arrivals=self.v_arrivals, num_barriers=stages + 1),
            k_free=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
            v_free=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
            turn=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
            b_ready=plgpu.Barrier(num_arrivals=self.R_v // 8) if self.r_v else None,
        )


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
    if cfg.r_v:
        adapter = inputs.adapter_ids[b]
        exists = (adapter >= 0) & (adapter < cfg.num_adapters)
        adapter = jnp.where(exists, adapter, 0)
    end = jnp.minimum(kv_len, q_start + cfg.T)
    kv_head = lax.div(head, jnp.int32(cfg.G))
    return Tile(b, head, kv_head, q0, q_start + q0, kv_len, end, adapter, exists)


# The warpgroup that copies.


def feed(cfg: Config, tile: Tile, steps, inputs: Inputs, smem: Memory, barriers: Barriers) -> None:
    """Fills slot after slot with K, V and low-rank values, as the other warpgroups get done with them."""
    block_kv, stages = cfg.blocks.block_kv, cfg.blocks.num_stages
    if cfg.r_v:
        lanes = pl.ds(tile.kv_head * cfg.H, cfg.H)
        adapter = jnp.where(tile.adapter > 0, tile.adapter, cfg.num_adapters)
        copy_rank(cfg, inputs.b_v, adapter, cfg.num_adapters, lanes, smem.b_v, barriers.b_ready, 8)

    def locate_block(step):
        return [locate(cfg, tile, inputs, step * block_kv + i * cfg.slots_per_copy) for i in range(cfg.copies)]

    def copy_block(step, pieces):
        slot = lax.rem(step, jnp.int32(stages))
        next_pieces = locate_block(step + 1)  # a read of device memory, under way while this block waits for its slot
        partly_filled = tile.kv_len < (step + 1) * block_kv
        landed = barriers.v_ready.at[jnp.where(partly_filled, stages, slot)]

        def copy_base(lane, memory, barrier):
            for i, (page, _, offset) in enumerate(pieces):
                source = inputs.base.at[page, pl.ds(offset, cfg.slots_per_copy), pl.ds(lane, cfg.H)]
                target = memory.at[slot, pl.ds(i * cfg.slots_per_copy, cfg.slots_per_copy)]
                plgpu.copy_gmem_to_smem(source, target, barrier)

        pl.when(step >= stages)(lambda: plgpu.barrier_wait(barriers.k_free.at[slot]))
        copy_base(0, smem.k, barriers.k_ready.at[slot])
        pl.when(step >= stages)(lambda: plgpu.barrier_wait(barriers.v_free.at[slot]))
        copy_base(cfg.H, smem.v, landed)
        if cfg.r_v:
            for i, (_, page, offset) in enumerate(pieces):
                target = smem.low_rank_v.at[slot, :, pl.ds(i * cfg.slots_per_copy, cfg.slots_per_copy)]
                lanes = pl.ds(offset, cfg.slots_per_copy)
                copy_rank(cfg, inputs.low_rank_v, page, cfg.num_low_rank_pages, lanes, target, landed, cfg.ranks_per_copy)

        @pl.when(partly_filled)
        def _clean():
            plgpu.barrier_wait(landed)
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


def locate(cfg: Config, tile: Tile, inputs: Inputs, position):
    """Where a key lies: page and kv head in the base pool, low-rank page, offset in both. Nowhere if the row lacks it."""
    held = position < tile.kv_len
    column = jnp.where(held, lax.div(position, jnp.int32(cfg.p)), 0)
    page = jnp.where(held, inputs.table[tile.b, column], cfg.num_pages) * cfg.K + tile.kv_head
    offset = lax.rem(position, jnp.int32(cfg.p)) if cfg.p > cfg.blocks.block_kv else jnp.int32(0)
    if not cfg.r_v:
        return page, page, offset
    held &= tile.adapter > 0
    return page, jnp.where(held, inputs.low_rank_table[tile.b, column], cfg.num_low_rank_pages), offset


def copy_rank(cfg: Config, pool, page, nowhere: int, lanes, target, barrier, rows_per_copy: int) -> None:
    """Copies [r_v, lanes] of a page, and zeros to the rows of `target` that pad the rank."""
    for row in range(0, cfg.R_v, rows_per_copy):
        at, first_row = (page, row) if row < cfg.r_v else (nowhere, 0)
        source = pool.at[at, pl.ds(first_row, rows_per_copy), lanes]
        plgpu.copy_gmem_to_smem(source, target.at[pl.ds(row, rows_per_copy)], barrier)


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

        @pl.loop(0, cfg.R_v // 16)
        def _low_rank_values(i):
            keep(smem.low_rank_v.at[slot, pl.ds(pl.multiple_of(i * 16, 16), 16)], 1, limit, lanes=min(64, cfg.p))


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

    o_lr = full(0, (BLOCK_Q, cfg.R_v), tile) if cfg.r_v else None
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

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        compute(cfg, tile, warpgroup, all_steps, inputs, outputs, smem, barriers)

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _feed():
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
        feed(cfg, tile, all_steps, inputs, smem, barriers)


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
    if low_rank is not None and low_rank.k is not None:
        raise NotImplementedError("prefill takes no low-rank keys")
    if low_rank is not None and low_rank.v is not None and (low_rank.v.shape[1] % 8 or low_rank.v.shape[1] > 64):
        raise NotImplementedError(f"prefill takes ranks 8, 16, 24 .. 64, not {low_rank.v.shape[1]}")


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
    r_v = 0 if low_rank is None or low_rank.v is None else low_rank.v.shape[1]
    blocks = block_sizes or heuristic(H, r_v)
    refuse_unsupported(q, base, low_rank, sm_scale, blocks)

    tiles = -(-T // TILE_Q)
    padded = jnp.pad(q, ((0, 0), (0, tiles * TILE_Q - T), (0, 0), (0, 0))).reshape(B, -1, N * H)
    inputs = Inputs(
        padded, base.reshape(P * K, p, 2 * H), page_table.base, page_table.q_starts, page_table.kv_lens
    )
    num_low_rank_pages = num_adapters = 0
    if r_v:
        num_low_rank_pages, num_adapters = low_rank.v.shape[0], lora_b.v.shape[0]
        inputs = inputs._replace(
            low_rank_v=low_rank.v,
            b_v=lora_b.v.reshape(num_adapters, r_v, K * H),
            low_rank_table=page_table.low_rank,
            adapter_ids=adapter_ids,
        )
    cfg = Config(
        *(T, H, N // K, K, p, r_v, P, num_low_rank_pages, num_adapters, q.dtype, sm_scale * LOG2_E),
        blocks=blocks,
        interpret=interpret,
    )
    lse = jax.ShapeDtypeStruct((B, N, tiles * TILE_Q), jnp.float32) if return_lse else None
    o, lse = run_kernel(cfg, inputs, Outputs(jax.ShapeDtypeStruct(padded.shape, q.dtype), lse), (N, tiles, B))
    o = o[:, :T].reshape(q.shape)
    return (o, jnp.swapaxes(lse[..., :T], 1, 2)) if return_lse else o


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
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=cfg.name,
        **({"interpret": plgpu.InterpretGPUParams(detect_races=True)} if cfg.interpret else {}),
    )
    return jax.tree.unflatten(as_outputs, kernel(*arrays))
