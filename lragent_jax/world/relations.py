"""What there is in the world, how it hangs together, and how English says so."""

import dataclasses
from typing import Literal

Kind = Literal["film", "book", "person", "company", "university", "city", "river", "country"]


@dataclasses.dataclass(frozen=True)
class KindWords:
    """The language of one kind of entity.

    `openings` begin a document and name the entity ({n}); `fillers` say something that nobody asks for. In all
    sentences {s} is the subject at the start of a sentence, {p} its possessive, {m} its object form; {y} is a year,
    {w} some work or trade.
    """

    openings: tuple[str, ...]
    fillers: tuple[str, ...]
    things: tuple[str, ...]  # what {w} can be


@dataclasses.dataclass(frozen=True)
class Relation:
    """One question that can be asked about an entity of `domain`; the answer is an entity of `range`.

    `sentences` state it ({o} is the answer), `phrases` refer to the answer inside a longer question ({x} is what it is
    asked about), and `questions` ask for it.
    """

    name: str
    domain: Kind
    range: Kind
    sentences: tuple[str, ...]
    phrases: tuple[str, ...]
    questions: tuple[str, ...]


KINDS: dict[Kind, KindWords] = {
    "film": KindWords(
        openings=(
            "{n} is a film about {w}.",
            "{n} is a {y} film.",
            "{n} is a film that came out in {y}.",
            "{n}, a film about {w}, came out in {y}.",
            "{n} is a long film about {w}.",
        ),
        fillers=(
            "{s} was shot in one summer.",
            "Critics liked {m}.",
            "{s} ran for two hours.",
            "{s} won a small prize.",
            "{s} was shown at three festivals.",
            "Few people saw {m} at first.",
        ),
        things=("a flood", "two sisters", "a lost ship", "a train robbery", "a village doctor", "a long strike"),
    ),
    "book": KindWords(
        openings=(
            "{n} is a novel about {w}.",
            "{n} is a book from {y}.",
            "{n} is a book about {w}.",
            "{n}, a novel about {w}, appeared in {y}.",
        ),
        fillers=(
            "{s} sold slowly at first.",
            "Schools still use {m}.",
            "{s} has twelve chapters.",
            "{s} was banned for a year.",
            "Readers often call {m} sad.",
        ),
        things=("a family of bakers", "a sea voyage", "a court case", "an old house", "a hard winter"),
    ),
    "person": KindWords(
        openings=(
            "{n} is {w}.",
            "{n} is {w} and a keen walker.",
            "{n}, {w}, first became known in {y}.",
            "{n} has been {w} since {y}.",
        ),
        fillers=(
            "{s} speaks four languages.",
            "{s} keeps bees.",
            "{s} has two children.",
            "A street bears {p_low} name.",
            "{s} plays chess on Sundays.",
            "{s} rarely gives interviews.",
        ),
        things=("an artist", "an engineer", "a writer", "a politician", "a musician", "a manager", "a scholar"),
    ),
    "company": KindWords(
        openings=(
            "{n} is a company that makes {w}.",
            "{n} is a maker of {w}.",
            "{n}, started in {y}, sells {w}.",
            "{n} is a firm known for {w}.",
        ),
        fillers=(
            "{s} employs two hundred people.",
            "{s} pays its workers well.",
            "Its logo shows a bird.",
            "{s} nearly failed once.",
            "{s} exports half of what it makes.",
        ),
        things=("tools", "paper", "cameras", "bread", "clocks", "boats", "lamps", "records"),
    ),
    "university": KindWords(
        openings=(
            "{n} is a university known for {w}.",
            "{n} is a small university.",
            "{n} is a university from {y}.",
            "{n}, a university, teaches mostly {w}.",
        ),
        fillers=(
            "{s} has a famous library.",
            "{s} has nine faculties.",
            "Its rowing team is strong.",
            "{s} takes few students.",
        ),
        things=("law", "medicine", "music", "physics", "history"),
    ),
    "city": KindWords(
        openings=(
            "{n} is a city known for {w}.",
            "{n} is a large city.",
            "{n} is an old city with {w}.",
            "{n} has been a city since {y}.",
        ),
        fillers=(
            "{s} has a wide market square.",
            "Fog is common there.",
            "{s} burned down twice.",
            "{s} hosts a fair each May.",
            "Trams run all night.",
        ),
        things=("its towers", "its cheese", "steep streets", "a large port", "its theatres"),
    ),
    "river": KindWords(
        openings=(
            "{n} is a river with {w}.",
            "{n} is a slow river.",
            "{n} is a river of medium length.",
        ),
        fillers=(
            "{s} floods in spring.",
            "{s} is rich in fish.",
            "{s} freezes in cold winters.",
            "Barges use {m} daily.",
        ),
        things=("many bends", "clear water", "high banks"),
    ),
    "country": KindWords(
        openings=(
            "{n} is a country with {w}.",
            "{n} is a small country.",
            "{n} has been a country since {y}.",
        ),
        fillers=(
            "{s} exports timber.",
            "Its flag is green.",
            "{s} has a short coast.",
            "Most of {m} is flat.",
        ),
        things=("many lakes", "high mountains", "long winters"),
    ),
}

RELATIONS: tuple[Relation, ...] = (
    Relation(
        "director", "film", "person",
        ("{s} was directed by {o}.", "{p} director is {o}.", "{o} directed {m}.", "The director was {o}.",
         "Its scenes were directed by {o}."),
        ("the director of {x}", "the person who directed {x}"),
        ("Who directed {x}?", "Who is the director of {x}?", "By whom was {x} directed?"),
    ),
    Relation(
        "star", "film", "person",
        ("{s} stars {o}.", "The leading part is played by {o}.", "{p} star is {o}.", "{o} stars in {m}."),
        ("the star of {x}", "the actor who stars in {x}"),
        ("Who stars in {x}?", "Who is the star of {x}?"),
    ),
    Relation(
        "composer", "film", "person",
        ("{p} music was composed by {o}.", "The composer is {o}.", "{o} composed the music.", "{p} composer was {o}."),
        ("the composer of {x}", "the person who composed the music of {x}"),
        ("Who composed the music of {x}?", "Who is the composer of {x}?"),
    ),
    Relation(
        "studio", "film", "company",
        ("{s} was made by the studio {o}.", "{p} studio was {o}.", "The studio {o} paid for {m}."),
        ("the studio of {x}", "the studio that made {x}"),
        ("Which studio made {x}?", "What is the studio of {x}?"),
    ),
    Relation(
        "author", "book", "person",
        ("{s} was written by {o}.", "{p} author is {o}.", "{o} wrote {m} in two years.", "The author was {o}."),
        ("the author of {x}", "the person who wrote {x}"),
        ("Who wrote {x}?", "Who is the author of {x}?"),
    ),
    Relation(
        "translator", "book", "person",
        ("{s} was translated by {o}.", "{p} translator is {o}.", "{o} translated {m} later."),
        ("the translator of {x}", "the person who translated {x}"),
        ("Who translated {x}?", "Who is the translator of {x}?"),
    ),
    Relation(
        "publisher", "book", "company",
        ("{s} was published by {o}.", "{p} publisher is {o}.", "{o} published {m}."),
        ("the publisher of {x}", "the company that published {x}"),
        ("Which company published {x}?", "What is the publisher of {x}?"),
    ),
    Relation(
        "birthplace", "person", "city",
        ("{s} was born in {o}.", "{p} birthplace is {o}.", "Born in {o}, {s_low} moved away early.",
         "{s} comes from {o}, where {s_low} was born."),
        ("the birthplace of {x}", "the city where {x} was born"),
        ("Where was {x} born?", "What is the birthplace of {x}?", "In which city was {x} born?"),
    ),
    Relation(
        "employer", "person", "company",
        ("{s} works for {o}.", "{p} employer is {o}.", "{s} is employed by {o}.", "{o} is {p_low} employer."),
        ("the employer of {x}", "the company that employs {x}"),
        ("Which company employs {x}?", "What is the employer of {x}?"),
    ),
    Relation(
        "school", "person", "university",
        ("{s} studied at {o}.", "{s} took a degree at {o}.", "{p} school was {o}.", "{s} was a student at {o}."),
        ("the school of {x}", "the university where {x} studied"),
        ("Where did {x} study?", "What was the school of {x}?", "At which university did {x} study?"),
    ),
    Relation(
        "teacher", "person", "person",
        ("{s} was taught by {o}.", "{p} teacher was {o}.", "{o} taught {m}."),
        ("the teacher of {x}", "the person who taught {x}"),
        ("Who taught {x}?", "Who was the teacher of {x}?"),
    ),
    Relation(
        "founder", "company", "person",
        ("{s} was founded by {o}.", "{p} founder is {o}.", "{o} founded {m}.", "The founder was {o}."),
        ("the founder of {x}", "the person who founded {x}"),
        ("Who founded {x}?", "Who is the founder of {x}?"),
    ),
    Relation(
        "headquarters", "company", "city",
        ("{s} has its headquarters in {o}.", "{p} headquarters are in {o}.", "The headquarters stand in {o}."),
        ("the headquarters of {x}", "the city where {x} has its headquarters"),
        ("Where are the headquarters of {x}?", "In which city does {x} have its headquarters?"),
    ),
    Relation(
        "rector", "university", "person",
        ("{p} rector is {o}.", "{s} is led by its rector, {o}.", "The rector is {o}.", "{o} is the rector."),
        ("the rector of {x}", "the person who is rector of {x}"),
        ("Who is the rector of {x}?", "Who is rector of {x}?"),
    ),
    Relation(
        "seat", "university", "city",
        ("{p} seat is {o}.", "{s} has its seat in {o}.", "The seat is in {o}."),
        ("the seat of {x}", "the city where {x} has its seat"),
        ("Where is the seat of {x}?", "In which city does {x} have its seat?"),
    ),
    Relation(
        "mayor", "city", "person",
        ("{p} mayor is {o}.", "The mayor is {o}.", "{o} is the mayor.", "{s} elected {o} as mayor."),
        ("the mayor of {x}", "the person who is mayor of {x}"),
        ("Who is the mayor of {x}?", "Who is mayor of {x}?"),
    ),
    Relation(
        "river", "city", "river",
        ("{s} lies on the river {o}.", "The river {o} flows through {m}.", "{p} river is the {o}.",
         "{s} stands on the river {o}."),
        ("the river of {x}", "the river that flows through {x}"),
        ("Which river flows through {x}?", "What is the river of {x}?", "On which river does {x} lie?"),
    ),
    Relation(
        "country", "city", "country",
        ("{s} belongs to the country {o}.", "{p} country is {o}.", "{s} lies in the country {o}."),
        ("the country of {x}", "the country that {x} belongs to"),
        ("To which country does {x} belong?", "What is the country of {x}?"),
    ),
    Relation(
        "mouth", "river", "city",
        ("{p} mouth is at {o}.", "{s} reaches the sea at its mouth in {o}.", "The mouth lies at {o}."),
        ("the mouth of {x}", "the city at the mouth of {x}"),
        ("Which city is at the mouth of {x}?", "What is the mouth of {x}?"),
    ),
    Relation(
        "capital", "country", "city",
        ("{p} capital is {o}.", "The capital is {o}.", "{s} has {o} as its capital.", "{o} is the capital."),
        ("the capital of {x}", "the city that is the capital of {x}"),
        ("What is the capital of {x}?", "Which city is the capital of {x}?"),
    ),
    Relation(
        "president", "country", "person",
        ("{p} president is {o}.", "The president is {o}.", "{s} is led by president {o}.", "{o} is the president."),
        ("the president of {x}", "the person who is president of {x}"),
        ("Who is the president of {x}?", "Who is president of {x}?"),
    ),
)  # fmt: skip

BY_NAME: dict[str, Relation] = {relation.name: relation for relation in RELATIONS}


def relations_of(kind: Kind) -> list[Relation]:
    """What can be asked about an entity of this kind."""
    return [relation for relation in RELATIONS if relation.domain == kind]
