"""Low-rank keys and values added to the base ones, once for all queries of a call, into pages of its own."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from lragent_jax.kernels.lora_attention.pallas_triton.stream import (
    Operands,
    Reader,
    Statics,
    below,
    by_key,
    call,
    expanded_keys,
    iota,
    load_b,
    load_base,
    load_key_b,
    load_low_rank,
    load_rotations,
    num_adapters,
    padded,
    page_ids,
    slots,
    statics,
    store,
)

BLOCK_KV = 64
FLOP_PER_BYTE = 155  # attention's rate over memory's, of an H100
KEYS_FROM = 128  # queries per row: a tile's, for each of which keys would be rebuilt


def pays(T: int, H: int, G: int, r_v: int, r_k: int) -> bool:
    """Whether it is worth the while for T queries per row; ranks are 0 where there is no such cache.

    A key and its value are copied, 8 H bytes per kv head; P L costs 2 r FLOP per query head and query instead.
    """
    return bool((r_v and 2 * T * G * padded(r_v) >= 8 * H * FLOP_PER_BYTE) or (r_k and T >= KEYS_FROM))


def expand_kernel(x: Operands, expanded_ref, *, s: Statics):
    """One block of keys of a row's kv head."""
    block, head, b = (pl.program_id(i) for i in range(3))
    start, end, adapter = block * s.block_kv, x.page_table.kv_lens[b], x.adapter_ids[b]

    @pl.when(start < end)
    def _any():
        reader = Reader(b, adapter, end, (adapter > 0) & (adapter < num_adapters(x)))
        keys, at = start + iota(s.block_kv), slots(start, s)
        pages, held = by_key(page_ids(x.page_table.base, b, start, end, s), s), keys < end
        low_rank_ids = page_ids(x.page_table.low_rank, b, start, end, s)
        k = [load_base(x, head, pages, at, lanes, held) for lanes in s.lanes]
        v = load_base(x, head, pages, at, (s.H, s.H), held)
        if s.r_k:
            low_rank = load_low_rank(x.low_rank.k, [low_rank_ids], [reader], start, True, s)
            k = expanded_keys(load_key_b(x, head, reader, s), low_rank, load_rotations(x, s), k, start, s)
        if s.r_v:
            low_rank = load_low_rank(x.low_rank.v, [low_rank_ids], [reader], start, True, s)
            own_b = load_b(x.lora_b.v, adapter, head, (0, s.H), reader.on).astype(v.dtype)
            v = v.astype(jnp.float32) + s.dot(low_rank, own_b, trans_a=True)
        v = jnp.where((adapter >= 0) & (adapter < num_adapters(x)), v, jnp.nan)  # as LoraB.select has it

        own = b * x.page_table.base.shape[1] + lax.div(keys, s.p)
        for value, (first, size) in zip((*k, v), (*s.lanes, (s.H, s.H)), strict=True):
            lane = iota(padded(size))[None]
            store(
                expanded_ref.at[own[:, None], head, at[:, None], first + lane], value, held[:, None], below(lane, size)
            )


def expand(x: Operands, *, interpret: bool) -> Float[Array, "P_own K p two_H"]:
    """A pool in which row b's keys and values lie in pages b W, b W + 1 .. as all queries of the row see them."""
    (_, K, p, width), (B, W) = x.base.shape, x.page_table.base.shape
    return call(
        functools.partial(expand_kernel, s=statics(x, 1.0, BLOCK_KV, interpret)),
        "lora_expand",
        (pl.cdiv(W * p, BLOCK_KV), K, B),
        jax.ShapeDtypeStruct((B * W, K, p, width), x.base.dtype),
        *(4, 1, interpret),
    )(x)
