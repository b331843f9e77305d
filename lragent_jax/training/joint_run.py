"""The training of all agents at once, on trajectories that they run by turns as they do on a shared cache."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lragent_jax.training.agent_run import AgentPlan, AgentResult, AgentRun, training_steps
from lragent_jax.training.examples import TokenSequence
from lragent_jax.training.lora import Lora
from lragent_jax.training.options import TrainingOptions
from lragent_jax.training.packing import Packer, Step
from lragent_jax.training.trajectories import alone

_NAME = "joint"
"""What progress and messages call it."""


class JointPacker(Packer):
    """Packs trajectories, in every epoch a share of them as one agent alone runs them, drawn for each."""

    def __init__(self, sequences: Sequence[TokenSequence], num_agents: int, separate_share: float, **sizes: int):
        views, self._alone = list(sequences), []
        for sequence in sequences:
            separate = [one for agent in range(num_agents) if (one := alone(sequence, agent)) is not None]
            self._alone.append(range(len(views), len(views) + len(separate)))
            views += separate
        self._share = separate_share
        super().__init__(views, **sizes)

    def _drawn(self, rng: np.random.Generator | None) -> list[int]:
        if rng is None:
            return list(range(len(self._alone)))
        is_separate, which = rng.random(len(self._alone)) < self._share, rng.random(len(self._alone))
        return [
            views[int(number * len(views))] if separate else index
            for index, (views, separate, number) in enumerate(zip(self._alone, is_separate, which, strict=True))
        ]


@dataclasses.dataclass(frozen=True)
class JointPlan(AgentPlan):
    """Everything that will be run for `agents`. Validation looks at trajectories as all run them, and as each does."""

    agents: Sequence[str]
    separate_packer: Packer | None
    separate_steps: Sequence[Step]

    @classmethod
    def of_trajectories(
        cls,
        agents: Sequence[str],
        sequences: Sequence[TokenSequence],
        validation: Sequence[TokenSequence],
        options: TrainingOptions,
        row_multiple: int,
    ) -> "JointPlan":
        assert options.separate_share is not None
        sizes = {
            "sequence_length": options.sequence_length,
            "tokens_per_step": options.tokens_per_step,
            "row_multiple": row_multiple,
        }
        packer = JointPacker(sequences, len(agents), options.separate_share, **sizes)
        separate = [one for agent in range(len(agents)) for each in validation if (one := alone(each, agent))]
        shared_packer, separate_packer = (Packer(some, **sizes) if some else None for some in (validation, separate))
        return cls(
            _NAME, packer, training_steps(packer, options),
            shared_packer, shared_packer.epoch(None) if shared_packer else [],
            agents, separate_packer, separate_packer.epoch(None) if separate_packer else [],
        )  # fmt: skip

    @property
    def looks(self) -> Sequence[Step]:
        return [*self.validation_steps, *self.separate_steps]

    @property
    def packed(self) -> list[tuple[Packer, Sequence[Step]]]:
        separate = [] if self.separate_packer is None else [(self.separate_packer, self.separate_steps)]
        return [*super().packed, *separate]


@dataclasses.dataclass(frozen=True)
class JointResult(AgentResult):
    """What came of one agent. Steps, tokens, time and `train_loss` are those of all of them.

    `validation_loss` and `validation_accuracy` are of its outputs where the cache is shared (mode `base_lr`), and
    `separate_loss` and `separate_accuracy` where it has run every token itself (mode `none`).
    """

    separate_loss: float | None
    separate_accuracy: float | None


class JointRun(AgentRun):
    """Trains all agents of a `JointPlan`."""

    _plan: JointPlan

    def run_jointly(self, lora: Lora) -> tuple[Lora, dict[str, JointResult]]:
        """Trains `lora`, the matrices of all agents; raises `LRAgentError` where a loss is no number."""
        nothing: dict[str, Any] = dict.fromkeys(
            ("validation_loss", "validation_accuracy", "separate_loss", "separate_accuracy")
        )
        self._by_agent: dict[str, dict[str, Any]] = dict.fromkeys(self._plan.agents, nothing)
        lora = self._train(lora, jax.tree.map(lambda _: np.bool_(True), lora))
        figures = self._figures()
        return lora, {agent: JointResult(**figures, **found) for agent, found in self._by_agent.items()}

    def _validate(self, number: int, lora: Lora) -> None:
        plan = self._plan
        if plan.validation_packer is None or plan.separate_packer is None:
            return
        shared = self._means(plan.validation_packer, plan.validation_steps, lora, len(plan.agents))
        separate = self._means(plan.separate_packer, plan.separate_steps, lora, len(plan.agents))
        for agent, (loss, accuracy), (separate_loss, separate_accuracy) in zip(
            plan.agents, shared, separate, strict=True
        ):
            self._by_agent[agent] = {
                "validation_loss": loss, "validation_accuracy": accuracy,
                "separate_loss": separate_loss, "separate_accuracy": separate_accuracy,
            }  # fmt: skip
        self._curve.add(step=number, validation=self._by_agent)
