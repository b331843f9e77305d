"""Gate and up of many rows, and SwiGLU, for NVIDIA Hopper: neither product is ever written to memory.

A tile is 128 rows of the result by 128 columns. Two compute warpgroups take 64 of its rows each, and keep those of
both products in registers; one memory warpgroup brings parts of x and of the two weights by TMA, as many stages ahead
as shared memory holds. A program stays on its processor and makes tile after tile, so that the next tile's first stages
are on their way while a tile is gated and written. Tiles that follow each other read the same columns of the weights:
what comes from device memory is each weight once, and x as often as the second-level cache drops it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from lragent_jax.kernels.hopper import interpreter, refuse_all_but_hopper, tiled
from lragent_jax.kernels.interpret import is_interpreted
from lragent_jax.kernels.rms_norm import rms_norm
from lragent_jax.kernels.row_matmul.arguments import Described, Norm, Shrink

ROWS, COLUMNS = 128, 128  # of a tile
BLOCK_K = 64  # of the contraction, in a stage
STAGES = 4
COMPUTE = 2  # warpgroups; the one behind them brings what they multiply
OWN_ROWS = ROWS // COMPUTE
MAX_PROGRAMS = 132  # one on every processor of an H100
# Of a thread: two products of 64 x 128 take 128 of the compute warpgroups' registers.
MEMORY_REGISTERS, COMPUTE_REGISTERS = 40, 232


class Shapes(NamedTuple):
    """What the kernel is compiled for."""

    rows: int
    width: int  # of x
    out: int  # columns of each weight
    programs: int
    interpret: bool

    @property
    def turns(self) -> int:
        """Stages of a tile."""
        return self.width // BLOCK_K

    @property
    def tiles_down(self) -> int:
        return pl.cdiv(self.rows, ROWS)

    @property
    def tiles(self) -> int:
        return self.tiles_down * (self.out // COLUMNS)


class Refs(NamedTuple):
    """The kernel's arguments, its result, and its buffers and barriers in shared memory."""

    x: jax.Array
    gate: jax.Array
    up: jax.Array
    out: jax.Array
    x_smem: jax.Array  # [stages, 128, block_k]
    weights_smem: jax.Array  # [stages, 2, block_k, 128]
    out_smem: jax.Array  # [2, 64, 128]
    ready: jax.Array  # a stage's three parts have arrived
    read: jax.Array  # both compute warpgroups are done with a stage


def place_of(tile, s: Shapes):
    """First row and first column. The last tile down may end behind the last row: TMA leaves out what is not there."""
    return lax.rem(tile, jnp.int32(s.tiles_down)) * ROWS, lax.div(tile, jnp.int32(s.tiles_down)) * COLUMNS


def bring(refs: Refs, program, num_tiles, s: Shapes) -> None:
    """The memory warpgroup: the stages of all of a program's tiles, one behind the other."""
    num_turns = num_tiles * s.turns

    def step(turn, _):
        row, column = place_of(program + lax.div(turn, jnp.int32(s.turns)) * s.programs, s)
        stage, part = lax.rem(turn, jnp.int32(STAGES)), pl.ds(lax.rem(turn, jnp.int32(s.turns)) * BLOCK_K, BLOCK_K)
        pl.when(turn >= STAGES)(lambda: plgpu.barrier_wait(refs.read.at[stage]))
        ready = refs.ready.at[stage]
        plgpu.copy_gmem_to_smem(refs.x.at[pl.ds(row, ROWS), part], refs.x_smem.at[stage], ready)
        for i, weight in enumerate((refs.gate, refs.up)):
            plgpu.copy_gmem_to_smem(weight.at[part, pl.ds(column, COLUMNS)], refs.weights_smem.at[stage, i], ready)

    def wait(turn, _):
        plgpu.barrier_wait(refs.read.at[lax.rem(turn, jnp.int32(STAGES))])

    lax.fori_loop(0, num_turns, step, None)
    lax.fori_loop(jnp.maximum(num_turns - STAGES, 0), num_turns, wait, None)  # every arrival is waited for


def multiply(refs: Refs, tile_number, own_rows, s: Shapes, *products) -> list[jax.Array]:
    """A compute warpgroup's rows of x times the tile's columns of both weights, f32.

    A stage is given back as soon as it has been multiplied: what the matrix unit misses at the end of one it makes up
    with the other warpgroup's, and the next stages are on their way sooner.
    """

    def step(k, _):
        stage = lax.rem(tile_number * s.turns + k, jnp.int32(STAGES))
        plgpu.barrier_wait(refs.ready.at[stage])
        for i, product in enumerate(products):
            plgpu.wgmma(product, refs.x_smem.at[stage, own_rows], refs.weights_smem.at[stage, i])
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(refs.read.at[stage])

    lax.fori_loop(0, s.turns, step, None)
    return [product[...] for product in products]


def compute(refs: Refs, program, warpgroup, num_tiles, s: Shapes) -> None:
    """A compute warpgroup: half of the rows of every tile of the program."""
    dtype, own_rows, staged = refs.out.dtype, pl.ds(warpgroup * OWN_ROWS, OWN_ROWS), refs.out_smem.at[warpgroup]
    accumulator = plgpu.ACC((OWN_ROWS, COLUMNS), jnp.float32)

    def make(tile_number, _):
        products = pl.run_scoped(functools.partial(multiply, refs, tile_number, own_rows, s), accumulator, accumulator)
        gate, up = (product.astype(dtype).astype(jnp.float32) for product in products)
        row, column = place_of(program + tile_number * s.programs, s)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left shared memory
        staged[...] = (gate / (1.0 + jnp.exp(-gate)) * up).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            staged, refs.out.at[pl.ds(row + warpgroup * OWN_ROWS, OWN_ROWS), pl.ds(column, COLUMNS)]
        )

    lax.fori_loop(0, num_tiles, make, None)
    plgpu.wait_smem_to_gmem(0)


def call(
    x: Float[Array, "rows D"], gate: Float[Array, "D out"], up: Float[Array, "D out"], *, s: Shapes
) -> Float[Array, "rows out"]:
    def body(*args):
        refs = Refs(*args)
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
        num_tiles = lax.div(s.tiles - program + s.programs - 1, jnp.int32(s.programs))

        @pl.when(warpgroup == COMPUTE)
        def _():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
            bring(refs, program, num_tiles, s)

        @pl.when(warpgroup < COMPUTE)
        def _():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            compute(refs, program, warpgroup, num_tiles, s)

    body.__name__ = "row_matmul_gated_many"
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((s.rows, s.out), x.dtype),
        scratch_types=[
            tiled(STAGES, ROWS, BLOCK_K, dtype=x.dtype),
            tiled(STAGES, 2, BLOCK_K, COLUMNS, dtype=x.dtype),
            tiled(COMPUTE, OWN_ROWS, COLUMNS, dtype=x.dtype),
            plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=STAGES),
        ],
        grid=(s.programs,),
        grid_names=("program",),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        **interpreter(s.interpret),
    )
    return kernel(x, gate, up)


call_once = jax.jit(call, static_argnames="s")  # traced and lowered once for all layers of a model


def refuse(
    x: Array, weights: tuple[Described, ...], norm: Norm | None, shrinks: tuple[Shrink, ...], gated: bool
) -> None:
    """Raises NotImplementedError for what the kernel was not written for."""
    (rows, width), out = x.shape, weights[0].shape[1]
    if not gated:
        raise NotImplementedError(f"{rows} rows: products of more than few rows are written only where they are gated")
    if rows < ROWS:
        raise NotImplementedError(f"{rows} rows: gated products are written for few, or {ROWS} and more")
    if x.dtype not in ("bfloat16", "float16"):
        raise NotImplementedError(f"dtype {x.dtype}: the matrix unit takes bfloat16 and float16")
    if shrinks:
        raise NotImplementedError(f"{rows} rows: A of adapters is multiplied by few rows only")
    if width % BLOCK_K or out % COLUMNS:
        raise NotImplementedError(f"weights [{width}, {out}]: multiples of [{BLOCK_K}, {COLUMNS}] fill its tiles")
    refuse_all_but_hopper()


def row_matmul(
    x: Float[Array, "rows D"],
    weights: tuple[Array, ...],
    *,
    norm: Norm | None,
    keep_normed: bool,
    gated: bool,
    residual: Float[Array, "rows out"] | None,
    shrinks: tuple[Shrink, ...] = (),
) -> tuple[Array, ...]:
    """See `api.row_matmul`. The norm in front and the residual behind are XLA's: beside the products they are small."""
    refuse(x, weights, norm, shrinks, gated)
    if norm is not None:
        x = rms_norm(x, norm.scale, norm.eps)
    (rows, width), out = x.shape, weights[0].shape[1]
    s = Shapes(rows, width, out, programs=0, interpret=is_interpreted())
    y = call_once(x, *weights, s=s._replace(programs=min(s.tiles, MAX_PROGRAMS)))
    return (y if residual is None else residual + y, *[x] * keep_normed)
