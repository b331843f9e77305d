"""Paragraphs that nobody asked for: what brings a trajectory to a length."""

import dataclasses
from collections.abc import Callable

from lragent_jax.models.errors import InputError
from lragent_jax.world.question import Question

CountTokens = Callable[[str], int]
"""The number of tokens of a text on its own."""


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """Paragraphs in front of and behind the one that a Search was for."""

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Padding:
    """`notes` stand in front of the question; `results[i]` surround what the i-th successful Search finds."""

    notes: tuple[str, ...] = ()
    results: tuple[Surroundings, ...] = ()


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where paragraphs go: `notes_share` of them in front of the question, the others into what Search returns, and of
    those `before_share` in front of the paragraph that was asked for."""

    notes_share: float = 0.5
    before_share: float = 0.25

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not 0 <= getattr(self, field.name) <= 1:
                raise InputError(f"{field.name} must be a share in [0, 1], not {getattr(self, field.name)!r}")


NO_PADDING = Padding()
DEFAULT_LAYOUT = Layout()


def pad(
    question: Question,
    num_tokens: int,
    count_tokens: CountTokens,
    layout: Layout = DEFAULT_LAYOUT,
    num_results: int | None = None,
) -> Padding:
    """Up to `num_tokens` tokens of paragraphs about entities that the question does not lead past.

    `num_results`: the finds of the episode, one for every hop unless it stops early. Falls short by less than one
    paragraph, unless all of the world is in already.
    """
    rng = question.rng("padding")
    there = question.world
    keys = [key for key in there.entities if key not in question.path]
    rng.shuffle(keys)
    notes: list[str] = []
    results = [([], []) for _ in range(question.num_hops if num_results is None else num_results)]
    misses = 0
    for key in keys:
        text = there.document(key).shown
        cost = count_tokens(f"{text}\n")
        if cost > num_tokens:
            misses += 1
            if misses == _MISSES_IN_A_ROW:
                break
            continue
        misses, num_tokens = 0, num_tokens - cost
        before, after = rng.choice(results)
        in_notes, in_front = rng.random() < layout.notes_share, rng.random() < layout.before_share
        (notes if in_notes else before if in_front else after).append(text)
    return Padding(tuple(notes), tuple(Surroundings(tuple(before), tuple(after)) for before, after in results))


_MISSES_IN_A_ROW = 12  # paragraphs too long for what is left, after which nothing shorter is looked for


class TokenCounter:
    """Counts tokens, each text once: paragraphs come back in many trajectories."""

    def __init__(self, encode: Callable[[str], list[int]], capacity: int = 20_000):
        self._encode, self._capacity = encode, capacity
        self._counts: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        if text not in self._counts:
            if len(self._counts) >= self._capacity:
                self._counts.clear()
            self._counts[text] = len(self._encode(text))
        return self._counts[text]
