"""The agents of one kind: plan, action and reflect, trained in one way."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lragent_jax.models.adapter import Adapter, stack_adapters
from lragent_jax.models.adapter_checkpoint import read_adapter
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import InputError
from lragent_jax.react import ROLES

MAIN_KIND = "embedded"
"""The agents that come with the package, which the study looks at most closely unless it is told of another kind."""

RECORDED_KIND = "recorded"
"""Agents that were trained on recorded text."""

AGAIN, STACKED = "_again", "_stacked"
"""Ends of the names of kinds: another kind's training repeated, and another kind's agents as one A-group."""


@dataclasses.dataclass(frozen=True, eq=False)
class AgentSet:
    """`stacked_from` is the kind that was stacked into one A-group, and whose mode `none` is the reference.

    `main_kind` is the kind that is looked at most closely, be it this one or not.
    """

    name: str
    adapters: Mapping[str, Adapter]
    stacked_from: str | None = None
    main_kind: str = MAIN_KIND

    @property
    def is_main(self) -> bool:
        return self.name == self.main_kind

    @property
    def reference(self) -> str:
        """The kind whose `none` these agents are compared with."""
        return self.stacked_from or self.name

    @property
    def num_groups(self) -> int:
        return len({adapter.a_group_hash for adapter in self.adapters.values()})

    def identity(self) -> dict[str, Any]:
        """What its results belong to, as JSON."""
        return {
            "adapters": {role: adapter.content_hash for role, adapter in self.adapters.items()},
            "ranks": {
                role: {target: adapter.rank(target) for target in adapter.targets}
                for role, adapter in self.adapters.items()
            },
            "num_groups": self.num_groups,
            "reference": self.reference,
        }

    def stacked(self) -> "AgentSet":
        """The same agents as one A-group."""
        adapters = stack_adapters(list(self.adapters.values()))
        stacked = dict(zip(self.adapters, adapters, strict=True))
        return AgentSet(f"{self.name}{STACKED}", stacked, self.name, self.main_kind)


def read_agents(name: str, folder: Path, config: LlamaConfig, main_kind: str = MAIN_KIND) -> AgentSet:
    """The agents in `folder`/plan, action and reflect; `InputError` where one of the folders is missing."""
    if missing := [role for role in ROLES if not (folder / role).is_dir()]:
        raise InputError(f"{folder} lacks the adapter folders of {', '.join(missing)}")
    adapters = {role: read_adapter(folder / role, config) for role in ROLES}
    return AgentSet(name, adapters, main_kind=main_kind)


def repeated(kind: str) -> str:
    """The name of the kind that is this one trained once more."""
    trained = kind.removesuffix(STACKED)
    return f"{trained}{AGAIN}{kind[len(trained) :]}"


def repeated_kinds(kinds: Collection[str]) -> set[str]:
    """Those of `kinds` that are another one of them trained once more."""
    return {repeated(kind) for kind in kinds} & set(kinds)


def with_stacked(sets: Sequence[AgentSet]) -> list[AgentSet]:
    """Every set, and behind those that are several A-groups the same as one."""
    return [each for agents in sets for each in ((agents,) if agents.num_groups == 1 else (agents, agents.stacked()))]
