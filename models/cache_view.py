"""What one layer writes to the caches and reads from them: arrays and lengths, no allocation, no agents.

Pages are written first and read afterwards, so a prefill chunk and a decode step are the same operation: queries at
positions [q_start, kv_len) against keys [0, kv_len).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lragent_jax.kernels import lora_attention as attention
from lragent_jax.kernels import page_update, page_write
from lragent_jax.kernels.lora_attention.dispatch import default_platform
from lragent_jax.models.adapter_bank import LoraPair
from lragent_jax.models.pytree import pytree, static
from lragent_jax.models.tensor_parallel import HEADS, POOL, WHOLE, per_shard, shapes_per_shard

HostOrDevice = jax.Array | np.ndarray
"""Filled in on the host, used on the device."""

NEVER = 2**30
"""A position that no token reaches: from there on a row writes what it does not write at all."""


@pytree
class BaseCache:
    """X W of every token. `kv[layer]` is a pool [P, K, p, 2H]: K (after RoPE) in the first H lanes, V in the last.

    Recomputed layers may have another number of pages than the rest.
    """

    kv: tuple[Float[Array, "_P K p HH"], ...]


@pytree
class LowRankCache:
    """X A of every token and A-group. Pools [P_lr, r, p] per layer; `k` (before RoPE) only with k_proj adapters."""

    v: tuple[Float[Array, "P r_v p"], ...] | None
    k: tuple[Float[Array, "P r_k p"], ...] | None


@pytree
class RecomputedPages:
    """A second table of base pages, all int32, for the `layers` whose K and V each adapter keeps for itself.

    `pages` [B, W], `write_from` [B]: as `base` and `base_write_from` of the `PageTable` that holds it.
    """

    pages: Int[HostOrDevice, "B W"]
    write_from: Int[HostOrDevice, " B"]
    layers: tuple[int, ...] = static()


@pytree
class PageTable:
    """Where the rows of one call live, all int32; W pages wide, entries past a row's length are never read.

    `q_starts`, `kv_lens` [B]: the row's new tokens are at positions [q_start, kv_len); more query slots are padding.
    `base` [B, W], `base_write_from` [B]: pages of the base cache; new tokens from that position on are written.
    `low_rank` [g, B, W], `low_rank_write_from` [g, B], `group_ids` [g, B]: the same for each of the g low-rank tables
    that a row may write, and the A-group whose X A goes there. g = 0 where adapters are merged into K and V.
    `read_slots` [B]: which of the g tables the row's own adapter reads.
    `recomputed`: what some layers have in place of `base` and `base_write_from`; None where all layers are alike.
    """

    q_starts: Int[HostOrDevice, " B"]
    kv_lens: Int[HostOrDevice, " B"]
    base: Int[HostOrDevice, "B W"]
    base_write_from: Int[HostOrDevice, " B"]
    low_rank: Int[HostOrDevice, "g B W"]
    low_rank_write_from: Int[HostOrDevice, "g B"]
    group_ids: Int[HostOrDevice, "g B"]
    read_slots: Int[HostOrDevice, " B"]
    recomputed: RecomputedPages | None = None

    def of_layer(self, layer: int) -> "PageTable":
        """The table that `layer` writes and reads by."""
        own = self.recomputed
        if own is None:
            return self
        if layer not in own.layers:
            return dataclasses.replace(self, recomputed=None)
        return dataclasses.replace(self, base=own.pages, base_write_from=own.write_from, recomputed=None)

    @property
    def num_low_rank_tables(self) -> int:
        return self.low_rank.shape[0]

    def positions(self, num_tokens: int) -> Int[Array, "B T"]:
        """Position of every query slot, padding included."""
        return self.q_starts[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)

    def last_tokens(self, num_tokens: int) -> tuple[Int[Array, " B"], "PageTable"]:
        """Among the T query slots that of each row's last new token, and the table of those alone, which write nothing.

        A row without new tokens has slot 0, and no token in the table either.
        """
        starts = jnp.maximum(self.kv_lens - 1, self.q_starts)
        table = dataclasses.replace(
            self, q_starts=starts, base_write_from=jnp.full_like(self.base_write_from, NEVER),
            low_rank_write_from=jnp.full_like(self.low_rank_write_from, NEVER),
        )  # fmt: skip
        return jnp.clip(starts - self.q_starts, 0, num_tokens - 1), table

    def read_table(self) -> attention.PageTable:
        """The tables attention reads: the base pages, and the low-rank pages of each row's own A-group."""
        low_rank = None
        if self.num_low_rank_tables:
            rows = jnp.arange(self.read_slots.shape[0])
            low_rank = self.low_rank[self.read_slots, rows]
        return attention.PageTable(base=self.base, low_rank=low_rank, q_starts=self.q_starts, kv_lens=self.kv_lens)


@pytree
class LayerCache:
    """One layer's pools."""

    kv: Float[Array, "P K p HH"]
    low_rank_v: Float[Array, "P_lr r_v p"] | None
    low_rank_k: Float[Array, "P_lr r_k p"] | None

    @property
    def pools(self) -> page_write.Pools:
        return page_write.Pools(self.kv, self.low_rank_v, self.low_rank_k)


def _token_slots(
    page_indices: Int[HostOrDevice, "B W"],
    write_from: Int[HostOrDevice, " B"],
    table: PageTable,
    num_tokens: int,
    page_size: int,
) -> Int[Array, "B T"]:
    """page · p + slot of every query slot; −1 where it is padding, or was written before."""
    positions = table.positions(num_tokens)
    writes = (positions < table.kv_lens[:, None]) & (positions >= write_from[:, None])
    column = jnp.clip(positions // page_size, 0, page_indices.shape[1] - 1)
    page = jnp.take_along_axis(page_indices, column, axis=1)
    return jnp.where(writes, page * page_size + positions % page_size, -1)


def token_slots(table: PageTable, num_tokens: int, page_size: int) -> page_write.Slots:
    """Where the new tokens go, in the base pages and in the pages of each low-rank table."""

    def low_rank(page_indices, write_from):
        return _token_slots(page_indices, write_from, table, num_tokens, page_size)

    return page_write.Slots(
        base=_token_slots(table.base, table.base_write_from, table, num_tokens, page_size),
        low_rank=jax.vmap(low_rank)(table.low_rank, table.low_rank_write_from),
    )


IN_POOLS = page_write.Pools(POOL, WHOLE, WHOLE)
IN_PROJECTIONS = page_write.Projections(HEADS, HEADS, HEADS, HEADS)


def _platform(implementation: str | None) -> str | None:
    """What kind of page write comes with attention's `implementation`: that of "gpu" or "tpu", or XLA's."""
    return {None: default_platform(), "pallas_mosaic_gpu": "gpu", "pallas_mosaic_tpu": "tpu"}.get(implementation)


def _page_writes(implementation: str | None) -> tuple[str, ...]:
    """Those that are tried."""
    return page_write.ON_GPUS if _platform(implementation) == "gpu" else ("xla",)


def expands_queries(
    projections: page_write.Projections,
    low_rank: page_write.LowRank,
    cache: LayerCache,
    implementation: str | None,
    rank: int,
) -> bool:
    """Whether `rotate_and_write` of these had better be given what adapters add to q as an Expansion of that rank."""
    specs = (IN_PROJECTIONS, WHOLE, IN_POOLS)
    projections, low_rank, pools = shapes_per_shard(specs, (projections, low_rank, cache.pools))
    return page_write.expands(projections, low_rank, pools, rank, implementations=_page_writes(implementation))


def rotate_and_write(
    projections: page_write.Projections,
    rotation: page_write.Rotation,
    low_rank: page_write.LowRank,
    cache: LayerCache,
    table: PageTable,
    implementation: str | None,
) -> tuple[Float[Array, "B T N H"], LayerCache]:
    """Rotated queries, and the cache with the new tokens in it; every device those of its kv heads.

    `low_rank`: the tokens' X A for each of the g tables. `implementation` is attention's: the page write that comes
    with it is done where it can be, and XLA's elsewhere.
    """
    pools = cache.pools
    if _platform(implementation) == "tpu":
        low_rank, pools = _write_pages_in_place(low_rank, pools, table)
    write = functools.partial(page_write.rotate_and_write, implementations=_page_writes(implementation))
    in_projections = IN_PROJECTIONS
    if isinstance(projections.q_delta, page_write.Expansion):
        in_projections = in_projections._replace(q_delta=page_write.Expansion(WHOLE, HEADS, WHOLE))
    slots = token_slots(table, projections.q.shape[1], cache.kv.shape[2])
    q, pools = per_shard(write, (in_projections, WHOLE, WHOLE, WHOLE, IN_POOLS), (HEADS, IN_POOLS))(
        projections, rotation, low_rank, slots, pools
    )
    return q, LayerCache(**pools._asdict())


def _write_pages_in_place(
    low_rank: page_write.LowRank, pools: page_write.Pools, table: PageTable
) -> tuple[page_write.LowRank, page_write.Pools]:
    """What a TPU's kernel does not take, and the pools with what it does in them."""
    for target, new in low_rank._asdict().items():
        pool = getattr(pools, f"low_rank_{target}")
        if new is not None and page_update.takes(pool):
            update = per_shard(_update_low_rank_pages, (WHOLE, WHOLE, WHOLE), WHOLE)
            pools = pools._replace(**{f"low_rank_{target}": update(pool, new, table)})
            low_rank = low_rank._replace(**{target: None})
    return low_rank, pools


def _update_low_rank_pages(pool, low_rank, table: PageTable):
    """Every page that T tokens can lie in, with the tokens where they belong in it and the range of slots they take."""
    page_size, num_tokens = pool.shape[2], low_rank.shape[2]
    touched = -(-num_tokens // page_size) + (num_tokens > 1)
    column = table.q_starts[:, None] // page_size + jnp.arange(touched, dtype=jnp.int32)  # [B, touched]
    position = column[..., None] * page_size + jnp.arange(page_size, dtype=jnp.int32)  # [B, touched, p]
    token = jnp.clip(position - table.q_starts[:, None, None], 0, num_tokens - 1)
    written_to = jnp.minimum(table.kv_lens, table.q_starts + num_tokens)

    def pages_of(page_indices, write_from, low_rank):
        """(page ids, first slot, end, contents) of one table."""
        page = jnp.take_along_axis(page_indices, jnp.clip(column, 0, page_indices.shape[1] - 1), axis=1)
        slots = [jnp.clip(at[:, None] - column * page_size, 0, page_size)
                 for at in (jnp.maximum(table.q_starts, write_from), written_to)]  # fmt: skip
        contents = jnp.take_along_axis(low_rank[:, None], token[..., None], axis=2)  # [B, touched, p, r]
        return page, *slots, jnp.einsum("bnpr->bnrp", contents)

    parts = jax.vmap(pages_of)(table.low_rank, table.low_rank_write_from, low_rank.astype(pool.dtype))
    page, first, end, contents = (part.reshape(-1, *part.shape[3:]) for part in parts)
    return page_update.update_pages(pool, page, first, end, contents)


def attend(
    q: Float[Array, "B T N H"],
    cache: LayerCache,
    pairs: dict[str, LoraPair],
    table: PageTable,
    adapter_ids: Int[Array, " B"],
    inv_freq: Float[np.ndarray, " Hh"],
    implementation: str | None,
) -> Float[Array, "B T N H"]:
    """Attention of the new tokens over everything up to them, each row with its adapter's B for V and K.

    Every device attends with its own heads; low-rank pages are the same on all of them.
    """
    if not table.num_low_rank_tables:

        def attend_merged(q, kv, table: attention.PageTable):
            return attention.lora_attention(q, kv, None, None, table, None, implementation=implementation)

        return per_shard(attend_merged, (HEADS, POOL, WHOLE), HEADS)(q, cache.kv, table.read_table())

    def attend_split(q, kv, low_rank: attention.LowRank, lora_b: attention.LoraB, *rest):
        num_kv_heads, head_dim = kv.shape[1], kv.shape[3] // 2
        by_head = [None if b is None else b.reshape(*b.shape[:2], num_kv_heads, head_dim) for b in lora_b]
        table, adapter_ids, inv_freq = rest
        return attention.lora_attention(
            q, kv, low_rank, attention.LoraB(*by_head), table, adapter_ids,
            rope_inv_freq=inv_freq, implementation=implementation,
        )  # fmt: skip

    low_rank = attention.LowRank(v=cache.low_rank_v, k=cache.low_rank_k)
    lora_b = attention.LoraB(*(
        None if pool is None else pairs[target].lora_b for target, pool in zip(low_rank._fields, low_rank, strict=True)
    ))  # fmt: skip
    inv_freq = None if cache.low_rank_k is None else jnp.asarray(inv_freq)
    in_specs = (HEADS, POOL, WHOLE, HEADS, WHOLE, WHOLE, WHOLE)
    return per_shard(attend_split, in_specs, HEADS)(
        q, cache.kv, low_rank, lora_b, table.read_table(), adapter_ids, inv_freq
    )
