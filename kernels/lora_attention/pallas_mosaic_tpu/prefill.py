"""Many queries per row: one program per tile of a row's queries, all heads at once. B is applied once, at its end."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from lragent_jax.kernels.lora_attention.arguments import LoraB, LowRank, PageTable
from lragent_jax.kernels.lora_attention.pallas_mosaic_tpu.block_sizes import LANES, BlockSizes, next_power
from lragent_jax.kernels.lora_attention.pallas_mosaic_tpu.call import run_items
from lragent_jax.kernels.lora_attention.pallas_mosaic_tpu.items import Items
from lragent_jax.kernels.lora_attention.pallas_mosaic_tpu.kernel import Config, Item, matmul
from lragent_jax.kernels.lora_attention.pallas_mosaic_tpu.layouts import in_k_lanes, in_v_lanes, out_of_v_lanes

LN_2 = 0.6931471805599453


def tile_items(page_table: PageTable, adapter_ids, tiles: int, block_q: int, p: int) -> Items:
    """One item per (row, tile of its queries), row-major."""
    B = page_table.q_starts.shape[0]
    q_starts = (page_table.q_starts[:, None] + jnp.arange(tiles, dtype=jnp.int32) * block_q).reshape(-1)
    rows = jnp.repeat(jnp.arange(B, dtype=jnp.int32), tiles)
    kv_lens = page_table.kv_lens[rows]
    first_seen = jnp.maximum(q_starts, 0) + 1
    seen_by_any = jnp.maximum(jnp.minimum(kv_lens, q_starts + block_q), 0)
    seen_by_any = jnp.where(first_seen <= kv_lens, seen_by_any, 0)
    ids = jnp.zeros(B, jnp.int32) if adapter_ids is None else adapter_ids
    readers = jnp.where(ids == 0, -1, 0)[rows]
    return Items(
        first=jnp.zeros_like(rows),
        end=-(-seen_by_any // p),
        base_rows=rows,
        seen_by_all=jnp.minimum(first_seen, seen_by_any),
        seen_by_any=seen_by_any,
        any_reader=(readers == 0).astype(jnp.int32),
        q_starts=q_starts,
        kv_lens=kv_lens,
        readers=readers,
        reader_ends=jnp.where(readers == 0, seen_by_any, 0),
        expanders=readers,
        low_rank_rows=rows,
        adapter_ids=ids[rows],
    )


def finish_tile(item: Item, *refs, num_adapters: int, has_values: bool):
    """Multiplies by B, normalises, and writes o and, where asked for, lse."""
    b_v = refs[0] if has_values else None  # [1, K, r_v, width]
    o_ref, *lse_ref = refs[has_values:]  # [1, K, G, block_q, width], [1, K, G, block_q, LANES]
    c, s = item.c, item.s
    adapter_id = item.slot_scalar(item.items.adapter_ids, 0)
    unknown = (adapter_id < 0) | (adapter_id >= num_adapters)
    live = item.limits() > 0

    def write_unit(unit, _):
        h, g = unit // c.groups, unit % c.groups
        sums = jnp.where(live, s["l"][unit][:, :1], 1.0)
        o = s["o"][unit] / sums
        if b_v is not None:
            delta = matmul(s["o_lr"][unit] / sums, b_v[0, h].astype(jnp.float32))
            o += jnp.where(adapter_id > 0, delta, 0.0)
        o = jnp.where(live, jnp.where(unknown, jnp.nan, o), 0.0)
        o_ref[0, h, g] = o.astype(o_ref.dtype)
        for ref in lse_ref:
            lse = jnp.where(live, LN_2 * s["m"][unit][:, :1] + jnp.log(sums), -jnp.inf)
            ref[0, h, g] = jnp.broadcast_to(lse, (c.rows, LANES))
        return 0

    def write():
        lax.fori_loop(0, c.units, write_unit, 0)

    def write_nothing():
        o_ref[...] = jnp.zeros(o_ref.shape, o_ref.dtype)
        for ref in lse_ref:
            ref[...] = jnp.full(ref.shape, -jnp.inf, jnp.float32)

    pl.when(item.end > item.first)(write)
    pl.when(item.end <= item.first)(write_nothing)


@functools.partial(jax.jit, static_argnames=("sm_scale", "return_lse", "block_sizes", "interpret"))
def prefill(
    q: Float[Array, "B T N H"],
    base: Float[Array, "P K p 2*H"],
    low_rank: LowRank,
    lora_b: LoraB,
    page_table: PageTable,
    adapter_ids: Int32[Array, " B"] | None,
    *,
    rope_inv_freq: Float[Array, " H//2"] | None,
    sm_scale: float,
    return_lse: bool,
    block_sizes: BlockSizes,
    interpret: bool,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """See `api.lora_attention`."""
    B, T, N, H = q.shape
    K, p = base.shape[1:3]
    G, W = N // K, page_table.base.shape[1]
    block_q = min(block_sizes.block_q, max(16, next_power(T)))
    tiles = -(-T // block_q)
    r_v, r_k = (0 if pool is None else pool.shape[1] for pool in low_rank)
    n, m = block_sizes.pages(p, W)
    config = Config(
        K=K, H=H, p=p, n=n, m=m, R=1, tokens=block_q, r_v=r_v, r_k=r_k, groups=G, rows=block_q, W=W,
        sm_scale=sm_scale, dtype=q.dtype,
    )  # fmt: skip
    num_adapters = max((b.shape[0] for b in lora_b if b is not None), default=1)

    grouped = jnp.pad(q, ((0, 0), (0, tiles * block_q - T), (0, 0), (0, 0))).reshape(B, -1, K, G, H)
    grouped = in_k_lanes(jnp.einsum("btkgh->bkgth", grouped))

    def tile(width):
        return pl.BlockSpec((1, K, G, block_q, width), lambda b, i, *_: (b, 0, 0, i, 0))

    def own_b(b, i, *scalars):
        adapter_id = scalars[Items._fields.index("adapter_ids")][b * tiles + i]
        return jnp.clip(adapter_id, 0, num_adapters - 1), 0, 0, 0

    extra = []
    if lora_b.v is not None:
        b_v = in_v_lanes(jnp.einsum("arkh->akrh", lora_b.v))
        extra.append((b_v, pl.BlockSpec((1, K, r_v, config.width), own_b)))
    shape = (B, K, G, tiles * block_q)
    outputs = [(jax.ShapeDtypeStruct((*shape, config.width), q.dtype), tile(config.width))]
    if return_lse:
        outputs.append((jax.ShapeDtypeStruct((*shape, LANES), jnp.float32), tile(LANES)))
    o, *lse = run_items(
        functools.partial(finish_tile, num_adapters=num_adapters, has_values=lora_b.v is not None),
        config,
        f"lora_prefill_q{block_q}_kv{config.block}_rv{r_v}_rk{r_k}",
        (B, tiles),
        tile_items(page_table, adapter_ids, tiles, block_q, p),
        (page_table.base, page_table.low_rank),
        (grouped, tile(config.width)),
        base,
        low_rank,
        None if lora_b.k is None else jnp.einsum("arkh->akrh", lora_b.k),
        rope_inv_freq,
        extra,
        outputs,
        interpret=interpret,
    )
    o = jnp.einsum("bkgth->btkgh", out_of_v_lanes(o, H)[:, :, :, :T]).reshape(q.shape)
    if not return_lse:
        return o
    return o, jnp.einsum("bkgt->btkg", lse[0][:, :, :, :T, 0]).reshape(B, T, N)
