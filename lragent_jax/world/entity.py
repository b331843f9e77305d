"""One thing of the world: its name, what it is, and what it is related to."""

import dataclasses
from typing import Literal

from lragent_jax.world.relations import Kind

Pronoun = Literal["she", "he", "it"]

_POSSESSIVE: dict[Pronoun, str] = {"she": "her", "he": "his", "it": "its"}
_OBJECT: dict[Pronoun, str] = {"she": "her", "he": "him", "it": "it"}


@dataclasses.dataclass(frozen=True)
class Entity:
    """`facts`: relation name to the key of the entity it leads to; filled in by `World`."""

    kind: Kind
    name: str
    pronoun: Pronoun
    facts: dict[str, str] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def key(self) -> str:
        """What tools know it by: `kind: name`."""
        return f"{self.kind}: {self.name}"

    @property
    def possessive(self) -> str:
        return _POSSESSIVE[self.pronoun]

    @property
    def object_form(self) -> str:
        return _OBJECT[self.pronoun]


def normalised(text: str) -> str:
    """A key without what case and spaces can differ in."""
    return " ".join(text.split()).casefold()
