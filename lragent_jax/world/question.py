"""Questions: a chain of relations from a named entity to an answer."""

import dataclasses
import random
from collections.abc import Iterator

from lragent_jax.models.errors import InputError
from lragent_jax.world.names import SPLITS, Split
from lragent_jax.world.relations import BY_NAME, RELATIONS
from lragent_jax.world.world import World, world

QUESTIONS_PER_WORLD = 60
MAX_HOPS = 3


@dataclasses.dataclass(frozen=True)
class Question:
    """`relations` lead along `path`, keys of entities from the one that `text` names to the answer."""

    text: str
    relations: tuple[str, ...]
    path: tuple[str, ...]
    split: Split
    world_seed: int
    number: int  # among the questions of its set

    @property
    def num_hops(self) -> int:
        return len(self.relations)

    @property
    def answer(self) -> str:
        """The key of the answer, `kind: name`: what Finish has to be given."""
        return self.path[-1]

    @property
    def world(self) -> World:
        return world(self.split, self.world_seed)

    def rng(self, purpose: str) -> random.Random:
        """Draws of this question alone: the same whatever else is asked."""
        return random.Random(f"{purpose} {self.split} {self.world_seed} {self.number}")


def make_questions(split: Split, num_questions: int, seed: int, num_hops: int | None = None) -> Iterator[Question]:
    """`num_questions` questions of `num_hops` (None: 1, 2 and 3 in turn), the same for the same arguments.

    No two of one world are equal. Raises `InputError` for a split or a number of hops that does not exist.
    """
    if split not in SPLITS:
        raise InputError(f"there is no split {split!r}; there are: {', '.join(SPLITS)}")
    if num_hops is not None and not 1 <= num_hops <= MAX_HOPS:
        raise InputError(f"questions have 1 to {MAX_HOPS} hops, not {num_hops}")
    asked: set[tuple] = set()
    for number in range(num_questions):
        if number % QUESTIONS_PER_WORLD == 0:
            asked.clear()
        # Far enough apart that sets of neighbouring seeds share no world.
        world_seed = seed * 1_000_000 + number // QUESTIONS_PER_WORLD
        rng = random.Random(f"question {split} {seed} {number} {num_hops}")
        hops = num_hops or number % MAX_HOPS + 1
        relations, path = _new_chain(world(split, world_seed), hops, rng, asked)
        yield Question(_ask(relations, path[0], rng), relations, path, split, world_seed, number)


def _new_chain(there: World, num_hops: int, rng: random.Random, asked: set) -> tuple[tuple[str, ...], tuple[str, ...]]:
    while True:
        chain = _chain(there, num_hops, rng)
        if chain is not None and chain not in asked:
            asked.add(chain)
            return chain


def _chain(there: World, num_hops: int, rng: random.Random) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """A walk that meets no entity twice; None where this one did. Every relation is as likely to come first."""
    relation = rng.choice(RELATIONS)
    entity = rng.choice(there.by_kind[relation.domain])
    relations, path = [], [entity.key]
    for hop in range(num_hops):
        name = relation.name if hop == 0 else rng.choice(sorted(entity.facts))
        entity = there.entities[entity.facts[name]]
        relations.append(name)
        path.append(entity.key)
    return (tuple(relations), tuple(path)) if len(set(path)) == len(path) else None


def _ask(relations: tuple[str, ...], start: str, rng: random.Random) -> str:
    kind, name = start.split(": ", 1)
    text = f"the {kind} {name}" if rng.random() < 0.5 and kind != "person" else name
    for relation in relations[:-1]:
        text = rng.choice(BY_NAME[relation].phrases).format(x=text)
    return rng.choice(BY_NAME[relations[-1]].questions).format(x=text)
