"""Pages and bytes that a mode needs for contexts read by several agents, known before anything is allocated."""

import dataclasses
from collections.abc import Sequence

import jax

from lragent_jax.cache_cost import cache_bytes_per_token
from lragent_jax.models.adapter import Adapter
from lragent_jax.models.config import LlamaConfig
from lragent_jax.sharing import Sharing, SharingMode


def num_copies(mode: SharingMode, num_agents: int) -> int:
    """How often the base pages of a context exist when all agents have read it."""
    return num_agents if mode == "none" else 1


def pool_options(modes: Sequence[SharingMode], num_agents: int, num_pages: int) -> dict[SharingMode, dict[str, int]]:
    """`num_pages` and `num_low_rank_pages` for contexts of so many pages, read by all agents, in each of the modes.

    Modes that run the same programs get pools of the same size, so that these are compiled once, unless it would
    cost base pages: `none` and `full` where both are asked for, and all modes with a low-rank cache.
    """
    options = {}
    for mode in modes:
        copies = num_copies("none" if mode == "full" and "none" in modes else mode, num_agents)
        options[mode] = {"num_pages": copies * num_pages}
        if not Sharing(mode).merged:
            options[mode]["num_low_rank_pages"] = num_agents * num_pages
    return options


@dataclasses.dataclass(frozen=True)
class PageBudget:
    """Bytes of one model's pages. `rank` is that of the cached v_proj adapters."""

    config: LlamaConfig
    rank: int
    itemsize: int
    page_size: int

    def pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def pool_bytes(self, num_pages: int, num_low_rank_pages: int = 0) -> int:
        """What an engine with these options allocates for its pools."""
        base = num_pages * self.config.base_cache_bytes_per_token(self.itemsize)
        low_rank = num_low_rank_pages * self.config.low_rank_cache_bytes_per_token(self.rank, self.itemsize)
        return self.page_size * (base + low_rank)

    def step_bytes(self, num_tokens: float) -> float:
        """What a decode step reads of that many different tokens, r numbers of low-rank cache each."""
        per_token = self.config.base_cache_bytes_per_token(self.itemsize)
        return num_tokens * (per_token + self.config.low_rank_cache_bytes_per_token(self.rank, self.itemsize))

    def activation_bytes(self, chunk: int, context: int) -> int:
        """About what a prefill of `chunk` tokens holds beside weights and pools, with half a gigabyte to spare.

        Of `context` tokens in all of its rows together: one layer's keys and values of theirs may come expanded.
        """
        c = self.config
        expanded = context * c.base_cache_bytes_per_token(self.itemsize) // c.num_layers
        return chunk * (3 * c.mlp_width + 8 * c.width) * self.itemsize + 4 * c.vocab_size * 64 + expanded + 2**29


def step_weight_bytes(config: LlamaConfig, weight_bytes: int, itemsize: int) -> int:
    """What a decode step reads of the weights: all, but of an embedding of its own a few rows."""
    return weight_bytes - (0 if config.tied_embeddings else config.vocab_size * config.width * itemsize)


def num_fitting(
    config: LlamaConfig,
    adapters: Sequence[Adapter],
    mode: SharingMode,
    *,
    cache_bytes: int,
    itemsize: int,
    page_size: int,
    prefix: int,
    context: int,
) -> int:
    """Trajectories of `context` tokens of which `prefix` are common, all read by all agents, that fit into the bytes.

    Of pages that both hold: whole pages of the prefix exist once in each copy. Nothing has to be evicted for them.
    """
    page_bytes = page_size * cache_bytes_per_token(config, adapters, mode, itemsize)
    common = prefix // page_size
    own = -(-context // page_size) - common
    return max(0, (cache_bytes // page_bytes - common) // own)


def device_bytes() -> int | None:
    """What JAX may allocate on its first device; None where it does not say."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else int(stats["bytes_limit"])
