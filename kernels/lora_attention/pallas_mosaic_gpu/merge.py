"""The second half of decode on Hopper: a row's partial results become its output, B applied once."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from lragent_jax.kernels.hopper import interpreter
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.registers import load, pin
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.stream_compute import LEAST
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.stream_shapes import LANES

BATCH = 16  # records under way at a time
FEW = 4  # the same where there are more programs than run at once
ONE_WAVE = 512  # programs
LN_2 = 0.6931471805599453


def strided(width: int):
    """A vector over the warpgroup's threads, width / 128 neighbours each."""
    return plgpu.Layout.WG_STRIDED((width,), vec_size=width // LANES)


def zeros(width: int):
    return plgpu.layout_cast(jnp.zeros((width,), jnp.float32), strided(width))


class Records(NamedTuple):
    """Some partial results as they are read: o [width] and low-rank lanes [128], not normalised, and numbers m, l."""

    o: list
    aux: list
    m: list
    l: list  # noqa: E741 (the name that the flash attention papers give it)


def fetch(partial, first, num_records: int, r: int, aux_lane: int) -> Records:
    """`partial[first]` and the next ones; the last one again where there are no more."""
    capacity = partial.shape[0]
    indices = [jnp.minimum(first + i, capacity - 1) for i in range(num_records)]
    return Records(
        [load(partial.at[j, pl.ds(0, aux_lane)], strided(aux_lane)) for j in indices],
        [load(partial.at[j, pl.ds(aux_lane, LANES)], strided(LANES)) for j in indices] if r else [],
        [partial[j, aux_lane + r] for j in indices],
        [partial[j, aux_lane + r + 1] for j in indices],
    )


def add(state, records: Records, num_parts, first):
    """The state (o, aux, m, l) with those of the records that were written: the rest may be anything."""
    o, aux, m, sums = state
    written = [first + i < num_parts for i in range(len(records.m))]
    m_new = functools.reduce(
        jnp.maximum, [jnp.where(is_there, m_i, LEAST) for is_there, m_i in zip(written, records.m, strict=True)], m
    )
    rescale = jnp.exp2(m - m_new)
    weights = [
        jnp.where(is_there, jnp.exp2(m_i - m_new), 0.0) for is_there, m_i in zip(written, records.m, strict=True)
    ]

    def total(values, before):
        terms = [jnp.where(is_there, x, 0.0) * w for is_there, x, w in zip(written, values, weights, strict=True)]
        return functools.reduce(jnp.add, terms, before * rescale)

    return total(records.o, o), total(records.aux, aux) if records.aux else None, m_new, total(records.l, sums)


def merge_kernel(
    *refs, T: int, G: int, r: int, num_adapters: int | None, aux_lane: int, most_at_once: int, return_lse: bool
):
    """One row's head. It takes as long as memory takes to answer, so all is asked for before anything is waited for.

    Where programs take turns, others hide that: then it takes as long as reading does, and `most_at_once` are few.
    Rows that many share the chip with have few partial results.
    """
    *refs, aux_smem, asked_for = refs
    num_parts, partial = refs.pop(0), refs.pop(0)
    ids = refs.pop(0) if num_adapters else None
    lora_b = refs.pop(0) if r else None
    o_ref = refs.pop(0)
    lse_ref = refs.pop(0) if return_lse else None
    row, n = lax.axis_index("row"), lax.axis_index("n")
    k, g = n // G, n % G
    of_head = partial.at[row, :, k, g]
    at_once = min(most_at_once, of_head.shape[0])
    adapter, parts = None if ids is None else ids[row // T], num_parts[row]
    records = fetch(of_head, 0, at_once, r, aux_lane)
    pin(asked_for)
    own, own_b = 0, []
    if adapter is not None and lora_b is not None:
        own = jnp.clip(adapter, 0, num_adapters - 1)
        own_b = [load(lora_b.at[own, rho, k], strided(aux_lane)) for rho in range(r)]

    pin(asked_for)
    state = zeros(aux_lane), zeros(LANES) if r else None, jnp.float32(LEAST), jnp.float32(0)
    state = add(state, records, parts, 0)

    def batch(turn, state):
        first = turn * at_once
        return add(state, fetch(of_head, first, at_once, r, aux_lane), parts, first)

    o, aux, m, sums = lax.fori_loop(1, (parts + at_once - 1) // at_once, batch, state)
    if own_b:
        aux_smem[...] = aux

        def expand():
            return functools.reduce(jnp.add, [aux_smem[rho] * b.astype(jnp.float32) for rho, b in enumerate(own_b)], o)

        o = lax.cond(own > 0, expand, lambda: o)
    if adapter is not None:  # an adapter that does not exist is no number
        o = o * jnp.where((adapter >= 0) & (adapter < num_adapters), 1.0, jnp.nan)
    o = o * jnp.where(parts > 0, 1.0 / jnp.where(parts > 0, sums, 1.0), 0.0)
    o_ref[row, n] = o.astype(o_ref.dtype)
    if lse_ref is not None:
        lse_ref[row, n] = jnp.where(parts > 0, m * LN_2 + jnp.log(jnp.where(parts > 0, sums, 1.0)), -jnp.inf)


def merge(
    partial: Float[Array, "M C K G record"],
    num_parts: Int32[Array, " M"],
    lora_b: Float[Array, "A r K H"] | None,
    adapter_ids: Int32[Array, " B"] | None,
    *,
    num_adapters: int | None,
    H: int,
    dtype,
    return_lse: bool,
    interpret: bool,
) -> tuple[Float[Array, "M N H"], Float[Array, "M N"] | None]:
    """o and, on request, lse of every row. Rows without partial results are padding: 0 and −inf."""
    M, _, K, G, record = partial.shape
    aux_lane = record - LANES
    r = 0 if lora_b is None else lora_b.shape[1]
    inputs = [num_parts, partial]
    if adapter_ids is not None:
        inputs.append(adapter_ids)
    if lora_b is not None:
        # A warpgroup's vector has 128 lanes at least: narrower heads come padded.
        inputs.append(jnp.pad(lora_b, ((0, 0),) * 3 + ((0, aux_lane - H),)) if aux_lane > H else lora_b)
    out = [jax.ShapeDtypeStruct((M, K * G, aux_lane), dtype)]
    if return_lse:
        out.append(jax.ShapeDtypeStruct((M, K * G), jnp.float32))
    body = functools.partial(
        merge_kernel,
        T=1 if adapter_ids is None else M // adapter_ids.shape[0],
        G=G,
        r=r,
        num_adapters=num_adapters,
        aux_lane=aux_lane,
        most_at_once=BATCH if M * K * G <= ONE_WAVE else FEW,
        return_lse=return_lse,
    )
    body.__name__ = f"lora_decode_merge_r{r}"
    o, *lse = plgpu.kernel(
        body,
        out_type=out,
        scratch_types=[plgpu.SMEM((LANES,), jnp.float32), plgpu.Barrier()],
        grid=(K * G, M),
        grid_names=("n", "row"),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        **interpreter(interpret),
    )(*inputs)
    return o[..., :H], lse[0] if return_lse else None
