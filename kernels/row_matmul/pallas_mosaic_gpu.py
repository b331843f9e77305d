"""Few rows times weights for NVIDIA Hopper: the weights' bytes are all that counts, so they never wait for the rows.

A block makes tiles of 64 columns of the result. Its memory warpgroup brings the columns' weights in by TMA, some rows
of them at a time and as many stages ahead as shared memory holds, beside the same part of x; its compute warpgroup
normalises that part where asked to and multiplies, the weights' transpose as the matrix unit's 64 rows, the rows of x
as its 8 or 16 columns. So the first stages are under way before the statistics of the norm are known.

A row's X A is a block of its own, on a processor that has no tile: one warpgroup, nothing but loads and additions.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from lragent_jax.kernels.hopper import interpreter, tiled
from lragent_jax.kernels.interpret import is_interpreted
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.registers import load
from lragent_jax.kernels.row_matmul.arguments import Described, Norm, Shrink
from lragent_jax.kernels.row_matmul.gpu_shapes import LANES, TILE, BlockSizes, Shapes, heuristic

MAX_ROWS = 16
RANKS = (8, 16, 32, 64)  # of A that its own blocks multiply by
PARTS = 8  # of a row, whose sums are added in the end
SHRINK_LOADS = 16  # of A that a thread has under way, 16 bytes each

WGMMA, PER_COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED  # in which columns that lie side by side are in one register


def row_layout():
    """Parts of x, [8 n, 128], as they are normalised: 16 bytes a thread."""
    return plgpu.Layout.TILED(
        plgpu.Tiling(((8, LANES), (4, 64), (8,))), warp_dims=(-5, -4), lane_dims=(-3, -2), vector_dim=-1
    )


def statistics_layout():
    """A whole row of x as [8, D / 8]."""
    return plgpu.Layout.TILED(
        plgpu.Tiling(((8, 64), (2, 64), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
    )


def shrink_layout(rank: int):
    """Rows of A, [4, 256 / rank, rank]: 16 bytes a thread, a quarter a warp, over which nothing has to be summed."""
    tile, vector = (4, 256 // rank, rank), (8,)
    if rank == 8:
        return plgpu.Layout.TILED(plgpu.Tiling((tile,)), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    return plgpu.Layout.TILED(plgpu.Tiling((tile, vector)), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)


def columns_of(block, tile, s: Shapes):
    """Those of a tile of a weight's block."""
    return pl.ds((block * s.tiles + tile) * TILE, TILE)


def bring(refs, block, s: Shapes) -> None:
    """The memory warpgroup: stage after stage, into where it was read longest ago."""

    def weight_tiles():
        """(from which block on, up to which, the weights whose columns those blocks make)"""
        start = 0
        for i, count in enumerate(s.blocks):
            yield start, start + count, refs.weights if s.gated else refs.weights[i : i + 1]
            start += count

    def place(turn):
        stage = lax.rem(turn, jnp.int32(s.stages))
        return stage, pl.ds(turn * s.block_k, s.block_k), refs.ready.at[stage]

    def bring_rows(turn):
        stage, rows, ready = place(turn)
        plgpu.copy_gmem_to_smem(refs.x.at[:, rows], refs.x_smem.at[stage, pl.ds(0, s.rows)], ready)
        if s.eps is not None:
            plgpu.copy_gmem_to_smem(refs.scale.at[rows], refs.scale_smem.at[stage], ready)

    def bring_weights(turn):
        stage, rows, ready = place(turn)
        for start, end, weights in weight_tiles():

            @pl.when((block >= start) & (block < end))
            def _(start=start, weights=weights):
                for i, weight in enumerate(weights):
                    for tile in range(s.tiles):
                        into = refs.w_smem.at[stage, i * s.tiles + tile]
                        plgpu.copy_gmem_to_smem(weight.at[rows, columns_of(block - start, tile, s)], into, ready)

    def step(turn, _):
        plgpu.barrier_wait(refs.read.at[lax.rem(turn, jnp.int32(s.stages))])
        bring_rows(turn)
        bring_weights(turn)

    ahead = min(s.stages, s.turns)
    lax.fori_loop(0, ahead, lambda turn, _: bring_weights(turn), None)
    lax.fori_loop(0, ahead, lambda turn, _: bring_rows(turn), None)
    if s.residual:  # long before it is added
        for tile in range(s.tiles):
            from_gmem = refs.residual.at[:, columns_of(block, tile, s)]
            plgpu.copy_gmem_to_smem(from_gmem, refs.residual_smem.at[tile, pl.ds(0, s.rows)], refs.residual_ready)
    lax.fori_loop(ahead, s.turns, step, None)


def over_rows(per_lane, s: Shapes):
    return plgpu.layout_cast(lax.broadcast_in_dim(per_lane, (s.padded, s.block_k), (1,)), row_layout())


def sum_squares(refs, first, count: int = 1) -> None:
    """Of so many rows: all of them are asked for before one is waited for."""
    rows = [load(refs.folded.at[first + i], statistics_layout(), optimized=False) for i in range(count)]
    for i, row in enumerate(rows):
        wide = row.astype(jnp.float32)
        refs.sums[first + i, ...] = (wide * wide).sum(axis=1)


def rms_of_row(refs, row, s: Shapes):
    """1 / rms of a row whose squares were summed."""
    total = functools.reduce(jnp.add, [refs.sums[row, i] for i in range(PARTS)])
    return lax.rsqrt(total * (1 / s.width) + s.eps)


def reciprocal_rms(refs, s: Shapes):
    """1 / rms(x), f32: a number, or of several rows [padded, s.block_k] with a row's in all its lanes."""
    count = s.squared_at_once
    lax.fori_loop(0, s.rows // count, lambda turn, _: sum_squares(refs, turn * count, count), None)
    if s.rows == 1:
        return rms_of_row(refs, 0, s)
    number = plgpu.broadcasted_iota(jnp.int32, (s.padded, s.block_k), 0, layout=row_layout())
    ones = plgpu.layout_cast(jnp.full((s.padded, s.block_k), 1.0, jnp.float32), row_layout())
    return lax.fori_loop(
        0, s.rows, lambda row, chosen: jnp.where(number == row, rms_of_row(refs, row, s), chosen), ones
    )


def write_normed(refs, turn, x, s: Shapes) -> None:
    """This turn's part of the normalised rows: one block's task, another turn's another's."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    refs.normed_smem[...] = x
    plgpu.commit_smem()
    part = refs.outs[-1].at[:, pl.ds(turn * s.block_k, s.block_k)]
    plgpu.copy_smem_to_gmem(refs.normed_smem.at[pl.ds(0, s.rows)], part)


def compute(refs, block, s: Shapes, *accumulators) -> None:
    """The compute warpgroup: all of the contraction, for the block's columns."""
    factor = None if s.eps is None else reciprocal_rms(refs, s)
    dtype, layout = refs.x.dtype, row_layout()

    def step(turn, _):
        stage, own = lax.rem(turn, jnp.int32(s.stages)), lax.rem(turn, jnp.int32(2))
        plgpu.barrier_wait(refs.ready.at[stage])
        x = load(refs.x_smem.at[stage], layout=layout, optimized=False)
        if factor is not None:
            scale = load(refs.scale_smem.at[stage], layout=layout.reduce(0), optimized=False)
            x = (x.astype(jnp.float32) * factor).astype(dtype).astype(jnp.float32)
            x = (x * over_rows(scale.astype(jnp.float32), s)).astype(dtype)
        refs.rows_smem[own, ...] = x
        plgpu.commit_smem()
        if s.keep_normed:
            pl.when(lax.rem(turn, jnp.int32(s.num_blocks)) == block)(functools.partial(write_normed, refs, turn, x, s))
        for tile, accumulator in enumerate(accumulators):
            weight = refs.w_smem.at[stage, tile].transpose((1, 0))
            plgpu.wgmma(accumulator, weight, refs.rows_smem.at[own].transpose((1, 0)))
        plgpu.wgmma_wait(len(accumulators))
        before = turn - 1  # which is done with; another turn may wait for its stage
        awaited = (before >= 0) & (before + s.stages < s.turns)
        pl.when(awaited)(lambda: plgpu.barrier_arrive(refs.read.at[lax.rem(before, jnp.int32(s.stages))]))
        return

    lax.fori_loop(0, s.turns, step, None)
    plgpu.wgmma_wait(0)
    if s.keep_normed:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def column(values, row, s: Shapes):
    """One row of the result, of a tile's 64 columns."""
    number = plgpu.broadcasted_iota(jnp.int32, (TILE, s.padded), 1, layout=WGMMA)
    return jnp.where(number == row, values, 0.0).sum(axis=1)


def finish(refs, block, tiles, s: Shapes) -> None:
    """Writes the block's columns of every row."""
    dtype, start = refs.x.dtype, 0

    def write(out, tile, numbers, residual, layout):
        """`numbers` takes of a tile's sums what is written, `residual` and `out` are the same of the memory."""
        y = numbers(tiles[tile]).astype(dtype)
        if s.gated:
            gate, up = y.astype(jnp.float32), numbers(tiles[s.tiles + tile]).astype(dtype).astype(jnp.float32)
            y = (gate / (1.0 + jnp.exp(-gate)) * up).astype(dtype)
        y = plgpu.layout_cast(y, layout)
        if residual is not None:
            there = load(residual, layout, optimized=False).astype(jnp.float32)
            y = (y.astype(jnp.float32) + there).astype(dtype)
        out[...] = y

    def write_tile(out, columns, tile):
        residual = refs.residual_smem.at[tile] if s.residual else None
        if s.rows == s.padded:
            by_column = None if residual is None else residual.transpose((1, 0))
            write(out.at[:, columns].transpose((1, 0)), tile, lambda sums: sums, by_column, TRANSPOSED)
            return

        def write_row(row, _):
            of_row = None if residual is None else residual.at[row]
            write(out.at[row, columns], tile, lambda sums: column(sums, row, s), of_row, PER_COLUMN)

        lax.fori_loop(0, s.rows, write_row, None)

    if s.residual:
        plgpu.barrier_wait(refs.residual_ready)
    for i, count in enumerate(s.blocks):

        @pl.when((block >= start) & (block < start + count))
        def _(start=start, out=refs.outs[i]):
            for tile in range(s.tiles):
                write_tile(out, columns_of(block - start, tile, s), tile)

        start += count


def shrink(refs, lora_a, out, group, row, s: Shapes) -> None:
    """f(x) A of one row, [rank]: what the other blocks normalise, times A where it lies, summed in f32."""
    dtype, rank = refs.x.dtype, lora_a.shape[3]
    layout = shrink_layout(rank)
    take = 256 // rank  # rows of A in a load of a quarter of the parts
    loads = s.width // PARTS // take
    at_once = math.gcd(loads, SHRINK_LOADS // 2)
    if s.eps is not None:
        sum_squares(refs, row)
        factor = rms_of_row(refs, row, s)

    def over_rank(numbers):
        return plgpu.layout_cast(lax.broadcast_in_dim(numbers, (4, take, rank), (0, 1)), layout)

    def step(turn, total):
        places = [
            (pl.ds(first, 4), pl.ds((turn * at_once + i) * take, take)) for i in range(at_once) for first in (0, 4)
        ]
        matrices = [load(lora_a.at[group, *place], layout, optimized=False) for place in places]
        vectors = [
            [
                load(ref.at[place], layout.reduce(2), optimized=False)
                for ref in (refs.folded.at[row], *refs.folded_scale)
            ]
            for place in places
        ]
        for matrix, (x, *scale) in zip(matrices, vectors, strict=True):
            x = x.astype(jnp.float32)
            if scale:
                x = (x * factor).astype(dtype).astype(jnp.float32)
                x = (x * scale[0].astype(jnp.float32)).astype(dtype).astype(jnp.float32)
            total += over_rank(x) * matrix.astype(jnp.float32)
        return total

    zeros = plgpu.layout_cast(jnp.zeros((4, take, rank), jnp.float32), layout)
    refs.shrink_sums[:, pl.ds(0, rank)] = lax.fori_loop(0, loads // at_once, step, zeros).sum(axis=1)

    def write(i, _):
        out[row, i] = functools.reduce(jnp.add, [refs.shrink_sums[part, i] for part in range(4)]).astype(dtype)

    lax.fori_loop(0, rank, write, None)


def shrink_rows(refs, block, s: Shapes) -> None:
    """The blocks behind those of the tiles: one for every row of every table."""
    start = s.num_blocks
    for (tables, _), lora_a, groups, out in zip(s.shrinks, refs.lora_a, refs.groups, refs.shrunk, strict=True):

        @pl.when((block >= start) & (block < start + tables * s.rows))
        def _(start=start, lora_a=lora_a, groups=groups, out=out):
            table, row = lax.div(block - start, jnp.int32(s.rows)), lax.rem(block - start, jnp.int32(s.rows))
            group = jnp.clip(groups[table, row], 0, lora_a.shape[0] - 1)  # nothing is read that is not there
            shrink(refs, lora_a, out.at[table], group, row, s)

        start += tables * s.rows


class Refs:
    """The kernel's refs by name."""

    def __init__(self, **refs):
        self.__dict__.update(refs)


def scratch(s: Shapes, dtype) -> dict:
    buffers = {
        "w_smem": tiled(s.stages, s.per_stage, s.block_k, TILE, dtype=dtype),
        "rows_smem": tiled(2, s.padded, s.block_k, dtype=dtype),
        "x_smem": plgpu.SMEM((s.stages, s.padded, s.block_k), dtype),
        "ready": plgpu.Barrier(num_arrivals=s.per_stage + 1 + (s.eps is not None), num_barriers=s.stages),
        "read": plgpu.Barrier(num_barriers=s.stages),
    }
    if s.eps is not None:
        buffers |= {
            "scale_smem": plgpu.SMEM((s.stages, s.block_k), dtype),
            "sums": plgpu.SMEM((s.rows, PARTS), jnp.float32),
        }
    if s.residual:
        buffers |= {
            "residual_smem": plgpu.SMEM((s.tiles, s.padded, TILE), dtype),
            "residual_ready": plgpu.Barrier(num_arrivals=s.tiles),
        }
    if s.shrinks:
        buffers["shrink_sums"] = plgpu.SMEM((4, max(rank for _, rank in s.shrinks)), jnp.float32)
    if s.keep_normed:
        buffers["normed_smem"] = plgpu.SMEM((s.padded, s.block_k), dtype)
    return buffers


def call(x, weights, scale, residual, shrinks, *, s: Shapes):
    parts = (PARTS, s.width // PARTS)
    inputs: dict = {"x": x, "weights": weights}
    if s.eps is not None or s.shrinks:
        inputs["folded"] = x.reshape(s.rows, *parts)
    if s.eps is not None:
        inputs["scale"] = scale
    if s.residual:
        inputs["residual"] = residual
    if s.shrinks:
        inputs |= {
            "folded_scale": [scale.reshape(parts)] if s.eps is not None else [],
            "lora_a": [
                each.lora_a.reshape(-1, *parts, rank) for each, (_, rank) in zip(shrinks, s.shrinks, strict=True)
            ],
            "groups": [each.groups for each in shrinks],
        }
    outs = (s.outs[:1] if s.gated else s.outs) + (s.width,) * s.keep_normed
    shapes = [(s.rows, out) for out in outs] + [(tables, s.rows, rank) for tables, rank in s.shrinks]
    arrays, as_inputs = jax.tree.flatten(inputs)

    def body(*args, **buffers):
        named = jax.tree.unflatten(as_inputs, args[: len(arrays)])
        results = args[len(arrays) :]
        refs = Refs(**named, **buffers, outs=results[: len(outs)], shrunk=results[len(outs) :])
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        makes_tiles = block < s.num_blocks
        pl.when((warpgroup == 1) & makes_tiles)(lambda: bring(refs, block, s))
        if s.shrinks:
            pl.when((warpgroup == 0) & ~makes_tiles)(lambda: shrink_rows(refs, block, s))

        @pl.when((warpgroup == 0) & makes_tiles)
        def _():
            def accumulate(*accumulators):
                compute(refs, block, s, *accumulators)
                return [accumulator[...] for accumulator in accumulators]

            accumulator = plgpu.ACC((TILE, s.padded), jnp.float32)
            finish(refs, block, pl.run_scoped(accumulate, *[accumulator] * s.per_stage), s)

    body.__name__ = f"row_matmul_{'gated' if s.gated else len(s.outs)}_tiles{s.tiles}_k{s.block_k}_stages{s.stages}"
    kernel = plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(shape, x.dtype) for shape in shapes),
        scratch_types=scratch(s, x.dtype),
        grid=(s.grid,),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        **interpreter(s.interpret),
    )
    return kernel(*arrays)


call_once = jax.jit(call, static_argnames="s")  # traced and lowered once for all layers of a model


def refuse(x: Array, weights: tuple[Described, ...], norm: Norm | None, shrinks: tuple[Shrink, ...] = ()) -> None:
    """Raises NotImplementedError for what the kernel was not written for."""
    if x.dtype not in ("bfloat16", "float16"):
        raise NotImplementedError(f"dtype {x.dtype}: the matrix unit takes bfloat16 and float16")
    if x.shape[0] > MAX_ROWS:
        raise NotImplementedError(f"{x.shape[0]} rows: it is written for up to {MAX_ROWS}")
    if x.shape[1] % LANES:
        raise NotImplementedError(f"{x.shape[1]} numbers per row: multiples of {LANES} fill its stages")
    if norm is not None and x.shape[1] % 512:
        raise NotImplementedError(f"a norm over {x.shape[1]} numbers: multiples of 512 fill its registers")
    if wrong := [weight.shape[1] for weight in weights if weight.shape[1] % TILE]:
        raise NotImplementedError(f"weights of {wrong} columns: multiples of {TILE} fill its tiles")
    if wrong := [each.lora_a.shape[2] for each in shrinks if each.lora_a.shape[2] not in RANKS]:
        raise NotImplementedError(f"ranks {wrong}: it is written for {RANKS}")
    if shrinks and x.shape[1] % 256:
        raise NotImplementedError(f"A of {x.shape[1]} rows: multiples of 256 fill its registers")
    if jax.default_backend() == "gpu":
        capability = jax.devices("gpu")[0].compute_capability  # AMD's are names: gfx942
        if not capability[0].isdigit() or float(capability) != 9.0:
            raise NotImplementedError(f"compute capability {capability}: it is written for NVIDIA Hopper")


def row_matmul(
    x: Float[Array, "rows D"],
    weights: tuple[Array, ...],
    *,
    norm: Norm | None,
    keep_normed: bool,
    gated: bool,
    residual: Float[Array, "rows out"] | None,
    shrinks: tuple[Shrink, ...] = (),
    block_sizes: BlockSizes | None = None,
) -> tuple[Array, ...]:
    """See `api.row_matmul`."""
    refuse(x, weights, norm, shrinks)
    shapes = Shapes(
        rows=x.shape[0],
        width=x.shape[1],
        outs=tuple(weight.shape[1] for weight in weights),
        gated=gated,
        residual=residual is not None,
        eps=None if norm is None else norm.eps,
        keep_normed=keep_normed,
        tiles=1,
        block_k=LANES,
        stages=2,
        interpret=is_interpreted(),
        shrinks=tuple((each.groups.shape[0], each.lora_a.shape[2]) for each in shrinks),
    )
    sizes = block_sizes or heuristic(shapes)
    if shapes.width % sizes.block_k or any(out % (TILE * sizes.tiles) for out in shapes.outs):
        raise NotImplementedError(f"{sizes} do not divide weights of {shapes.width} rows and {shapes.outs} columns")
    shapes = dataclasses.replace(shapes, tiles=sizes.tiles, block_k=sizes.block_k, stages=sizes.stages)
    return call_once(x, weights, None if norm is None else norm.scale, residual, shrinks, s=shapes)
