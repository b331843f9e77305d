"""New slots into pages of a pool in a TPU's HBM, in place.

XLA, given a scatter, brings any pool that fits into VMEM there whole and back, in every layer of every step. This reads
the pages that are written to, and writes them.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from lragent_jax.kernels.interpret import is_interpreted

MAX_BUFFER_BYTES = 8 * 2**20


def takes(pool: Array) -> bool:
    """Whether pages of such a pool can be read and written: they are whole tiles of 8 x 128."""
    return is_interpreted() or (pool.shape[1] % 8 == 0 and pool.shape[2] % 128 == 0)


def kept_in_hbm(pool: Array) -> Array:
    """`pool`, which XLA may not bring into VMEM for the kernel that takes it."""
    return pool if is_interpreted() else pltpu.with_memory_space_constraint(pool, pltpu.HBM)


def update_pages(
    pool: Float[Array, "P r p"],
    pages: Int32[Array, " n"],
    first: Int32[Array, " n"],
    end: Int32[Array, " n"],
    contents: Float[Array, "n r p"],
) -> Float[Array, "P r p"]:
    """Slots [first[i], end[i]) of page pages[i] become those of contents[i]; a page without any is left alone.

    No page may be given slots twice: both would write all of it. Without any it may be named as often as you like.
    """
    n, *page_shape = contents.shape
    chunk = max(1, min(n, MAX_BUFFER_BYTES // (math.prod(page_shape) * pool.dtype.itemsize)))
    pad = -n % chunk
    pages, first, end = (jnp.pad(x, (0, pad)) for x in (pages, first, end))
    contents = jnp.pad(contents, ((0, pad), (0, 0), (0, 0)))
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)

    def kernel(pages, first, end, contents_ref, _, pool_ref, buffer, semaphore):
        start = pl.program_id(0) * chunk

        def copies(i, run):
            page, own = pool_ref.at[pages[start + i]], buffer.at[i]

            def all_of_them():
                run(page, own)

            pl.when(end[start + i] > first[start + i])(all_of_them)
            return 0

        def each(run):
            lax.fori_loop(0, chunk, lambda i, _: copies(i, run), 0)

        each(lambda page, own: pltpu.make_async_copy(page, own, semaphore).start())
        each(lambda page, own: pltpu.make_async_copy(page, own, semaphore).wait())

        def merge(i, _):
            slot = lax.broadcasted_iota(jnp.int32, tuple(page_shape), len(page_shape) - 1)
            new = (slot >= first[start + i]) & (slot < end[start + i])
            buffer[i] = jnp.where(new, contents_ref[i], buffer[i])
            return 0

        lax.fori_loop(0, chunk, merge, 0)
        each(lambda page, own: pltpu.make_async_copy(own, page, semaphore).start())
        each(lambda page, own: pltpu.make_async_copy(own, page, semaphore).wait())

    return pl.pallas_call(
        kernel,
        out_shape=pltpu.HBM(pool.shape, pool.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=((n + pad) // chunk,),
            in_specs=[pl.BlockSpec((chunk, *page_shape), lambda i, *_: (i, 0, 0)), in_hbm],
            out_specs=in_hbm,
            scratch_shapes=[pltpu.VMEM((chunk, *page_shape), pool.dtype), pltpu.SemaphoreType.DMA],
        ),
        input_output_aliases={4: 0},
        compiler_params=pltpu.CompilerParams(),
        interpret=pltpu.InterpretParams(detect_races=True) if is_interpreted() else False,
        name=f"update_pages_{chunk}",
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=3 * math.prod(contents.shape) * pool.dtype.itemsize
        ),
    )(pages, first, end, contents, kept_in_hbm(pool))
