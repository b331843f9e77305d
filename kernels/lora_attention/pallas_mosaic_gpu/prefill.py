"""Prefill: many new queries per row, one program per (row, tile of queries, query head).

Two warpgroups compute, 64 queries each, and a third one feeds them: it follows the page table and has the tensor
memory accelerator bring K, V and low-rank pages into a ring of shared-memory slots. The two take turns at the tensor
cores (`prefill_ahead`, `prefill_turns`). Beside o = P V a second accumulator o_lr = P L is kept, and B is applied to it
once, at the end: P (V + L B) = P V + (P L) B. Where keys have a low-rank part, too, a fourth warpgroup adds it to K
where it lies.

Whatever must not be read is asked for at a page that lies outside of its pool: the copy engine then writes zeros, so
rows without an adapter and pages behind a row's keys take no branch of their own. Only the last page that a row holds
can carry slots that are not its own; the feeding warpgroup clears them before anyone else sees them.
"""

import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from lragent_jax.kernels.hopper import SHARED_MEMORY
from lragent_jax.kernels.lora_attention.arguments import LoraB, LowRank, PageTable
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu import prefill_ahead, prefill_turns
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.prefill_config import (
    BLOCK_Q,
    COMPUTE_WARPGROUPS,
    EXPANDED_KEYS,
    TILE_Q,
    Barriers,
    BlockSizes,
    Config,
    Inputs,
    Memory,
    Outputs,
    Tile,
    heuristic,
    shared_memory,
    this_tile,
)
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.prefill_feed import expand_keys, feed
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.prefill_softmax import Softmax, multiply_add
from lragent_jax.kernels.lora_attention.tuned import tuned_block_sizes

LOG2_E = math.log2(math.e)

# Registers per thread of the warpgroups that compute, copy, and expand keys: 504 for three of them, 512 for four.
REGISTERS = (232, 40, 0)
REGISTERS_WITH_KEYS = (176, 40, 120)


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

    # With low-rank keys the registers do not hold the scores of one block and the weights of another.
    schedule = prefill_turns if cfg.r_k else prefill_ahead
    state = schedule.attend(cfg, first, unmasked, steps, all_steps, q, smem, barriers)
    finish(cfg, tile, first, state, q, smem, barriers)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q, outputs.o.at[tile.b, queries, lanes])
    if outputs.lse is not None:
        plgpu.copy_smem_to_gmem(smem.lse.at[warpgroup], outputs.lse.at[tile.b, tile.head, queries])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


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
            expand_keys(cfg, all_steps, inputs, smem, barriers)


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
        inputs = inputs._replace(
            low_rank_v=low_rank.v, low_rank_k=low_rank.k, b_v=b_v, b_k=b_k, low_rank_table=page_table.low_rank,
            adapter_ids=adapter_ids,
        )  # fmt: skip
        if r_k:
            turned = jnp.roll(lora_b.k, H // 2, axis=-1).reshape(b_k.shape)
            num_blocks = -(-page_table.base.shape[1] * p // blocks.block_kv)
            starts = rope_starts(num_blocks, blocks.block_kv // EXPANDED_KEYS, rope_inv_freq)
            inputs = inputs._replace(
                b_k_turned=turned, rope=rope_table(EXPANDED_KEYS, rope_inv_freq), rope_starts=starts
            )  # fmt: skip
    cfg = Config(
        *(T, H, N // K, K, p, r_v, r_k, num_adapters, q.dtype, sm_scale * LOG2_E), blocks=blocks, interpret=interpret
    )
    lse = jax.ShapeDtypeStruct((B, N, tiles * TILE_Q), jnp.float32) if return_lse else None
    o, lse = run_kernel(cfg, inputs, Outputs(jax.ShapeDtypeStruct(rows.shape, q.dtype), lse), (N, tiles, B))
    o = o[:, :T].reshape(q.shape)
    return (o, jnp.swapaxes(lse[..., :T], 1, 2)) if return_lse else o


def cos_and_sin(positions, inv_freq) -> tuple[Float[Array, "S half"], Float[Array, "S half"]]:
    angles = positions.astype(jnp.float32)[:, None] * inv_freq[None]
    return jnp.cos(angles), jnp.sin(angles)


def rope_table(num_positions: int, inv_freq) -> Float[Array, "S H"] | None:
    """Cosines and sines of all positions, side by side: the same for every layer, so XLA makes it once per step."""
    if inv_freq is None:
        return None
    return jnp.concatenate(cos_and_sin(jnp.arange(num_positions), inv_freq), axis=1).astype(jnp.float16)


def rope_starts(num_blocks: int, parts: int, inv_freq) -> Float[Array, "num_blocks parts 2 H"]:
    """`Inputs.rope_starts`; the same for every layer, too."""
    cos, sin = cos_and_sin(jnp.arange(num_blocks * parts) * EXPANDED_KEYS, inv_freq)
    starts = jnp.stack([jnp.concatenate([cos, cos], 1), jnp.concatenate([-sin, sin], 1)], axis=1)
    return starts.reshape(num_blocks, parts, 2, -1)


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
