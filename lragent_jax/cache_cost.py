"""What a token of a shared trajectory costs in cache memory."""

from collections.abc import Sequence

from lragent_jax.models.adapter import Adapter
from lragent_jax.models.adapter_bank import CACHED_TARGETS
from lragent_jax.models.bank_builder import bank_ranks
from lragent_jax.models.config import LlamaConfig
from lragent_jax.sharing import BASE_MODEL, AdapterKeys, Sharing, SharingMode, layers_to_recompute


def cache_bytes_per_token(
    config: LlamaConfig,
    adapters: Sequence[Adapter],
    sharing: SharingMode,
    itemsize: int,
    recompute_layers: Sequence[int] | None = None,
) -> int:
    """Bytes of base and low-rank cache for a token that all the adapters have read; without any, the base model.

    `itemsize` is that of the cache's dtype; `recompute_layers` as in `EngineOptions`. Ranks count as they lie in
    memory: padded to the largest of each target.
    """
    rules = Sharing(sharing)
    readers = [AdapterKeys(adapter.content_hash, adapter.a_group_hash) for adapter in adapters] or [BASE_MODEL]
    base = {rules.base_key(reader) for reader in readers}
    low_rank = {key for reader in readers for key in rules.written_low_rank_keys(reader, readers)}
    rank = sum(rank for target, rank in bank_ranks(adapters).items() if target in CACHED_TARGETS)
    copies = len(base) * config.num_layers  # of one layer's K and V
    if rules.recomputes:
        recomputed = len(layers_to_recompute(recompute_layers, config.num_layers))
        copies += recomputed * (len({rules.recomputed_key(reader) for reader in readers}) - len(base))
    layer_bytes = config.base_cache_bytes_per_token(itemsize) // config.num_layers
    return copies * layer_bytes + len(low_rank) * config.low_rank_cache_bytes_per_token(rank, itemsize)
