"""One `pallas_call` over a grid of items: what prefill and decode have in common in how their program is set up."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from lragent_jax.kernels.lora_attention.arguments import LowRank
from lragent_jax.kernels.lora_attention.pallas_mosaic_tpu.block_sizes import LANES, VMEM_LIMIT
from lragent_jax.kernels.lora_attention.pallas_mosaic_tpu.items import Items
from lragent_jax.kernels.lora_attention.pallas_mosaic_tpu.kernel import Config, Item
from lragent_jax.kernels.page_update import kept_in_hbm


def run_items(
    finish: Callable,
    config: Config,
    name: str,
    grid: tuple[int, ...],
    items: Items,
    tables: tuple[Array, Array | None],
    q: tuple[Array, pl.BlockSpec],
    base: Array,
    low_rank: LowRank,
    b_k: Array | None,
    rope_inv_freq: Array | None,
    extra: list[tuple[Array, pl.BlockSpec]],
    outputs: list[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    *,
    interpret: bool,
):
    """Runs `Item.attend` and then `finish(item, *extra refs, *output refs)` for every item of the grid.

    The pools stay in HBM. B of the low-rank keys is read from there too, the adapters' that an item holds.
    """
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    scratch = {name: shape for name, shape in config.scratch_shapes().items() if shape is not None}
    lane_inv_freq = None if b_k is None else jnp.broadcast_to(rope_inv_freq[:, None], (config.H // 2, LANES))
    inputs = {
        "q": q,
        "base": (kept_in_hbm(base), in_hbm),
        "v": (low_rank.v if low_rank.v is None else kept_in_hbm(low_rank.v), in_hbm),
        "k": (low_rank.k if low_rank.k is None else kept_in_hbm(low_rank.k), in_hbm),
        "b_k": (b_k, in_hbm),
        "inv_freq": (lane_inv_freq, pl.BlockSpec((config.H // 2, LANES), lambda *_: (0, 0))),
    }
    inputs = {name: pair for name, pair in inputs.items() if pair[0] is not None} | {
        f"extra_{i}": pair for i, pair in enumerate(extra)
    }
    scalars = [*items, *(table.reshape(-1) for table in tables if table is not None)]

    def kernel(*refs):
        refs = list(refs)

        def take(number):
            taken, refs[:number] = refs[:number], []
            return taken

        its_items = Items(*take(len(Items._fields)))
        its_tables = (take(1)[0], take(1)[0] if tables[1] is not None else None)
        ins = dict(zip(inputs, take(len(inputs)), strict=True))
        outs = take(len(outputs))
        buffers = dict.fromkeys(config.scratch_shapes()) | dict(zip(scratch, refs, strict=True))
        index = pl.program_id(0)
        if len(grid) > 1:
            index = index * grid[1] + pl.program_id(1)
        pools = (ins["base"], ins.get("v"), ins.get("k"))
        item = Item(config, index, its_items, its_tables, ins["q"], ins.get("inv_freq"), pools, buffers)

        def run():
            if config.r_k:
                item.read_b_k(ins["b_k"])
            item.attend()

        pl.when(item.end > item.first)(run)
        finish(item, *(ref for name, ref in ins.items() if name.startswith("extra")), *outs)

    return pl.pallas_call(
        kernel,
        out_shape=[shape for shape, _ in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=[spec for _, spec in outputs],
            scratch_shapes=list(scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_LIMIT),
        interpret=pltpu.InterpretParams(detect_races=True) if interpret else False,
        name=name,
        cost_estimate=cost(config, grid, q[0], base, low_rank, tables[0]),
    )(*scalars, *(array for array, _ in inputs.values()))


def cost(config: Config, grid, q, base, low_rank: LowRank, table) -> pl.CostEstimate:
    """The most that the call can cost: every column of every row's table is read."""
    keys = table.shape[-1] * config.p
    num_items = math.prod(grid)
    pairs = num_items * config.units * config.rows * keys
    page_bytes = math.prod(base.shape[1:]) * base.dtype.itemsize
    page_bytes += sum(math.prod(pool.shape[1:]) * pool.dtype.itemsize for pool in low_rank if pool is not None)
    return pl.CostEstimate(
        flops=2 * pairs * (2 * config.width + config.r_v),
        bytes_accessed=num_items * table.shape[-1] * page_bytes + 2 * math.prod(q.shape) * q.dtype.itemsize,
        transcendentals=pairs,
    )
