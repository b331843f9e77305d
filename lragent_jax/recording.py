"""A recorded trajectory as token ids: what is context, and what some agent wrote."""

import dataclasses
import itertools
from typing import Literal, get_args

from lragent_jax.react import ReactTrajectory, Role
from lragent_jax.tokenizer import Tokenizer

OutputKind = Literal["thought", "tool", "argument", "verdict"]
OUTPUT_KINDS: tuple[OutputKind, ...] = get_args(OutputKind)


@dataclasses.dataclass(frozen=True)
class Part:
    """Token ids of one segment, never empty; `role` is None for context."""

    ids: list[int]
    role: Role | None


@dataclasses.dataclass(frozen=True)
class Recording:
    """The parts of one trajectory, an output last. `note` says if some were left out."""

    parts: tuple[Part, ...]
    note: str = ""

    @classmethod
    def tokenize(cls, trajectory: ReactTrajectory, tokenizer: Tokenizer) -> "Recording":
        """Every segment on its own, as an engine meets them: BOS on the first piece alone."""
        parts: list[Part] = []
        for segment in trajectory.segments():
            ids = tokenizer.encode(segment.text, add_bos=not parts)
            if ids:
                parts.append(Part(ids, segment.role))
        return cls(tuple(parts))

    @property
    def num_tokens(self) -> int:
        return sum(len(part.ids) for part in self.parts)

    @property
    def num_outputs(self) -> int:
        return sum(part.role is not None for part in self.parts)

    @property
    def num_output_tokens(self) -> int:
        return sum(len(part.ids) for part in self.parts if part.role is not None)

    def output_kinds(self) -> list[OutputKind]:
        """What each output is. What plan writes is a tool's name where action goes on behind it."""
        kinds: list[OutputKind] = []
        for part, behind in itertools.zip_longest(self.parts, self.parts[1:]):
            if part.role == "plan":
                kinds.append("tool" if behind is not None and behind.role == "action" else "thought")
            elif part.role is not None:
                kinds.append("argument" if part.role == "action" else "verdict")
        return kinds

    def cut(self, max_tokens: int) -> "Recording":
        """The longest beginning of at most `max_tokens` that ends with an output; it may be empty."""
        if self.num_tokens <= max_tokens:
            return self
        kept, length = 0, 0
        for i, part in enumerate(self.parts, start=1):
            length += len(part.ids)
            if part.role is not None and length <= max_tokens:
                kept = i
        beginning = Recording(self.parts[:kept])
        note = (
            f"cut from {self.num_tokens} to {beginning.num_tokens} tokens (max_tokens is {max_tokens}), "
            f"{beginning.num_outputs} of its {self.num_outputs} outputs are left"
        )
        return Recording(beginning.parts, note)
