"""The adapters of one layer: what each row's adds to a projection, and the X A that it leaves in the cache."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lragent_jax.models.adapter_bank import LoraPair, lora_delta, own_shrink, shrink_by_group
from lragent_jax.models.cache_view import LayerCache, PageTable
from lragent_jax.models.pytree import pytree


@pytree
class LayerAdapters:
    """One layer's share of the adapter bank, and which adapter each row of the batch runs, or each of its tokens.

    Without `adapter_ids` all rows run the only adapter there is.
    """

    pairs: dict[str, LoraPair]
    group_of: dict[str, Int[Array, " A"]]
    adapter_ids: Int[Array, " B"] | Int[Array, "B T"] | None

    @property
    def by_token(self) -> Int[Array, "B T"] | None:
        """Every token's adapter, where tokens of one row are run by several."""
        return None if self.adapter_ids is None or self.adapter_ids.ndim == 1 else self.adapter_ids

    def delta(self, target: str, x: Float[Array, "B T in_width"]) -> Float[Array, "B T out_width"] | float:
        """What the adapters add to projection `target`; plain 0 where none adapts it."""
        if target not in self.pairs:
            return 0.0
        return lora_delta(x, self.pairs[target], self.group_of.get(target), self.adapter_ids)

    def own_low_rank(self, target: str, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T r"], Int[Array, " B"]]:
        """X A of each row's adapter, and whose B it is to be multiplied by; not where adapters go by token."""
        groups, ids = self.group_of.get(target), self.adapter_ids
        low_rank = own_shrink(x, self.pairs[target], groups, ids)
        return low_rank, jnp.zeros(x.shape[0], jnp.int32) if groups is None or ids is None else ids

    def low_rank(self, target: str, x: Float[Array, "B T D"], group_ids: Int[Array, "g B"]) -> Float[Array, "g B T r"]:
        """X A of every A-group a row writes."""
        lora_a = self.pairs[target].lora_a
        return jax.vmap(lambda groups: shrink_by_group(x, lora_a, groups))(group_ids)

    def shrinks(self, written: dict[str, Int[Array, "g B"]]) -> dict[str, tuple[Array, Int[Array, "_ B"]]]:
        """What is multiplied by A of each row's own choice: lora_a and the groups, of q and of what is `written`."""
        groups = dict(written)
        if "q" in self.pairs and "q" in self.group_of and self.adapter_ids is not None and self.by_token is None:
            groups["q"] = self.group_of["q"][self.adapter_ids][None]
        return {target: (self.pairs[target].lora_a, ids) for target, ids in groups.items()}


def written_groups(cache: LayerCache, adapters: LayerAdapters, table: PageTable) -> dict[str, Int[Array, "g B"]]:
    """The A-groups whose X A is written, by target."""
    pools = {"v": cache.low_rank_v, "k": cache.low_rank_k}
    return {target: table.group_ids for target, pool in pools.items() if pool is not None and table.num_low_rank_tables}
