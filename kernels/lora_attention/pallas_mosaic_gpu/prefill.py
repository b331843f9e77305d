"""Prefill: many new queries per row, one program per (row, tile of queries, query head).

Two warpgroups compute, 64 queries each, and a third one feeds them: it follows the page table and has the tensor
memory accelerator bring K, V and low-rank pages into a ring of shared-memory slots. The two take turns at the tensor
cores (`prefill_schedule`).

What adapters add comes in one of two ways. Low-rank keys, and values where queries are many, are expanded before, once
for all of them (`expansion`), and read in place of the base ones. Otherwise a second accumulator o_lr = P L is kept
beside o = P V, and B is applied to it once, at the end: P (V + L B) = P V + (P L) B.

Whatever must not be read is asked for at a page that lies outside of its pool (`pages`). Only the last page that a row
holds can carry slots that are not its own; the feeding warpgroup clears them before anyone else sees them.
"""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from lragent_jax.kernels.hopper import SHARED_MEMORY, interpreter
from lragent_jax.kernels.lora_attention.arguments import LoraB, LowRank, PageTable
from lragent_jax.kernels.lora_attention.expanded_rows import in_turn
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.expansion import expand, pays
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.prefill_config import (
    BLOCK_Q,
    COMPUTE_WARPGROUPS,
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
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.prefill_feed import feed
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.prefill_schedule import attend
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.prefill_softmax import Softmax
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.registers import multiply_add
from lragent_jax.kernels.lora_attention.tuned import tuned_block_sizes

LOG2_E = math.log2(math.e)

REGISTERS = (232, 40)  # per thread of the warpgroups that compute and of the one that feeds: 504 for three of them


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

    plgpu.copy_gmem_to_smem(inputs.q.at[tile.row.b, queries, lanes], q, barriers.q_ready.at[warpgroup])
    plgpu.barrier_wait(barriers.q_ready.at[warpgroup])

    state = attend(cfg, first, unmasked, steps, all_steps, q, smem, barriers)
    finish(cfg, tile, first, state, q, smem, barriers)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q, outputs.o.at[tile.row.b, queries, lanes])
    if outputs.lse is not None:
        plgpu.copy_smem_to_gmem(smem.lse.at[warpgroup], outputs.lse.at[tile.row.b, tile.head, queries])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def finish(cfg: Config, tile: Tile, first, state: Softmax, o_smem, smem: Memory, barriers: Barriers) -> None:
    """Normalises, applies B, and leaves o and lse in shared memory; zero and -inf for padding."""
    # What does not exist answers with NaN: see arguments.LoraB.select.
    inverse = jnp.where(tile.exists, jnp.float32(1), jnp.float32(jnp.nan)) / state.l
    o = state.o * lax.broadcast_in_dim(inverse, state.o.shape, [0])
    if cfg.r:
        o_lr = state.o_lr * lax.broadcast_in_dim(inverse, state.o_lr.shape, [0])
        high = o_lr.astype(cfg.dtype)
        low = (o_lr - high.astype(jnp.float32)).astype(cfg.dtype)  # both together: o_lr to twice as many bits
        plgpu.barrier_wait(barriers.b_ready)

        (o,) = multiply_add([(o, ((high, smem.lora_b), (low, smem.lora_b)))], interpret=cfg.interpret)

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
    computing, feeding = REGISTERS

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _compute():
        plgpu.set_max_registers(computing, action="increase")
        compute(cfg, tile, warpgroup, all_steps, inputs, outputs, smem, barriers)

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _feed():
        plgpu.set_max_registers(feeding, action="decrease")
        feed(cfg, tile, all_steps, inputs, smem, barriers)


def refuse_unsupported(q, base, low_rank: LowRank | None, left: LowRank, sm_scale: float, blocks: BlockSizes) -> None:
    """left: of the low-rank pools, those that are not expanded."""
    H, p = q.shape[3], base.shape[2]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"prefill on tensor cores takes bfloat16 and float16, not {q.dtype}")
    if H not in (64, 128):
        raise NotImplementedError(f"prefill takes head dims 64 and 128, not {H}")
    if p < 16 or (blocks.block_kv % p and p % blocks.block_kv):
        raise NotImplementedError(f"prefill takes pages of 16, 32, 64, 128 or a multiple of 128 slots, not {p}")
    if sm_scale <= 0:
        raise NotImplementedError(f"prefill takes a positive sm_scale, not {sm_scale}")
    rank = 0 if left.v is None else left.v.shape[1]
    if shared_memory(H, rank, blocks) > SHARED_MEMORY:
        raise NotImplementedError(f"prefill has too little shared memory for rank {rank} and {blocks}")
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
    (_, T, N, H), (_, K, p, _) = q.shape, base.shape
    targets = tuple(
        target
        for target, pool in zip(LowRank._fields, low_rank or LowRank(None), strict=True)
        if pool is not None and pays(target, T, H, N // K, pool.shape[1])
    )
    left = LowRank(None if low_rank is None or "v" in targets else low_rank.v)
    tuned = None if block_sizes else tuned_block_sizes("pallas_mosaic_gpu", "prefill", BlockSizes, q, base, left)
    blocks = block_sizes or tuned or heuristic()
    refuse_unsupported(q, base, low_rank, left, sm_scale, blocks)

    # S, positions of what is expanded: a whole number of either kernel's blocks.
    num_positions = -(-page_table.base.shape[1] * p // blocks.block_kv) * blocks.block_kv

    def attend(q, page_table, adapter_ids):
        return attend_rows(
            q, page_table, adapter_ids, base, low_rank, lora_b, rope_inv_freq, targets=targets, blocks=blocks,
            num_positions=num_positions, sm_scale=sm_scale, return_lse=return_lse, interpret=interpret,
        )  # fmt: skip

    row_bytes = len(targets) * num_positions * K * H * q.dtype.itemsize
    return in_turn(attend, row_bytes, q, page_table, adapter_ids)


# Traced and lowered once for all rows that take turns.
@functools.partial(
    jax.jit, static_argnames=("targets", "blocks", "num_positions", "sm_scale", "return_lse", "interpret")
)
def attend_rows(
    q, page_table, adapter_ids, base, low_rank, lora_b, rope_inv_freq, *, targets: tuple[str, ...], blocks: BlockSizes,
    num_positions: int, sm_scale: float, return_lse: bool, interpret: bool,
):  # fmt: skip
    """`prefill`, of rows whose low-rank `targets` are expanded."""
    expanded = {
        target: expand(
            getattr(lora_b, target), getattr(low_rank, target), base, page_table, adapter_ids,
            num_positions=num_positions, rope_inv_freq=rope_inv_freq if target == "k" else None, interpret=interpret,
        )
        for target in targets
    }  # fmt: skip
    B, T, N, H = q.shape
    P, K, p = base.shape[:3]
    tiles = -(-T // TILE_Q)
    # The copy engine reads zeros behind the last row and writes nothing there, but rows come in eights, a box at least.
    padding = max(BLOCK_Q, -(-T // 8) * 8) - T
    rows = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0))).reshape(B, -1, N * H)
    inputs = Inputs(
        rows, base.reshape(P * K, p, 2 * H), page_table.base, page_table.q_starts, page_table.kv_lens,
        keys=expanded.get("k"), values=expanded.get("v"),
    )  # fmt: skip
    r, num_adapters = 0, 0
    if low_rank is not None and lora_b is not None:
        num_adapters = max(b.shape[0] for b in lora_b if b is not None)
        inputs = inputs._replace(adapter_ids=adapter_ids)
        if low_rank.v is not None and lora_b.v is not None and "v" not in targets:
            r = low_rank.v.shape[1]
            b_v = lora_b.v.reshape(num_adapters, r, K * H)
            inputs = inputs._replace(low_rank=low_rank.v, lora_b=b_v, low_rank_table=page_table.low_rank)
    cfg = Config(
        *(T, H, N // K, K, p, r), expanded_keys="k" in targets, expanded_values="v" in targets,
        num_adapters=num_adapters, dtype=q.dtype, exp2_scale=sm_scale * LOG2_E, blocks=blocks, interpret=interpret,
    )  # fmt: skip
    lse = jax.ShapeDtypeStruct((B, N, tiles * TILE_Q), jnp.float32) if return_lse else None
    o, lse = run_kernel(cfg, inputs, Outputs(jax.ShapeDtypeStruct(rows.shape, q.dtype), lse), (N, tiles, B))
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
        # Its layouts are written down, as those of kernels/page_write are, and need no solver.
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name=cfg.name,
        **interpreter(cfg.interpret),
    )
    return jax.tree.unflatten(as_outputs, kernel(*arrays))
