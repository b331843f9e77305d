"""One query per row: rows that read the same base pages are one item's slots, so that those pages are read once.

Items and slots come from a plan that is data (`decode_plan`). Every item leaves unnormalised partial results of its
slots; what a row gets from several items is merged by maxima and sums, and B is applied once, after that.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from lragent_jax.kernels.lora_attention.arguments import LoraB, LowRank, PageTable
from lragent_jax.kernels.lora_attention.decode_plan import DecodePlan, PlanSizes, plan_decode
from lragent_jax.kernels.lora_attention.pallas_mosaic_tpu.block_sizes import LANES, BlockSizes
from lragent_jax.kernels.lora_attention.pallas_mosaic_tpu.call import run_items
from lragent_jax.kernels.lora_attention.pallas_mosaic_tpu.items import Items
from lragent_jax.kernels.lora_attention.pallas_mosaic_tpu.kernel import UNSEEN, Config, Item
from lragent_jax.kernels.lora_attention.pallas_mosaic_tpu.layouts import in_k_lanes, out_of_v_lanes

LN_2 = 0.6931471805599453


def planned_items(plan: DecodePlan, adapter_ids: Int32[Array, " B"] | None, page_size: int) -> Items:
    """The plan's items. What a row sees behind an item's pages is another item's."""
    rows, limits = jnp.maximum(plan.rows, 0), jnp.minimum(plan.limits, plan.pages[:, 1:] * page_size)
    slots = jnp.arange(plan.rows.shape[1], dtype=jnp.int32)
    ids = jnp.zeros_like(rows) if adapter_ids is None else adapter_ids[rows]
    reads = plan.readers[:, None] == slots[:, None]  # [I, R, R]: whether slot s reads what slot `reader` is first with
    seen_by_any = limits.max(axis=1)
    return Items(
        first=plan.pages[:, 0],
        end=plan.pages[:, 1],
        base_rows=rows[:, 0],
        seen_by_all=jnp.min(jnp.where(limits > 0, limits, seen_by_any[:, None]), axis=1),
        seen_by_any=seen_by_any,
        any_reader=jnp.any(plan.readers >= 0, axis=1).astype(jnp.int32),
        q_starts=(limits - 1).reshape(-1),
        kv_lens=limits.reshape(-1),
        readers=plan.readers.reshape(-1),
        reader_ends=jnp.max(jnp.where(reads, limits[:, None], 0), axis=2).reshape(-1),
        expanders=plan.expanders.reshape(-1),
        low_rank_rows=rows.reshape(-1),
        adapter_ids=ids.reshape(-1),
    )


def finish_item(item: Item, o_ref, stats_ref, o_lr_ref=None):
    """Writes the partial results: o [1, K, rows, width], m and l in lanes 0 and 1 of stats [1, K, rows, LANES], and
    o_lr [1, K, rows, R r_v]."""
    s = item.s

    def write():
        o_ref[0] = s["o"][...]
        first_lane = lax.broadcasted_iota(jnp.int32, s["m"].shape, 2) == 0
        stats_ref[0] = jnp.where(first_lane, s["m"][...], s["l"][...])
        if o_lr_ref is not None:
            o_lr_ref[0] = s["o_lr"][...]

    pl.when(item.end > item.first)(write)


def merge(plan: DecodePlan, o, stats, o_lr, b_v, C: int, G: int, H: int):
    """o f32 [B, K, G, H] and lse [B, K, G] of every row, from the partial results of all items.

    Shapes: o [I, K, rows, width], stats [I, K, rows, LANES], o_lr [I, K, rows, R r_v], b_v [B, r_v, K, H].
    """
    (num_items, R), B, K = plan.rows.shape, plan.num_parts.shape[0], o.shape[1]
    # Where the j-th partial result of each row lies, as item · R + slot.
    index = jnp.arange(num_items * R, dtype=jnp.int32)
    target = jnp.where(plan.rows >= 0, plan.rows * C + plan.parts, B * C).reshape(-1)
    where = jnp.zeros(B * C, jnp.int32).at[target].set(index, mode="drop").reshape(B, C)
    there = (jnp.arange(C) < plan.num_parts[:, None])[:, :, None, None]

    def gather(x):
        """[I, K, G R (padded), n] to [B, C, K, G, n]."""
        x = x[:, :, : G * R].reshape(num_items, K, G, R, -1)
        return x[where // R, :, :, where % R]

    m, sums = gather(stats[..., 0])[..., 0], gather(stats[..., 1])[..., 0]
    top = jnp.max(jnp.where(there, m, UNSEEN), axis=1, keepdims=True)
    weights = jnp.where(there, jnp.exp2(m - top), 0.0)
    total = jnp.sum(jnp.where(there, sums, 0.0) * weights, axis=1)
    live = (plan.num_parts > 0)[:, None, None]
    total = jnp.where(live, total, 1.0)

    def weighted(x):
        return jnp.sum(jnp.where(there[..., None], x, 0.0) * weights[..., None], axis=1) / total[..., None]

    out = weighted(gather(out_of_v_lanes(o, H)))
    if o_lr is not None:
        r_v = b_v.shape[1]
        readers = jnp.maximum(plan.readers, 0).reshape(-1)[where]  # [B, C]
        own = gather(o_lr).reshape(B, C, K, G, R, r_v)
        own = jnp.take_along_axis(own, readers[:, :, None, None, None, None], axis=4)[:, :, :, :, 0]
        reads = (plan.readers.reshape(-1)[where] >= 0)[:, :, None, None, None]
        own = weighted(jnp.where(reads, own, 0.0))
        out += jnp.einsum("bkgr,brkh->bkgh", own, b_v, precision="highest")
    lse = jnp.where(live, LN_2 * top[:, 0] + jnp.log(total), -jnp.inf)
    return jnp.where(live[..., None], out, 0.0), lse


@functools.partial(jax.jit, static_argnames=("sm_scale", "return_lse", "block_sizes", "interpret"))
def decode(
    q: Float[Array, "B 1 N H"],
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
) -> Float[Array, "B 1 N H"] | tuple[Float[Array, "B 1 N H"], Float[Array, "B 1 N"]]:
    """See `api.lora_attention`."""
    B, _, N, H = q.shape
    K, p = base.shape[1:3]
    G, W = N // K, page_table.base.shape[1]
    R, (n, m) = block_sizes.rows_per_item, block_sizes.pages(p, W)
    sizes = PlanSizes(rows_per_item=R, pages_per_block=n, programs=1, heads=1)
    plan = plan_decode(page_table, adapter_ids, T=1, page_size=p, sizes=sizes)
    I = plan.rows.shape[0]  # noqa: E741 (the plan's letter)
    r_v, r_k = (0 if pool is None else pool.shape[1] for pool in low_rank)
    rows = -(-G * R // 16) * 16  # whole tiles of 16-bit numbers
    config = Config(
        K=K, H=H, p=p, n=n, m=m, R=R, tokens=1, r_v=r_v, r_k=r_k, groups=1, rows=rows, W=W,
        sm_scale=sm_scale, dtype=q.dtype,
    )  # fmt: skip

    queries = in_k_lanes(q.reshape(B, K, G, H))[jnp.maximum(plan.rows, 0)]  # [I, R, K, G, width]
    queries = jnp.einsum("irkgh->ikgrh", queries).reshape(I, K, 1, G * R, -1)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, 0), (0, rows - G * R), (0, 0)))

    def per_item(*shape):
        return pl.BlockSpec((1, *shape), lambda i, *_: (i, *(0 for _ in shape)))

    widths = [config.width, LANES] + ([R * r_v] if r_v else [])
    o, stats, *o_lr = run_items(
        finish_item,
        config,
        f"lora_decode_r{R}_kv{config.block}_rv{r_v}_rk{r_k}",
        (I,),
        planned_items(plan, adapter_ids, p),
        (page_table.base, page_table.low_rank),
        (queries, per_item(*queries.shape[1:])),
        base,
        low_rank,
        None if lora_b.k is None else jnp.einsum("arkh->akrh", lora_b.k),
        rope_inv_freq,
        [],
        [(jax.ShapeDtypeStruct((I, K, rows, width), jnp.float32), per_item(K, rows, width)) for width in widths],
        interpret=interpret,
    )
    b_v = None if adapter_ids is None else lora_b.select(adapter_ids).v
    out, lse = merge(plan, o, stats, o_lr[0] if o_lr else None, b_v, sizes.max_parts(B, W), G, H)
    if adapter_ids is not None:
        num_adapters = min(b.shape[0] for b in lora_b if b is not None)
        unknown = (adapter_ids < 0) | (adapter_ids >= num_adapters)
        out = jnp.where(unknown[:, None, None, None] & jnp.isfinite(lse)[..., None], jnp.nan, out)
    out = out.reshape(q.shape).astype(q.dtype)
    return (out, lse.reshape(B, 1, N)) if return_lse else out
