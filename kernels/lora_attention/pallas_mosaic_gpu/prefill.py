"""Prefill: many new queries per row, one program per (row, tile of queries, query head).

Two warpgroups compute, 64 queries each, and a third one feeds them: it follows the page table and has the tensor
memory accelerator bring K, V and low-rank pages into a ring of shared-memory slots. The two take turns at the tensor
cores, one multiplying while the other does its softmax (Flash Attention 3, arXiv 2407.08608; the schedule is that of
JAX's own Mosaic kernel). Beside o = P V a second accumulator o_lr = P L is kept, and B is applied to it once, at the
end: P (V + L B) = P V + (P L) B. Where keys have a low-rank part, too, a fourth warpgroup adds it to K where it lies.

Whatever must not be read is asked for at a page that lies outside of its pool: the copy engine then writes zeros, so
rows without an adapter and pages behind a row's keys take no branch of their own. Only the last page that a row holds
can carry slots that are not its own; the feeding warpgroup clears them before anyone else sees them.
"""

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
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.prefill_config import (
    BLOCK_Q,
    COMPUTE_WARPGROUPS,
    SHARED_MEMORY,
    TILE_Q,
    Barriers,
    BlockSizes,
    Config,
    Inputs,
    Memory,
    Outputs,
    Tile,
    heuristic,
    padded_rank,
    shared_memory,
    this_tile,
)
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.prefill_feed import expand_keys, feed
from lragent_jax.kernels.lora_attention.tuned import tuned_block_sizes

LOG2_E = math.log2(math.e)

# Registers per thread of the warpgroups that compute, copy, and expand keys: 504 for three of them, 512 for four.
REGISTERS = (232, 40, 0)
REGISTERS_WITH_KEYS = (176, 40, 120)


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
    return Softmax(full(0, (BLOCK_Q, cfg.H), tile), o_lr, full(-jnp.inf, (BLOCK_Q,), row), full(0, (BLOCK_Q,), row))


def multiply_add(cfg: Config, terms, meanwhile: Callable[[], None] | None = None) -> tuple:
    """acc + a1 b1 + a2 b2 .. for every (acc, ((a1, b1), (a2, b2) ..)); a in registers, b in shared memory."""
    if cfg.interpret:  # the interpreter multiplies only what lies in shared memory
        if meanwhile is not None:
            meanwhile()
        dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
        sums = tuple(acc + sum(dot(a, b[...]) for a, b in products) for acc, products in terms)
        plgpu.commit_smem()  # as a wgmma's, these reads are over before the next copy
        return sums

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
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


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
    # The small product first: the faster order where it was timed, at r = 16.
    *o_lr, o = multiply_add(cfg, terms[::-1], meanwhile=await_next)
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


def kernel_body(cfg: Config, inputs: Inputs, outputs: Outputs, smem: Memory, barriers: Barriers) -> None:
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
    tuned = None if block_sizes else tuned_block_sizes("pallas_mosaic_gpu", "prefill", BlockSizes, q, base, low_rank)
    blocks = block_sizes or tuned or heuristic(H, r_v, r_k)
    refuse_unsupported(q, base, low_rank, sm_scale, blocks)

    tiles = -(-T // TILE_Q)
    # The copy engine reads zeros behind the last row and writes nothing there, but rows come in eights, a box at least.
    padding = max(BLOCK_Q, -(-T // 8) * 8) - T
    rows = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0))).reshape(B, -1, N * H)
    inputs = Inputs(rows, base.reshape(P * K, p, 2 * H), page_table.base, page_table.q_starts, page_table.kv_lens)
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
    o, lse = run_kernel(cfg, inputs, Outputs(jax.ShapeDtypeStruct(rows.shape, q.dtype), lse), (N, tiles, B))
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
        # Its layouts are written down, as those of kernels/page_write are, and need no solver.
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name=cfg.name,
        **({"interpret": plgpu.InterpretGPUParams(detect_races=True)} if cfg.interpret else {}),
    )
    return jax.tree.unflatten(as_outputs, kernel(*arrays))
