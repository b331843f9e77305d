"""What agents can do in a world: Search and Lookup."""

from collections.abc import Sequence
from typing import Literal

from lragent_jax.world.entity import Entity, normalised
from lragent_jax.world.padding import Surroundings
from lragent_jax.world.relations import BY_NAME, KINDS
from lragent_jax.world.world import World

Tool = Literal["Search", "Lookup", "Finish"]
TOOLS: tuple[Tool, ...] = ("Search", "Lookup", "Finish")


class Tools:
    """The tools of one episode: they remember what was found last. `results[i]` surround the i-th find."""

    def __init__(self, there: World, results: Sequence[Surroundings] = ()):
        self._world, self._results = there, results
        self._num_found = 0
        self._last: Entity | None = None

    def search(self, argument: str) -> str:
        """The paragraph on an entity, found by `kind: name`, among others as the episode has it."""
        found = self._world.find(argument)
        if found is None:
            return f"Could not find {one_line(argument)}. Similar: {', '.join(self._similar(argument))}."
        around = self._results[self._num_found] if self._num_found < len(self._results) else Surroundings()
        self._num_found += 1
        self._last = found
        return "\n".join((*around.before, self._world.document(found.key).shown, *around.after))

    def lookup(self, argument: str) -> str:
        """The sentence about a relation in the paragraph that Search found last, shown or not."""
        if self._last is None:
            return "There is nothing to look into yet. Search first."
        sentence = self._world.document(self._last.key).by_relation.get(normalised(argument))
        return sentence or f"There is nothing about {one_line(argument)} there."

    def call(self, tool: Tool, argument: str) -> str:
        """What Search or Lookup has to say."""
        return self.search(argument) if tool == "Search" else self.lookup(argument)

    def _similar(self, argument: str) -> list[str]:
        wanted = _letter_pairs(argument.rsplit(":", 1)[-1])

        def distance(name: str) -> float:
            pairs = _letter_pairs(name)
            return -len(wanted & pairs) / len(wanted | pairs)

        return sorted((entity.name for entity in self._world.entities.values()), key=distance)[:3]


def _letter_pairs(text: str) -> set[str]:
    """What a text shares with one that it is a misspelling of."""
    text = f" {normalised(text)} "
    return {text[i : i + 2] for i in range(len(text) - 1)}


def is_call(tool: Tool, argument: str) -> bool:
    """Whether an argument has the form that its tool takes: `kind: name`, or a relation for Lookup."""
    if tool == "Lookup":
        return normalised(argument) in BY_NAME
    kind, colon, name = argument.partition(":")
    return bool(colon) and normalised(kind) in KINDS and bool(name.strip())


def one_line(text: str) -> str:
    """An argument as an observation quotes it: short, and on one line."""
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}…"


_LONGEST_QUOTE = 60
