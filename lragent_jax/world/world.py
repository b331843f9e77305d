"""A world: everything there is under one seed, and what is written about it."""

import functools
import itertools
import random
from collections.abc import Callable, Iterator

from lragent_jax.world.document import Document, write_document
from lragent_jax.world.entity import Entity, Pronoun, normalised
from lragent_jax.world.names import NamePool, Split, name_pool
from lragent_jax.world.relations import KINDS, Kind, relations_of

_NUMBERS: dict[Kind, int] = {
    "film": 40,
    "book": 30,
    "person": 90,
    "company": 30,
    "university": 14,
    "city": 40,
    "river": 24,
    "country": 8,
}
_LONG_SHARE = 0.15  # of documents
_TRADES = (
    "Glass",
    "Foods",
    "Motors",
    "Tools",
    "Mills",
    "Press",
    "Books",
    "Steel",
    "Radio",
    "Toys",
    "Pictures",
    "Films",
)


class World:
    """Entities of one split's names, their relations and documents; the same for the same `split` and `seed`."""

    def __init__(self, split: Split, seed: int):
        self.split: Split = split
        self.seed = seed
        rng = random.Random(f"world {split} {seed}")
        entities = list(_entities(name_pool(split), rng))
        self.entities: dict[str, Entity] = {entity.key: entity for entity in entities}
        self.by_kind: dict[Kind, list[Entity]] = {kind: [e for e in entities if e.kind == kind] for kind in KINDS}
        self._by_normalised_key = {normalised(entity.key): entity for entity in entities}
        self._relate(rng)
        names = {entity.key: entity.name for entity in entities}
        self._documents: dict[str, Document] = {
            entity.key: write_document(entity, names, rng, long=rng.random() < _LONG_SHARE) for entity in entities
        }

    def document(self, key: str) -> Document:
        """What is written about an entity."""
        return self._documents[key]

    def find(self, key: str) -> Entity | None:
        """The entity of this key, whatever its case and spaces."""
        return self._by_normalised_key.get(normalised(key))

    def _relate(self, rng: random.Random) -> None:
        for entity in self.entities.values():
            for relation in relations_of(entity.kind):
                taken = {entity.key, *entity.facts.values()}
                others = [other for other in self.by_kind[relation.range] if other.key not in taken]
                entity.facts[relation.name] = rng.choice(others).key
        for country, cities in zip(self.by_kind["country"], self._cities_by_country(), strict=True):
            country.facts["capital"] = cities[0].key
            for city in cities:
                city.facts["country"] = country.key

    def _cities_by_country(self) -> list[list[Entity]]:
        """Capitals lie in their countries."""
        number = len(self.by_kind["country"])
        return [self.by_kind["city"][i::number] for i in range(number)]


@functools.lru_cache(maxsize=8)
def world(split: Split, seed: int) -> World:
    """`World(split, seed)`, kept while neighbouring questions are about it."""
    return World(split, seed)


def _entities(pool: NamePool, rng: random.Random) -> Iterator[Entity]:
    """Every invented word names one entity only, so that no name begins or contains another."""
    stems = iter(rng.sample(pool.stems, len(pool.stems)))
    titles = [f"{adjective} {noun}" for adjective, noun in itertools.product(pool.adjectives, pool.nouns)]
    pairs = [f"{one} and {other}" for one, other in itertools.permutations(pool.nouns, 2)]
    films, books = iter(rng.sample(titles, _NUMBERS["film"])), iter(rng.sample(pairs, _NUMBERS["book"]))
    make: dict[Kind, Callable[[], str]] = {
        "film": lambda: next(films),
        "book": lambda: next(books),
        "company": lambda: f"{next(stems)} {rng.choice(_TRADES)}",
        "university": lambda: f"{next(stems)} {rng.choice(('College', 'University'))}",
        "city": lambda: rng.choice(("", "", "", "Port ", "New ", "Saint ")) + next(stems),
        "river": lambda: next(stems),
        "country": lambda: f"{next(stems)}ia",
    }
    for kind, number in _NUMBERS.items():
        for _ in range(number):
            pronoun: Pronoun = "it"
            if kind == "person":
                pronoun = rng.choice(("she", "he"))
                name = f"{rng.choice(pool.women if pronoun == 'she' else pool.men)} {next(stems)}"
            else:
                name = make[kind]()
            yield Entity(kind, name, pronoun)
