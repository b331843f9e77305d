"""The sharing modes: one forward pass, one kernel, different keys.

A mode decides what is written (adapters merged into K and V, or split off) and under which key a page is found
again. LRAgent (arXiv 2602.01053) names `none`, `full`, `base` and `base_lr`; `pre_lr` is PReCache's PreLRShared
(arXiv 2609.34054).
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from lragent_jax.models.errors import InputError

SharingMode = Literal["none", "full", "base", "base_lr", "pre_lr"]
SHARING_MODES: tuple[SharingMode, ...] = ("none", "full", "base", "base_lr", "pre_lr")


@dataclasses.dataclass(frozen=True)
class AdapterKeys:
    """What of an adapter decides whose pages it may read. Both are None for the base model.

    `content`: hash of the whole adapter, never its name. `a_group`: hash of its A for the cached targets; None if it
    adapts neither k nor v.
    """

    content: str | None
    a_group: str | None


BASE_MODEL = AdapterKeys(content=None, a_group=None)


@dataclasses.dataclass(frozen=True)
class PageKey:
    """Names a page run of a trajectory. `owner` is None where everybody shares it."""

    pool: Literal["base", "low_rank"]
    owner: str | None


@dataclasses.dataclass(frozen=True)
class Sharing:
    """The rules of one mode, as pure functions of adapter keys."""

    mode: SharingMode

    def __post_init__(self):
        if self.mode not in SHARING_MODES:
            raise InputError(f"unknown sharing mode {self.mode!r}; there are: {', '.join(SHARING_MODES)}")

    @property
    def merged(self) -> bool:
        """Whether adapters are part of the K and V that are cached; no low-rank cache exists then."""
        return self.mode in ("none", "full")

    @property
    def skips_base(self) -> bool:
        """Whether an agent may run tokens whose base pages exist, to write low-rank pages alone."""
        return not self.merged

    @property
    def writes_other_groups(self) -> bool:
        """Whether a token may fill low-rank pages of more than one A-group."""
        return self.mode in ("base_lr", "pre_lr")

    def base_key(self, adapter: AdapterKeys) -> PageKey:
        return PageKey("base", adapter.content if self.mode == "none" else None)

    def low_rank_key(self, adapter: AdapterKeys) -> PageKey | None:
        """The low-rank pages this adapter reads; None if it reads none."""
        if self.merged or adapter.a_group is None:
            return None
        return PageKey("low_rank", adapter.content if self.mode == "base" else adapter.a_group)

    def written_low_rank_keys(self, adapter: AdapterKeys, loaded: Sequence[AdapterKeys]) -> list[PageKey]:
        """The low-rank pages that a token run by this adapter fills, its own first.

        In `pre_lr` those of every loaded A-group. In `base_lr` its own, and those of every group if it belongs to
        none (the base model, an adapter on neither k nor v). In `base` its own alone: pages belong to one adapter,
        which reads every token itself.
        """
        own = self.low_rank_key(adapter)
        keys = [] if own is None else [own]
        if self.mode == "pre_lr" or (self.mode == "base_lr" and own is None):
            keys += [key for key in map(self.low_rank_key, loaded) if key is not None]
        return list(dict.fromkeys(keys))
