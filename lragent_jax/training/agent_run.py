"""One agent's training: steps, looks at validation examples, and states on disk."""

import collections
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lragent_jax.models.errors import LRAgentError
from lragent_jax.training.checkpoints import TrainingCheckpoints
from lragent_jax.training.examples import TokenSequence, sequences_hash
from lragent_jax.training.lora import Lora, Trained
from lragent_jax.training.loss_curve import LossCurve, read_losses
from lragent_jax.training.options import TrainingOptions
from lragent_jax.training.packing import Batch, BatchShape, Packer, Step, slot_agents
from lragent_jax.training.programs import Programs, StepMetrics, TrainState, learning_rate

Progress = Callable[[int, int, str], None]
"""(steps done, steps in all, what is going on)"""

_STEPS_IN_FLIGHT = 8
"""Steps that the device may have waiting before the host looks at their losses: enough that it never waits itself."""

_DEFAULT_EPOCHS = 3


def training_steps(packer: Packer, options: TrainingOptions) -> list[Step]:
    """As many as the options ask for, in steps or in epochs."""
    if options.steps is not None:
        return list(itertools.islice(packer.steps(options.seed), options.steps))
    epochs = range(options.epochs or _DEFAULT_EPOCHS)
    return [step for epoch in epochs for step in packer.epoch([options.seed, epoch])]


@dataclasses.dataclass(frozen=True)
class AgentPlan:
    """Everything that will be run for an agent, known before the first step."""

    agent: str
    packer: Packer
    steps: Sequence[Step]
    validation_packer: Packer | None
    validation_steps: Sequence[Step]

    @classmethod
    def make(
        cls,
        agent: str,
        sequences: Sequence[TokenSequence],
        validation: Sequence[TokenSequence],
        options: TrainingOptions,
        row_multiple: int,
    ) -> "AgentPlan":
        sizes = {
            "sequence_length": options.sequence_length,
            "tokens_per_step": options.tokens_per_step,
            "row_multiple": row_multiple,
        }
        packer = Packer(sequences, **sizes)
        steps = training_steps(packer, options)
        validation_packer = Packer(validation, **sizes) if validation else None
        validation_steps = validation_packer.epoch(None) if validation_packer else []
        return cls(agent, packer, steps, validation_packer, validation_steps)

    @property
    def looks(self) -> Sequence[Step]:
        """All steps of a validation."""
        return self.validation_steps

    @property
    def packed(self) -> list[tuple[Packer, Sequence[Step]]]:
        both = [(self.packer, self.steps), (self.validation_packer, self.validation_steps)]
        return [(packer, steps) for packer, steps in both if packer is not None]

    def data_hash(self) -> str:
        """Of the token ids and of which of them have a loss, in training and validation."""
        return sequences_hash([sequence for packer, _ in self.packed for sequence in packer.sequences])

    def num_tokens(self) -> int:
        """Tokens that training runs, without padding."""
        return sum(map(self.packer.num_tokens, self.steps))

    def padding_share(self, shapes: Mapping[int, BatchShape]) -> float:
        """The part of all slots that holds nothing."""
        slots = sum(shapes[step.length].rows * step.length for step in self.steps)
        return 1 - self.num_tokens() / slots


@dataclasses.dataclass(frozen=True)
class AgentResult:
    """What came of it. Losses are nats per output token; `train_loss` is the mean of the last tenth of the steps.

    `seconds` and `tokens_per_second` are those of the steps since it was last cut off.
    """

    steps: int
    tokens: int
    padding_share: float
    seconds: float
    tokens_per_second: float
    train_loss: float
    validation_loss: float | None
    validation_accuracy: float | None


class AgentRun:
    """Trains one agent under a plan, from where an earlier run of the same plan was cut off."""

    def __init__(
        self,
        programs: Programs,
        plan: AgentPlan,
        shapes: Mapping[int, BatchShape],
        options: TrainingOptions,
        *,
        losses: Path,
        checkpoints: TrainingCheckpoints,
        progress: Progress,
    ):
        self._programs, self._plan, self._shapes, self._options = programs, plan, shapes, options
        self._losses, self._checkpoints, self._progress = losses, checkpoints, progress
        self._pending: collections.deque[tuple[int, StepMetrics]] = collections.deque()
        self._clock = _Clock()
        self._validated: dict[str, Any] = {"validation_loss": None, "validation_accuracy": None}

    def run(self, lora: Lora, trained: Trained) -> tuple[Lora, AgentResult]:
        """Trains `lora`, as far as `trained` says; raises `LRAgentError` where a loss is no number."""
        return self._train(lora, trained), AgentResult(**self._figures(), **self._validated)

    def _train(self, lora: Lora, trained: Trained) -> Lora:
        state, total = self._programs.initial_state(lora), len(self._plan.steps)
        done, state = self._checkpoints.restore(state) or (0, state)
        self._curve = LossCurve(self._losses, done)
        self._compile(state, trained)
        if not done:
            self._validate(0, state.lora)
        self._programs.wait()
        for number, step in enumerate(self._plan.steps[done:], start=done + 1):
            shape = self._shapes[step.length]
            batch = self._plan.packer.batch(step, shape)
            self._clock.start()
            state, metrics = self._programs.step(shape, trained, state, batch, self._rate(number))
            self._pending.append((number, metrics))
            self._fetch(leave=_STEPS_IN_FLIGHT)
            if number == total or number % self._validate_every == 0:
                self._fetch(leave=0)
                self._validate(number, state.lora)
            if number < total and number % self._options.checkpoint_every == 0:
                self._fetch(leave=0)
                self._clock.stop()
                self._checkpoints.save(number, state)
        return state.lora

    def _compile(self, state: TrainState, trained: Trained) -> None:
        """Begins with what takes longest."""
        of_steps, of_validation = (
            [self._shapes[length] for length in sorted({step.length for step in steps}, reverse=True)]
            for steps in (self._plan.steps, self._plan.looks)
        )
        lengths = ", ".join(str(shape.length) for shape in of_steps)
        self._progress(0, 0, f"{self._plan.agent}: compiling for rows of {lengths} tokens")
        self._programs.compile(state, trained, of_steps, of_validation)

    def _rate(self, number: int) -> float:
        return learning_rate(self._options, number - 1, len(self._plan.steps))

    @property
    def _validate_every(self) -> int:
        return self._options.validate_every or max(1, len(self._plan.steps) // 10)

    def _fetch(self, leave: int) -> None:
        """Waits for the losses of all steps but the last few, and notes them."""
        while len(self._pending) > leave:
            number, metrics = self._pending.popleft()
            loss, norm = float(metrics.loss), float(metrics.gradient_norm)
            if not math.isfinite(loss + norm):
                raise LRAgentError(
                    f"the loss of {self._plan.agent} is {loss} at step {number}, its gradient's norm {norm}; a lower "
                    "learning rate, or bfloat16 or float32 in place of float16, keeps them finite"
                )
            self._clock.count(self._plan.packer.num_tokens(self._plan.steps[number - 1]))
            self._curve.add(
                step=number, loss=loss, learning_rate=self._rate(number), gradient_norm=norm,
                tokens_per_second=round(self._clock.tokens_per_second),
            )  # fmt: skip
            self._progress(
                number, len(self._plan.steps),
                f"{self._plan.agent}: loss {loss:.4f}, {self._clock.tokens_per_second:,.0f} tokens/s",
            )  # fmt: skip

    def _validate(self, number: int, lora: Lora) -> None:
        """Looks at the validation examples, if there are any, and notes what it finds."""
        if self._plan.validation_packer is None:
            return
        [(loss, accuracy)] = self._means(self._plan.validation_packer, self._plan.validation_steps, lora)
        self._validated = {"validation_loss": loss, "validation_accuracy": accuracy}
        self._curve.add(step=number, **self._validated)

    def _means(
        self, packer: Packer, steps: Sequence[Step], lora: Lora, num_agents: int = 1
    ) -> list[tuple[float, float] | tuple[None, None]]:
        """(mean loss, share of output tokens that score best), of each agent's outputs; None where it has none."""
        self._clock.stop()
        self._progress(0, 0, f"{self._plan.agent}: validation")
        sums, counts = np.zeros((2, num_agents)), np.zeros(num_agents)
        running: collections.deque[tuple[Any, Batch]] = collections.deque()

        def fetch(leave: int) -> None:
            nonlocal sums, counts
            while len(running) > leave:
                of_slots, batch = running.popleft()
                agents = slot_agents(batch).reshape(-1)
                for totals, weights in ((sums[0], of_slots[0]), (sums[1], of_slots[1]), (counts, batch.weights)):
                    totals += np.bincount(agents, np.asarray(weights, np.float64).reshape(-1), num_agents)

        for step in steps:
            shape = self._shapes[step.length]
            batch = packer.batch(step, shape)
            running.append((self._programs.evaluation(shape, lora, batch), batch))
            fetch(leave=_STEPS_IN_FLIGHT)
        fetch(leave=0)
        return [
            (loss / count, hits / count) if count else (None, None)
            for loss, hits, count in zip(*sums.tolist(), counts.tolist(), strict=True)
        ]

    def _figures(self) -> dict[str, Any]:
        """What a result says of the steps."""
        losses = [line["loss"] for line in read_losses(self._losses) if "loss" in line]  # those before a kill, too
        return {
            "steps": len(self._plan.steps),
            "tokens": self._plan.num_tokens(),
            "padding_share": round(self._plan.padding_share(self._shapes), 4),
            "seconds": round(self._clock.seconds, 3),
            "tokens_per_second": round(self._clock.tokens_per_second_in_all),
            "train_loss": float(np.mean(losses[-max(1, len(self._plan.steps) // 10) :])),
        }


class _Clock:
    """Tokens per second while steps are running; compiling, validating and saving do not count."""

    def __init__(self):
        self.seconds, self._tokens = 0.0, 0
        self._started: float | None = None
        self._recent: collections.deque[tuple[float, int]] = collections.deque(maxlen=32)

    def start(self) -> None:
        if self._started is None:
            self._started = time.perf_counter()

    def count(self, tokens: int) -> None:
        """Tokens of a step that has ended."""
        self._tokens += tokens
        self._advance()
        self._recent.append((self.seconds, self._tokens))

    def stop(self) -> None:
        self._advance()
        self._started = None

    @property
    def tokens_per_second(self) -> float:
        """Over the last steps."""
        (before, tokens_before), (now, tokens) = self._recent[0], self._recent[-1]
        return (tokens - tokens_before) / (now - before) if now > before else self.tokens_per_second_in_all

    @property
    def tokens_per_second_in_all(self) -> float:
        return self._tokens / self.seconds if self.seconds else 0.0

    def _advance(self) -> None:
        if self._started is not None:
            now = time.perf_counter()
            self.seconds += now - self._started
            self._started = now
