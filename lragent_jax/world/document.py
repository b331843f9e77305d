"""What is written about an entity: one paragraph, every relation in a sentence of its own."""

import dataclasses
import random
from collections.abc import Mapping

from lragent_jax.world.entity import Entity
from lragent_jax.world.relations import BY_NAME, KINDS


@dataclasses.dataclass(frozen=True)
class Document:
    """`sentences` in reading order, the first of which names the entity; `by_relation` says which states what.

    Of a long document the tools show the opening first: the first `num_opening` sentences, which state no relation.
    Others are shown whole.
    """

    sentences: tuple[str, ...]
    by_relation: Mapping[str, str]
    num_opening: int | None = None

    @property
    def text(self) -> str:
        """All of it."""
        return " ".join(self.sentences)

    @property
    def shown(self) -> str:
        """What Search shows."""
        return self.text if self.num_opening is None else f"{' '.join(self.sentences[: self.num_opening])} {MORE}"


MORE = "(more)"
"""Ends a paragraph that goes on."""


def write_document(entity: Entity, names: Mapping[str, str], rng: random.Random, *, long: bool) -> Document:
    """A paragraph on `entity` in words that `rng` draws. `names`: key to name, of the entities it is related to."""
    words = KINDS[entity.kind]
    fillers = rng.sample(words.fillers, 2)
    opening = [rng.choice(words.openings)]
    facts = list(entity.facts.items())
    rng.shuffle(facts)
    sentences = [_filled(text, entity, rng, first=True) for text in opening]
    by_relation = {}
    if long:
        sentences += [_filled(text, entity, rng) for text in fillers]
    for relation, key in facts:
        template = rng.choice(BY_NAME[relation].sentences)
        by_relation[relation] = _filled(template, entity, rng, names[key])
        sentences.append(by_relation[relation])
    if not long and rng.random() < 0.4:
        sentences.insert(rng.randrange(1, len(sentences) + 1), _filled(fillers[0], entity, rng))
    return Document(tuple(sentences), by_relation, num_opening=3 if long else None)


def _filled(template: str, entity: Entity, rng: random.Random, other: str = "", *, first: bool = False) -> str:
    subject, possessive = _subject(entity, rng)
    text = template.format(
        n=entity.name if first else "",
        s=subject,
        s_low=entity.pronoun,
        p=possessive,
        p_low=entity.possessive,
        m=entity.object_form,
        o=other,
        y=rng.randint(1901, 1999),
        w=rng.choice(KINDS[entity.kind].things),
    )
    return text[0].upper() + text[1:]


def _subject(entity: Entity, rng: random.Random) -> tuple[str, str]:
    """How a sentence refers to the entity, and its possessive: most often by a pronoun."""
    aliases = {"person": entity.name.split()[-1], "film": "The film", "book": "The book"}
    alias = aliases.get(entity.kind, f"The {entity.kind}")
    draw = rng.random()
    if draw < 0.6:
        return entity.pronoun.capitalize(), entity.possessive.capitalize()
    if draw < 0.8:
        return alias, f"{alias}'s"
    return entity.name, f"{entity.name}'s"
