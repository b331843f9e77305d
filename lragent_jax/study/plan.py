"""What a study measures, in what order: the most important first."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

from lragent_jax.sharing import SHARING_MODES, SharingMode
from lragent_jax.study.agent_set import AgentSet

StudyPart = Literal["episodes", "kl", "similarity", "recorded"]
STUDY_PARTS: tuple[StudyPart, ...] = ("episodes", "kl", "similarity", "recorded")

STACKED_MODES: tuple[SharingMode, ...] = ("base_lr", "pre_lr", "rebase")
"""Those in which it matters whether adapters are one A-group."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """So many questions or trajectories of so many tokens."""

    tokens: int
    number: int


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured.

    `hops`: one cell for each number of hops; None takes 1, 2 and 3 in turn. `episodes`: of the agents that are looked
    at most closely, in order of importance, `other_episodes`: of the rest. `kl`, `similarity` are teacher-forced on
    evaluation trajectories, `sensitivity` on training ones. Teacher-forced trajectories are run `block` at a time.
    """

    name: str
    hops: tuple[int | None, ...]
    episodes: tuple[Sample, ...]
    other_episodes: tuple[Sample, ...]
    kl: tuple[Sample, ...]
    similarity: Sample
    sensitivity: Sample
    block: int = 10

    def samples(self, agents: AgentSet) -> tuple[Sample, ...]:
        return self.episodes if agents.is_main else self.other_episodes

    @property
    def longest(self) -> int:
        """Tokens of the longest episodes."""
        return max(sample.tokens for sample in (*self.episodes, *self.other_episodes))

    def with_questions(self, number: int) -> "Scale":
        """The same with at most `number` questions in every cell, and as few trajectories."""
        fewer = {
            name: tuple(
                dataclasses.replace(sample, number=min(number, sample.number)) for sample in getattr(self, name)
            )
            for name in ("episodes", "other_episodes", "kl")
        }
        return dataclasses.replace(self, **fewer)


FULL = Scale(
    name="full",
    hops=(1, 2, 3),
    episodes=(Sample(1000, 500), Sample(4000, 200), Sample(7500, 200), Sample(500, 200), Sample(2000, 200)),
    other_episodes=(Sample(1000, 200), Sample(4000, 200)),
    kl=(Sample(1000, 60), Sample(4000, 30)),
    similarity=Sample(1000, 8),
    sensitivity=Sample(1000, 8),
)

REDUCED = Scale(
    name="reduced",
    hops=(None,),
    episodes=(Sample(250, 50), Sample(500, 50)),
    other_episodes=(Sample(250, 50), Sample(500, 50)),
    kl=(Sample(250, 3),),
    similarity=Sample(250, 2),
    sensitivity=Sample(250, 2),
    block=3,
)

REDUCED_MODES: tuple[SharingMode, ...] = ("none", "full", "base", "base_lr")
"""Of a reduced study unless others are asked for: `pre_lr` is `base_lr` again for one A-group, and each of the others
needs programs of its own, which two cores compile for a minute."""


@dataclasses.dataclass(frozen=True)
class EpisodeCell:
    """Questions of one kind, length and number of hops under one mode."""

    agents: AgentSet
    mode: SharingMode
    tokens: int
    hops: int | None
    num_questions: int
    seed: int

    @property
    def key(self) -> str:
        hops = "mixed hops" if self.hops is None else f"{self.hops} hops"
        return f"{self.agents.name} {self.mode} {self.tokens} tokens {hops} {self.num_questions} questions {self.seed}"


def episode_cells(
    sets: Sequence[AgentSet], modes: Sequence[SharingMode], scale: Scale, seed: int
) -> Iterator[EpisodeCell]:
    """Of the main agents all lengths, the most important first; then the other ones, each length in turn."""
    for main in (True, False):
        chosen = [agents for agents in sets if agents.is_main == main]
        for sample in scale.episodes if main else scale.other_episodes:
            for agents in chosen:
                for mode in modes_of(agents, modes):
                    for hops in scale.hops:
                        yield EpisodeCell(agents, mode, sample.tokens, hops, sample.number, seed)


def modes_of(agents: AgentSet, modes: Sequence[SharingMode]) -> list[SharingMode]:
    """Those of `modes` that agents are run under, in the order in which neighbours share programs."""
    allowed = SHARING_MODES if agents.stacked_from is None else STACKED_MODES
    return [mode for mode in SHARING_MODES if mode in modes and mode in allowed]
