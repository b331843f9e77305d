"""The sharing modes: one forward pass, one kernel, different keys.

A mode decides what is written (adapters merged into K and V, or split off) and under which key a page is found
again. LRAgent (arXiv 2602.01053) names `none`, `full`, `base` and `base_lr`; `pre_lr` is PReCache's PreLRShared
(arXiv 2609.34054); `rebase` caches what a pass without adapters leaves; `droidspeak` recomputes some layers per agent
and reuses the others, as DroidSpeak does (arXiv 2411.02820).
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

from lragent_jax.models.errors import InputError

SharingMode = Literal["none", "full", "base", "base_lr", "pre_lr", "rebase", "droidspeak"]
SHARING_MODES: tuple[SharingMode, ...] = ("none", "full", "base", "base_lr", "pre_lr", "rebase", "droidspeak")

PoolName = Literal["base", "recomputed", "low_rank"]
"""K and V of the layers that a mode treats alike; of those that `droidspeak` recomputes; X A."""


@dataclasses.dataclass(frozen=True)
class AdapterKeys:
    """What of an adapter decides whose pages it may read. Both are None for the base model.

    `content`: hash of the whole adapter, never its name. `a_group`: hash of its A for the cached targets; None if it
    adapts neither k nor v.
    """

    content: str | None
    a_group: str | None


BASE_MODEL = AdapterKeys(content=None, a_group=None)


class PageKey(NamedTuple):
    """Names a page run of a trajectory. `owner` is None where everybody shares it, and for the base model's own."""

    pool: PoolName
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
        return self.mode in ("none", "full", "droidspeak")

    @property
    def recomputes(self) -> bool:
        """Whether every adapter keeps K and V of some layers for itself, and reads those of the others."""
        return self.mode == "droidspeak"

    @property
    def writes_without_adapter(self) -> bool:
        """Whether all pages are written by a pass without adapters; agents only read, each token's row beside it."""
        return self.mode == "rebase"

    @property
    def skips_base(self) -> bool:
        """Whether an agent may run tokens whose base pages exist, to write low-rank pages alone."""
        return not self.merged

    @property
    def writes_other_groups(self) -> bool:
        """Whether a token may fill low-rank pages of more than one A-group."""
        return self.mode in ("base_lr", "pre_lr", "rebase")

    @property
    def keys_rest_on_each_other(self) -> bool:
        """Whether what is written under one key may have been shaped by what its writer read under another."""
        return self.mode != "none"

    def base_key(self, adapter: AdapterKeys) -> PageKey:
        return PageKey("base", adapter.content if self.mode == "none" else None)

    def recomputed_key(self, adapter: AdapterKeys) -> PageKey | None:
        """The pages of the recomputed layers that this adapter reads; None if the mode recomputes none."""
        return PageKey("recomputed", adapter.content) if self.recomputes else None

    def low_rank_key(self, adapter: AdapterKeys) -> PageKey | None:
        """The low-rank pages this adapter reads; None if it reads none."""
        if self.merged or adapter.a_group is None:
            return None
        return PageKey("low_rank", adapter.content if self.mode == "base" else adapter.a_group)

    def written_low_rank_keys(self, adapter: AdapterKeys, loaded: Sequence[AdapterKeys]) -> list[PageKey]:
        """The low-rank pages that a token run by this adapter fills, its own first.

        In `pre_lr` and `rebase` those of every loaded A-group. In `base_lr` its own, and those of every group if it
        belongs to none (the base model, an adapter on neither k nor v). In `base` its own alone: pages belong to one
        adapter, which reads every token itself.
        """
        own = self.low_rank_key(adapter)
        keys = [] if own is None else [own]
        if self.mode in ("pre_lr", "rebase") or (self.mode == "base_lr" and own is None):
            keys += [key for key in map(self.low_rank_key, loaded) if key is not None]
        return list(dict.fromkeys(keys))


def layers_to_recompute(chosen: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    """The layers whose K and V `droidspeak` keeps per adapter, in order: those chosen, by default the first third.

    K and V of the first layers differ least between agents, and whatever is wrong there is carried through all the
    rest: a choice to begin with, which `lragent_jax.sensitivity.critical_layers` replaces by a measured one. Raises
    `InputError` for a layer that the model does not have.
    """
    if chosen is None:
        return tuple(range(max(1, round(num_layers / 3))))
    if outside := [layer for layer in chosen if not 0 <= layer < num_layers]:
        raise InputError(f"recompute_layers names layer {outside[0]}; the model has layers 0 to {num_layers - 1}")
    return tuple(sorted(set(chosen)))
