"""Prefill: one program per (row, tile of queries, query head)."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from lragent_jax.kernels.lora_attention.pallas_triton.block_sizes import PrefillBlockSizes
from lragent_jax.kernels.lora_attention.pallas_triton.stream import (
    Operands,
    Reader,
    Span,
    Statics,
    attend,
    below,
    call,
    expand_for,
    iota,
    load_b,
    load_queries,
    natural_lse,
    num_adapters,
    padded,
    results,
    statics,
    store,
)


def prefill_kernel(x: Operands, o_ref, lse_ref, *, s: Statics, block_q: int):
    """One tile of queries of one head. o_ref [B, T, N, H]; lse_ref [B, T, N] or None."""
    T = x.q.shape[1]
    n, b = pl.program_id(0), pl.program_id(1)
    first = (pl.cdiv(T, block_q) - 1 - pl.program_id(2)) * block_q  # the longest tiles first: the short ones fill up
    head, t = lax.div(n, s.G), first + iota(block_q)
    q_start, kv_len = x.page_table.q_starts[b], x.page_table.kv_lens[b]
    positions = q_start + t
    live = (t < T) & (positions >= 0) & (positions < kv_len)
    end = jnp.minimum(jnp.minimum(first + block_q, T) + q_start, kv_len)
    span = Span(b, jnp.int32(0), jnp.minimum(q_start + first + 1, kv_len), end)

    q = [load_queries(x.q, b, t[:, None], n, (t < T)[:, None], lanes, s) for lanes in s.lanes]
    readers, expand = [], None
    if x.adapter_ids is not None:
        adapter = x.adapter_ids[b]
        reader = Reader(b, adapter, end, (adapter > 0) & (adapter < num_adapters(x)))
        readers, expand = [reader], expand_for(x, head, q, reader, s)
    state = attend(x, head, q, jnp.minimum(positions + 1, kv_len), span, readers, expand, s, split=True)

    o, lane = state.o, iota(padded(s.H))[None]
    if s.r_v:
        o += s.dot(state.o_lr, load_b(x.lora_b.v, adapter, head, (0, s.H), reader.on))  # bf16 and f16 fit into TF32
    o = o / jnp.where(live, state.l, 1.0)[:, None]
    if x.adapter_ids is not None:
        o = jnp.where((adapter >= 0) & (adapter < num_adapters(x)), o, jnp.nan)
    o = jnp.where(live[:, None], o, 0.0)
    row = jnp.where(t < T, t, T)  # outside of the array: interpreted, a store that is masked off would write there
    store(o_ref.at[b, row[:, None], n, lane], o, (t < T)[:, None], below(lane, s.H))
    if lse_ref is not None:
        store(lse_ref.at[b, row, n], jnp.where(live, natural_lse(state.m, state.l), -jnp.inf), t < T)


def prefill(x: Operands, sizes: PrefillBlockSizes, sm_scale: float, return_lse: bool, interpret: bool):
    """(o, lse or None)."""
    B, T, N, _ = x.q.shape
    return call(
        functools.partial(prefill_kernel, s=statics(x, sm_scale, sizes.block_kv, interpret), block_q=sizes.block_q),
        f"lora_prefill_q{sizes.block_q}_kv{sizes.block_kv}",
        (N, B, pl.cdiv(T, sizes.block_q)),
        results(x, return_lse),
        *(sizes.num_warps, sizes.num_stages, interpret),
    )(x)
