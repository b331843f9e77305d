"""The second half of decode on Hopper: a row's partial results become its output, B applied once."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.registers import load
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.stream import interpreter
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.stream_compute import LEAST
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.stream_shapes import LANES

BATCH = 8  # loads under way at a time
LN_2 = 0.6931471805599453


def strided(width: int):
    """A vector over the warpgroup's threads, width / 128 neighbours each."""
    return plgpu.Layout.WG_STRIDED((width,), vec_size=width // LANES)


def joined(partial, num_parts, r: int, aux_lane: int):
    """(o [width] and its low-rank lanes [128], both not normalised, m, l) of `num_parts` records at `partial[j]`."""
    width = aux_lane

    def batch(turn, carry):
        o, aux, m, sums = carry
        first = turn * BATCH
        indices = [jnp.minimum(first + i, num_parts - 1) for i in range(BATCH)]
        ms = [partial[j, aux_lane + r] for j in indices]
        ls = [partial[j, aux_lane + r + 1] for j in indices]
        os = [load(partial.at[j, pl.ds(0, width)], strided(width)) for j in indices]
        lrs = [load(partial.at[j, pl.ds(aux_lane, LANES)], strided(LANES)) for j in indices] if r else []
        m_new = functools.reduce(jnp.maximum, ms, m)
        rescale = jnp.exp2(m - m_new)
        weights = [jnp.where(first + i < num_parts, jnp.exp2(m_i - m_new), 0.0) for i, m_i in enumerate(ms)]
        o = sum((x * w for x, w in zip(os, weights, strict=True)), o * rescale)
        sums = sum((x * w for x, w in zip(ls, weights, strict=True)), sums * rescale)
        if r:
            aux = sum((x * w for x, w in zip(lrs, weights, strict=True)), aux * rescale)
        return o, aux, m_new, sums

    def zeros(width):
        return plgpu.layout_cast(jnp.zeros((width,), jnp.float32), strided(width))

    start = (zeros(width), zeros(LANES) if r else None, jnp.float32(LEAST), jnp.float32(0))
    return lax.fori_loop(0, (num_parts + BATCH - 1) // BATCH, batch, start)


def merge_kernel(*refs, T: int, G: int, r: int, num_adapters: int | None, aux_lane: int, return_lse: bool):
    refs = list(refs)
    num_parts, partial = refs.pop(0), refs.pop(0)
    ids = refs.pop(0) if num_adapters else None
    lora_b = refs.pop(0) if r else None
    o_ref = refs.pop(0)
    lse_ref = refs.pop(0) if return_lse else None
    row, n = lax.axis_index("row"), lax.axis_index("n")
    k, g = n // G, n % G
    parts = num_parts[row]
    o, aux, m, sums = joined(partial.at[row, :, k, g], parts, r, aux_lane)
    adapter = None if ids is None else ids[row // T]
    if adapter is not None and lora_b is not None:
        (aux_smem,) = refs
        own = jnp.clip(adapter, 0, num_adapters - 1)
        aux_smem[...] = aux

        def expand(turn, o):
            for i in range(8):
                rho = turn * 8 + i
                b = load(lora_b.at[own, rho, k], strided(aux_lane))
                o += aux_smem[rho] * b.astype(jnp.float32)
            return o

        o = lax.fori_loop(0, jnp.where(own > 0, r // 8, 0), expand, o)
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
        return_lse=return_lse,
    )
    body.__name__ = f"lora_decode_merge_r{r}"
    o, *lse = plgpu.kernel(
        body,
        out_type=out,
        scratch_types=[plgpu.SMEM((LANES,), jnp.float32)] if r else [],
        grid=(K * G, M),
        grid_names=("n", "row"),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        **interpreter(interpret),
    )(*inputs)
    return o[..., :H], lse[0] if return_lse else None
