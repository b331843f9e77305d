"""Values in a warpgroup's registers: loading, filling, broadcasting, multiplying."""

import inspect

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.stream_shapes import BLOCK_Q

WGMMA, PER_ROW = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
# JAX 0.10 asks for an index beside the reference, 0.12 takes none.
_idx = inspect.signature(plgpu.load).parameters.get("idx")
INDEX = ((),) if _idx is not None and _idx.default is inspect.Parameter.empty else ()


def load(ref, layout, *, optimized: bool = True) -> jax.Array:
    """`ref` in registers, in that layout. `optimized=False` allows patterns that the hardware has no fast way for."""
    return plgpu.load(ref, *INDEX, layout=layout, optimized=optimized)


def pin(barrier) -> None:
    """Keeps loads in front of it: the compiler moves them to where their values are used, but not past a barrier."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def product(a, b, acc=None, *, interpret: bool):
    """acc + a b on the matrix unit, in f32; b, and a if it is no array, in shared memory."""
    if interpret:  # wgmma on values in registers is not interpreted
        total = jnp.dot(a if isinstance(a, jax.Array) else a[...], b[...], preferred_element_type=jnp.float32)
        return total if acc is None else acc + total
    if acc is None:
        shape = (a.shape[0], b.shape[1])

        def compute(acc_ref):
            plgpu.wgmma(acc_ref, a, b)
            return acc_ref[...]

        return pl.run_scoped(compute, plgpu.ACC(shape, jnp.float32))
    return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, a, b))(plgpu.ACC.init(acc))


def multiply_add(terms, *, interpret: bool) -> tuple:
    """acc + a1 b1 + a2 b2 .. for every (acc, ((a1, b1), (a2, b2) ..)), all under way at once.

    A product's a is an array, or a function that makes it while the ones before are under way; b is in shared memory.
    """

    def left(a):
        return a() if callable(a) else a

    if interpret:  # wgmma on values in registers is not interpreted
        sums = tuple(acc + sum(product(left(a), b, interpret=True) for a, b in products) for acc, products in terms)
        plgpu.commit_smem()  # as a wgmma's, these reads are over before the next copy
        return sums

    def issue(accumulators):
        for acc, (_, products) in zip(accumulators, terms, strict=True):
            for a, b in products:
                plgpu.wgmma(acc, left(a), b)

    return pl.run_state(issue)(tuple(plgpu.ACC.init(acc) for acc, _ in terms))


def full(shape, value, layout, dtype=jnp.float32):
    return plgpu.layout_cast(jnp.full(shape, value, dtype), layout)


def over_lanes(per_row, width: int):
    return lax.broadcast_in_dim(per_row, (BLOCK_Q, width), (0,))
