"""How agents are trained, checked before anything is read."""

import dataclasses
import math
from typing import Any, Literal, get_args

from lragent_jax.models.adapter_bank import CACHED_TARGETS, TARGETS
from lragent_jax.models.errors import InputError
from lragent_jax.models.packed_rows import ATTENTION_IMPLEMENTATIONS
from lragent_jax.models.weights import weight_dtype

Kind = Literal["apart", "shared_a"]
Remat = Literal["blocks", "dots"]


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """What the training of every agent has in common.

    Attributes:
      kind: "apart" trains every agent on its own; "shared_a" trains the first one so, and the others with its A of
        the cached targets (v, and k where adapted), which stays as it is: they form one A-group.
      rank, alpha, targets: of the adapters; an adapter adds (alpha / rank) x A B to each target.
      steps, epochs: how long; steps where both are given, 3 epochs where neither is.
      learning_rate: the highest; it rises over `warmup` steps (a twentieth of all by default) and falls to 0 as a
        cosine does.
      weight_decay, max_grad_norm: of AdamW, and the norm that gradients are clipped to.
      tokens_per_step: slots of a batch, padding included.
      sequence_length: slots of a row. Longer sequences go into rows of twice, four times … as many.
      seed: of the initial weights and of the order of the examples.
      dtype: of the base model. What is trained is f32.
      validate_every: steps between two looks at the validation examples; a tenth of all steps by default.
      checkpoint_every: steps between two states on disk.
      attention: one of `ATTENTION_IMPLEMENTATIONS`; None takes cuDNN's where it can run.
      remat: what the backward pass computes once more: "blocks" everything but the input of every block, "dots" only
        what is neither a product with a weight nor cuDNN's attention. None takes "dots" where the memory is there.
    """

    kind: Kind = "apart"
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q", "v")
    steps: int | None = None
    epochs: int | None = None
    learning_rate: float = 2e-3
    warmup: int | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    tokens_per_step: int = 32_768
    sequence_length: int = 2048
    seed: int = 0
    dtype: str = "bfloat16"
    validate_every: int | None = None
    checkpoint_every: int = 200
    attention: str | None = None
    remat: Remat | None = None

    def __post_init__(self):
        self._one_of("kind", get_args(Kind))
        self._one_of("remat", (None, *get_args(Remat)))
        self._one_of("attention", (None, *ATTENTION_IMPLEMENTATIONS))
        for name in ("rank", "tokens_per_step", "sequence_length", "checkpoint_every"):
            self._integer(name, 1)
        self._integer("seed", 0)
        for name, least in (("steps", 1), ("epochs", 1), ("validate_every", 1), ("warmup", 0)):
            if getattr(self, name) is not None:
                self._integer(name, least)
        for name in ("alpha", "learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value < math.inf:
                raise InputError(f"{name} must be a positive number, not {value!r}")
        if not _is_number(self.weight_decay) or not 0 <= self.weight_decay < math.inf:
            raise InputError(f"weight_decay must be a number that is not negative, not {self.weight_decay!r}")
        if self.sequence_length % 64:
            raise InputError(f"sequence_length must be a multiple of 64, not {self.sequence_length}")
        weight_dtype(self.dtype)
        targets = tuple(self.targets)
        if unknown := [target for target in targets if target not in TARGETS]:
            raise InputError(f"unknown targets: {', '.join(map(str, unknown))}; there are: {', '.join(TARGETS)}")
        if not targets:
            raise InputError(f"targets is empty: name some of {', '.join(TARGETS)}")
        if self.kind == "shared_a" and not set(targets) & set(CACHED_TARGETS):
            raise InputError(f"kind shared_a shares A of {' or '.join(CACHED_TARGETS)}: name one of them in targets")
        object.__setattr__(self, "alpha", int(self.alpha) if float(self.alpha).is_integer() else float(self.alpha))
        object.__setattr__(self, "targets", tuple(target for target in TARGETS if target in targets))

    @property
    def scale(self) -> float:
        """What (x A) B is multiplied by."""
        return self.alpha / self.rank

    def settings(self) -> dict[str, Any]:
        """What decides the result, as JSON: how it is computed and how often it is looked at are left out."""
        beside = ("validate_every", "checkpoint_every", "attention", "remat")
        fields = dataclasses.asdict(self) | {"targets": list(self.targets)}
        return {name: value for name, value in fields.items() if name not in beside}

    def _one_of(self, name: str, allowed: tuple[str | None, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise InputError(f"{name} must be one of {', '.join(filter(None, allowed))}, not {getattr(self, name)!r}")

    def _integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
