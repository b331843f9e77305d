"""Decode and short prefill: a plan says which rows share which pages, a second kernel merges the partial results."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from lragent_jax.kernels.lora_attention.decode_plan import DecodePlan, PlanSizes, plan_decode
from lragent_jax.kernels.lora_attention.pallas_triton.block_sizes import DecodeBlockSizes
from lragent_jax.kernels.lora_attention.pallas_triton.stream import (
    UNSEEN,
    Operands,
    Reader,
    Softmax,
    Span,
    Statics,
    attend,
    below,
    call,
    expand_for,
    expanded_keys,
    iota,
    load_b,
    load_key_b,
    load_low_rank,
    load_queries,
    load_rotations,
    masked_load,
    natural_lse,
    num_adapters,
    padded,
    page_ids,
    results,
    score,
    statics,
    store,
)

MERGE_ELEMENTS = 8192  # elements of partial results that a merging program holds at once
MERGE_WARPS, MERGE_STAGES = 4, 2


def decode_kernel(x: Operands, plan: DecodePlan, o_ref, o_lr_ref, m_ref, l_ref, *, s: Statics):
    """One lane of the plan for one kv head, item after item.

    Writes unnormalised partial results: o_ref [rows, C, K, G, H], o_lr_ref [rows, C, K, G, r_v] or None, m_ref and
    l_ref [rows, C, K, G].
    """
    head, lane = pl.program_id(0), pl.program_id(1)

    def one(item, _):
        start, end = plan.pages[item, 0] * s.p, plan.pages[item, 1] * s.p
        decode_item(x, plan, (o_ref, o_lr_ref, m_ref, l_ref), head, item, start, end, s)

    lax.fori_loop(plan.lanes[lane, 0], plan.lanes[lane, 1], one, None)


def decode_item(x: Operands, plan: DecodePlan, partial_refs, head, item, start, end, s: Statics):
    T, R = x.q.shape[1], plan.rows.shape[1]
    M = padded(R * s.G)
    slot, group = jnp.minimum(lax.div(iota(M), s.G), R - 1), lax.rem(iota(M), jnp.int32(s.G))
    rows = plan.rows.at[item, slot][...]
    there = (iota(M) < R * s.G) & (rows >= 0)
    row, limits = jnp.maximum(rows, 0), jnp.where(there, jnp.minimum(plan.limits.at[item, slot][...], end), 0)
    q_at = [index[:, None] for index in (lax.div(row, T), lax.rem(row, jnp.int32(T)), head * s.G + group, there)]
    q = [load_queries(x.q, *q_at, lanes, s) for lanes in s.lanes]
    end = jnp.max(limits)
    full = jnp.min(jnp.where(there, limits, end))
    span = Span(lax.div(plan.rows[item, 0], T), start, full, end)
    reader_of, expander_of = (
        jnp.where(there, slots_ref.at[item, slot][...], -1) for slots_ref in (plan.readers, plan.expanders)
    )

    def reader(u, classes, on):
        b = lax.div(jnp.maximum(plan.rows[item, u], 0), T)
        return Reader(b, x.adapter_ids[b], jnp.max(jnp.where(classes == u, limits, 0)), on)

    def one_reader():
        readers, expand = [], None
        if s.r_v or s.r_k:
            classes = expander_of if s.r_k else reader_of
            readers = [reader(jnp.maximum(jnp.max(classes), 0), classes, jnp.max(classes) >= 0)]
            expand = expand_for(x, head, q, *readers, s)
        return attend(x, head, q, limits, span, readers, expand, s, split=False)

    def many_readers():
        rotations = load_rotations(x, s) if s.r_k else None
        readers = [reader(u, reader_of, plan.readers[item, u] == u) for u in range(R)] if s.r_v else []

        def expand(k, _, at, masked):
            def add(u, scores):
                def own():
                    mine = reader(u, expander_of, True)
                    ids = page_ids(x.page_table.low_rank, mine.row, at, mine.end, s)
                    low_rank = load_low_rank(x.low_rank.k, [ids], [mine], at, masked, s)
                    keys = expanded_keys(load_key_b(x, head, mine, s), low_rank, rotations, k, at, s)
                    return jnp.where((expander_of == u)[:, None], score(q, keys, s), scores)

                return lax.cond(plan.expanders[item, u] == u, own, lambda: scores)

            return lax.fori_loop(0, R, add, score(q, k, s))

        state = attend(x, head, q, limits, span, readers, expand, s, split=False)
        if not s.r_v:
            return state
        o_lr = state.o_lr.reshape(M, R, padded(s.r_v))
        mine = reader_of[:, None, None] == iota(R)[None, :, None]
        return state._replace(o_lr=jnp.sum(jnp.where(mine, o_lr, 0.0), axis=1))

    if R == 1 or not (s.r_v or s.r_k):
        state = one_reader()
    else:
        others = jnp.zeros((M,), bool)
        if s.r_v:
            others |= (reader_of >= 0) & (reader_of != jnp.max(reader_of))
        if s.r_k:
            others |= there & (expander_of != jnp.max(expander_of))
        state = lax.cond(jnp.max(others.astype(jnp.int32)) == 0, one_reader, many_readers)

    parts = plan.parts.at[item, slot][...]
    # Rows that are not there get an index outside: interpreted, a store that is masked off would write to it.
    at = jnp.where(there, row, x.q.shape[0] * T)
    for ref, value in zip(partial_refs, state, strict=True):
        if value is None:
            continue
        if value.ndim == 1:
            store(ref.at[at, parts, head, group], value, there)
        else:
            lane = iota(value.shape[1])[None]
            index = [i[:, None] for i in (at, parts)] + [head, group[:, None], lane]
            store(ref.at[tuple(index)], value, there[:, None], below(lane, ref.shape[-1]))


def merge_kernel(partials: Softmax, num_parts_ref, lora_b_ref, adapter_ids_ref, o_ref, lse_ref, *, block: int):
    """Merges the partial results of one row's query head, `block` at a time, and applies the row's own B.

    partials: as `decode_kernel` writes them. num_parts_ref [rows]; lora_b_ref [A, r_v, K, H] or None; adapter_ids_ref
    [B] or None; o_ref [B, T, N, H]; lse_ref [B, T, N] or None.
    """
    row, n = pl.program_id(0), pl.program_id(1)
    C, _, G, H = partials.o.shape[1:]
    T = o_ref.shape[1]
    b, t, head, group = lax.div(row, T), lax.rem(row, jnp.int32(T)), lax.div(n, G), lax.rem(n, jnp.int32(G))
    num_parts = num_parts_ref[row]

    def load(ref, parts):
        """[parts] of m or l, [parts, lanes] of o or o_lr; 0 from `num_parts` on."""
        if ref.ndim == 4:
            return masked_load(ref.at[row, parts, head, group], parts < num_parts)
        lane = iota(padded(ref.shape[4]))[None]
        there = (parts < num_parts)[:, None]
        return masked_load(ref.at[row, parts[:, None], head, group, lane], there, below(lane, ref.shape[4]))

    every = iota(padded(C))
    top = jnp.max(jnp.where(every < num_parts, load(partials.m, every), UNSEEN))

    def add(turn_of_loop, sums):
        parts = turn_of_loop * block + iota(block)
        weights = jnp.where(parts < num_parts, jnp.exp2(load(partials.m, parts) - top), 0.0)
        o, o_lr = (
            None if ref is None else so_far + jnp.sum(weights[:, None] * load(ref, parts), axis=0)
            for ref, so_far in ((partials.o, sums.o), (partials.o_lr, sums.o_lr))
        )
        return Softmax(o, o_lr, top, sums.l + jnp.sum(weights * load(partials.l, parts)))

    o, o_lr = (None if ref is None else jnp.zeros((padded(ref.shape[4]),), jnp.float32) for ref in partials[:2])
    sums = Softmax(o, o_lr, top, jnp.float32(0))
    sums = add(0, sums) if block >= C else lax.fori_loop(0, lax.div(num_parts + block - 1, block), add, sums)

    o, lane, live = sums.o, iota(padded(H)), num_parts > 0
    if adapter_ids_ref is not None:
        adapter, num_adapters = adapter_ids_ref[b], lora_b_ref.shape[0]
        if sums.o_lr is not None:
            on = live & (adapter > 0) & (adapter < num_adapters)
            o += jnp.sum(jnp.where(on, sums.o_lr, 0.0)[:, None] * load_b(lora_b_ref, adapter, head, (0, H), on), axis=0)
        o = jnp.where((adapter >= 0) & (adapter < num_adapters), o, jnp.nan)
    o = jnp.where(live, o / jnp.where(live, sums.l, 1.0), 0.0)
    store(o_ref.at[b, t, n, lane], o, below(lane, H))
    if lse_ref is not None:
        lse_ref[b, t, n] = jnp.where(live, natural_lse(top, sums.l), -jnp.inf)


def decode(x: Operands, sizes: DecodeBlockSizes, sm_scale: float, return_lse: bool, interpret: bool):
    """(o, lse or None)."""
    (B, T, N, H), K, W = x.q.shape, x.base.shape[1], x.page_table.base.shape[1]
    s = statics(x, sm_scale, sizes.block_kv, interpret)
    wanted = PlanSizes(sizes.rows_per_item, max(1, sizes.block_kv // s.p), sizes.programs, heads=K)
    ids = x.adapter_ids
    if ids is not None:  # adapters that do not exist have no low-rank pages
        ids = jnp.where((ids > 0) & (ids < num_adapters(x)), ids, 0)
    plan = plan_decode(x.page_table, ids, T=T, page_size=s.p, sizes=wanted)

    def per_part(*lanes):
        return jax.ShapeDtypeStruct((B * T, wanted.max_parts(B, W), K, s.G, *lanes), jnp.float32)

    partials = call(
        functools.partial(decode_kernel, s=s),
        f"lora_decode_r{sizes.rows_per_item}_kv{sizes.block_kv}",
        (K, plan.lanes.shape[0]),
        Softmax(per_part(H), per_part(s.r_v) if s.r_v else None, per_part(), per_part()),
        *(sizes.num_warps, sizes.num_stages, interpret),
    )(x, plan)
    block = min(padded(wanted.max_parts(B, W)), max(16, MERGE_ELEMENTS // padded(H)))
    return call(
        functools.partial(merge_kernel, block=block),
        f"lora_merge_{block}",
        (B * T, N),
        results(x, return_lse),
        *(MERGE_WARPS, MERGE_STAGES, interpret),
    )(partials, plan.num_parts, next((b for b in x.lora_b or () if b is not None), None), x.adapter_ids)
