"""The world: names, documents, questions, tools, and the oracle that plays in it."""

import hashlib

import pytest

from lragent_jax.models.errors import InputError
from lragent_jax.world.names import SPLITS, name_pool
from lragent_jax.world.oracle import MISTAKES, play
from lragent_jax.world.padding import Layout, Surroundings, TokenCounter, pad
from lragent_jax.world.question import make_questions
from lragent_jax.world.relations import BY_NAME, KINDS, RELATIONS, relations_of
from lragent_jax.world.tools import Tools, is_call
from lragent_jax.world.transcript import (
    INSTRUCTION,
    is_answer,
    read_argument,
    read_tool,
    read_verdict,
    text_of,
)
from lragent_jax.world.world import World, world

TRAIN = world("train", 0)
BRACKETS = 'person: [Eve] "Adam"]]\n[x'


def names(split, seeds=(0, 1)):
    return {entity.name for seed in seeds for entity in world(split, seed).entities.values()}


def words(text: str) -> int:
    return len(text.split())


# Names.


def test_no_word_names_entities_of_two_splits():
    for first, second in (("train", "validation"), ("train", "evaluation"), ("validation", "evaluation")):
        one, other = name_pool(first), name_pool(second)
        for field in ("stems", "women", "men", "nouns"):
            assert set(getattr(one, field)).isdisjoint(getattr(other, field))


def test_no_stem_is_a_part_of_another():
    stems = [stem.casefold() for split in SPLITS for stem in name_pool(split).stems]
    assert len(stems) > 2500
    assert all(" ".join(stems).count(stem) == 1 for stem in stems)


def test_evaluation_names_are_no_part_of_training_text():
    text = "\n".join(
        text_of(play(question, mistake=mistake))
        for question in make_questions("train", 40, 3)
        for mistake in (None, *MISTAKES)
    )
    for seed in range(3):
        there = world("train", seed)
        text += "\n".join(f"{key}\n{there.document(key).text}" for key in there.entities)
    text = text.casefold()
    assert names("train", [0]) & {name for name in names("train", [0]) if name.casefold() in text}, "the check works"
    for split in ("evaluation", "validation"):
        parts = names(split) | set(name_pool(split).stems)
        assert [part for part in parts if part.casefold() in text] == []


def test_names_of_a_world_are_unique_and_none_is_part_of_another():
    for split in SPLITS:
        there = world(split, 5)
        all_names = [entity.name for entity in there.entities.values()]
        assert len(set(all_names)) == len(all_names)
        assert [(a, b) for a in all_names for b in all_names if a != b and a in b.split(" and ")] == []


# Documents.


def test_the_same_world_for_everybody():
    """The adapters in the package learnt from these very texts: who changes a word has to train them again."""
    worlds = (TRAIN, World("evaluation", 7))
    texts = [f"{key} {there.document(key).text}" for there in worlds for key in there.entities]
    assert digest("\n".join(texts)) == "229858df51f3b0e4"
    assert digest("".join(text_of(play(q, mistake="value")) for q in make_questions("train", 30, 0))) == (
        "c028f831f22ec33b"
    )


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_worlds_of_other_seeds_and_splits_differ():
    assert World("train", 0).entities.keys() == TRAIN.entities.keys()
    assert World("train", 1).entities.keys() != TRAIN.entities.keys()
    assert not World("validation", 0).entities.keys() & TRAIN.entities.keys()


def test_every_relation_is_stated_in_one_sentence_and_nowhere_else():
    for key, entity in TRAIN.entities.items():
        text = TRAIN.document(key)
        assert text.by_relation.keys() == entity.facts.keys() == {r.name for r in relations_of(entity.kind)}
        for relation, other in entity.facts.items():
            name = TRAIN.entities[other].name
            assert TRAIN.entities[other].kind == BY_NAME[relation].range
            assert [s for s in text.sentences if name in s] == [text.by_relation[relation]]


def test_documents_begin_with_the_name_and_fill_every_slot():
    for key, entity in TRAIN.entities.items():
        assert TRAIN.document(key).text.startswith(entity.name)
        assert not set("{}[]\n") & set(TRAIN.document(key).text)


def test_long_documents_show_no_relation_at_first():
    long = [key for key in TRAIN.entities if TRAIN.document(key).num_opening is not None]
    assert 0.05 < len(long) / len(TRAIN.entities) < 0.3
    for key in long:
        text = TRAIN.document(key)
        assert text.shown.endswith(" (more)")
        assert not any(sentence in text.shown for sentence in text.by_relation.values())


def test_every_template_takes_what_it_is_given():
    slots = dict.fromkeys(("n", "s", "s_low", "p", "p_low", "m", "y", "w"), "x")
    for kind in KINDS.values():
        for template in (*kind.openings, *kind.fillers):
            assert template.format(**slots)
        assert all("{n}" in template for template in kind.openings)
    for relation in RELATIONS:
        assert all("{o}" in template and template.format(**slots, o="x") for template in relation.sentences)
        assert all("{x}" in template for template in (*relation.phrases, *relation.questions))


def test_capitals_lie_in_their_countries():
    for country in TRAIN.by_kind["country"]:
        assert TRAIN.entities[country.facts["capital"]].facts["country"] == country.key


# Questions.


@pytest.mark.parametrize("num_hops", [1, 2, 3])
def test_questions_lead_along_facts_to_an_answer_they_do_not_name(num_hops):
    questions = list(make_questions("evaluation", 70, 4, num_hops))
    assert len({(q.world_seed, q.relations, q.path) for q in questions}) == 70
    for question in questions:
        entities = [question.world.entities[key] for key in question.path]
        assert question.num_hops == num_hops
        assert len(set(question.path)) == num_hops + 1
        for one, relation, other in zip(entities, question.relations, entities[1:], strict=False):
            assert one.facts[relation] == other.key
        assert entities[0].name in question.text
        assert not any(entity.name in question.text for entity in entities[1:])
        assert "{" not in question.text


def test_questions_are_the_same_again_and_other_seeds_ask_others():
    first = list(make_questions("train", 9, 1))
    assert first == list(make_questions("train", 12, 1))[:9]
    assert [question.num_hops for question in first] == [1, 2, 3] * 3
    assert not {q.text for q in first} & {q.text for q in make_questions("train", 9, 2)}


def test_questions_that_do_not_exist_are_refused():
    with pytest.raises(InputError, match="no split 'test'"):
        next(make_questions("test", 1, 0))  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="1 to 3 hops"):
        next(make_questions("train", 1, 0, 4))


# Tools.


def test_search_finds_a_key_whatever_its_case_and_spaces():
    key = next(iter(TRAIN.entities))
    for argument in (key, key.upper(), f"  {key.replace(': ', ':  ')} "):
        assert Tools(TRAIN).search(argument) == TRAIN.document(key).shown


@pytest.mark.parametrize("argument", ["", " ", "person:", "nobody", BRACKETS, "x" * 5000, "city\n\nof\tjoy", "\ud800"])
def test_an_unknown_entity_is_told_in_one_line(argument):
    told = Tools(TRAIN).search(argument)
    assert told.startswith("Could not find ")
    assert "Similar: " in told
    assert len(told) < 250
    assert "\n" not in told


def test_a_misspelt_name_brings_the_right_one_without_its_kind():
    person = TRAIN.by_kind["person"][0]
    told = Tools(TRAIN).search(f"person: {person.name[:-1]}")
    assert person.name in told
    assert person.key not in told
    assert Tools(TRAIN).search(person.name).startswith("Could not find"), "a name without its kind is none"


def test_what_surrounds_a_find_follows_the_order_of_finds():
    keys = list(TRAIN.entities)[:3]
    tools = Tools(TRAIN, [Surroundings(("a", "b"), ("c",)), Surroundings((), ("d",))])
    tools.search("nobody")
    shown = [TRAIN.document(key).shown for key in keys]
    assert [tools.search(key) for key in keys] == [f"a\nb\n{shown[0]}\nc", f"{shown[1]}\nd", shown[2]]


def test_lookup_reads_what_search_found_last():
    tools = Tools(TRAIN)
    assert "Search first" in tools.lookup("director")
    film = TRAIN.by_kind["film"][0]
    tools.search(film.key)
    tools.search("film: none such")
    assert tools.call("Lookup", " Director ") == TRAIN.document(film.key).by_relation["director"]
    assert tools.lookup("mayor") == "There is nothing about mayor there."
    assert "\n" not in tools.lookup(BRACKETS)


def test_calls_have_the_form_their_tool_takes():
    assert is_call("Search", "film: Lost Lamp")
    assert is_call("Finish", "City:Port Lowen")
    assert is_call("Lookup", "director")
    for argument in ("Lost Lamp", "film:", "film: ", ": x", "ship: Lost Lamp", "the director of the film", ""):
        assert not is_call("Search", argument)
        assert not is_call("Lookup", argument)


# Reading outputs.


def test_outputs_are_read_as_their_agents_meant_them():
    assert read_tool(" Search[") == "Search"
    assert read_tool("Finish[x") == "Finish"
    assert read_argument("film: Lost [Lamp]]\n") == "film: Lost [Lamp]"
    assert read_argument(" a ] \nb]") == "a"
    assert [read_verdict(text) for text in (" right: x.\n", "Wrong\n", " wrong.")] == ["right", "wrong", "wrong"]
    assert is_answer(" City:  port Lowen", "city: Port Lowen")


@pytest.mark.parametrize(
    "output", ["", " ", "\n", "[", "Search", " search[", " I need the[", "Search [x]\n[", "\ufffd"]
)
def test_what_names_no_tool(output):
    assert read_tool(output) is (None if output != "Search [x]\n[" else "Search")


@pytest.mark.parametrize("output", ["", "\n", "]", " ]\n", "film: x", "film: x\n]", "]x\n"])
def test_what_is_no_argument(output):
    assert read_argument(output) is None


@pytest.mark.parametrize("output", ["", "\n", "rightly so", " I need the mayor.\n", "not right", ":"])
def test_what_is_no_verdict(output):
    assert read_verdict(output) is None


def test_what_is_no_answer():
    assert not is_answer(None, "city: Lowen")
    assert not is_answer("Lowen", "city: Lowen")
    assert not is_answer("city: Lowe n", "city: Lowen")


# The oracle.


def outputs(pieces, role, taught=None):
    return [piece.text for piece in pieces if piece.role == role and taught in (None, piece.taught)]


def test_a_right_episode_reads_every_answer_from_what_it_was_shown():
    for question in make_questions("train", 30, 8):
        pieces = play(question)
        assert all(piece.taught for piece in pieces)
        shown = text_of(pieces).split("Thought 1:")[1]
        arguments = outputs(pieces, "action")
        assert arguments[-1] == f"{question.answer}]\n"
        assert outputs(pieces, "reflect")[0].startswith(" right: ")
        assert "Could not find" not in shown
        for key in question.path[1:]:
            name = question.world.entities[key].name
            assert any(name in piece.text for piece in pieces if piece.role is None)
        assert question.world.entities[question.answer].name not in pieces[0].text


def test_a_thought_names_no_entity_before_the_last_one():
    for question in make_questions("train", 30, 8):
        thoughts = [text for text in outputs(play(question), "plan") if text.endswith("\n")]
        all_names = [entity.name for entity in question.world.entities.values()]
        assert not any(name in thought for thought in thoughts[:-1] for name in all_names)
        assert question.world.entities[question.answer].name in thoughts[-1]


@pytest.mark.parametrize("mistake", ["early", "relation", "entity", "value"])
def test_what_follows_a_mistake_is_not_taught_and_reflect_finds_it(mistake):
    num_wrong = 0
    for question in make_questions("train", 45, 9):
        pieces = play(question, mistake=mistake)
        answered = outputs(pieces, "action")[-1] == f"{question.answer}]\n"
        [verdict] = outputs(pieces, "reflect", taught=True)
        assert verdict.startswith(" right: " if answered else " wrong: ")
        if not answered:
            num_wrong += 1
            assert outputs(pieces, "action", taught=False)
            right = play(question)
            for role in ("plan", "action"):
                taught = outputs(pieces, role, taught=True)
                assert taught == outputs(right, role)[: len(taught)]
    assert num_wrong >= 20


def test_a_misspelt_argument_is_mended_and_only_the_mending_taught():
    for question in make_questions("train", 12, 10):
        pieces, right = play(question, mistake="unknown"), play(question)
        assert outputs(pieces, "action", taught=True) == outputs(right, "action")
        assert len(outputs(pieces, "action", taught=False)) == 1
        assert not outputs(pieces, "plan", taught=False)
        assert text_of(pieces).count("Could not find") == 1
        assert outputs(pieces, "reflect") == outputs(right, "reflect")


# Padding.


@pytest.mark.parametrize("target", [120, 700, 4000])
def test_padding_comes_close_to_what_was_asked_for(target):
    for question in make_questions("train", 6, 11):
        padding = pad(question, target, words)
        texts = [*padding.notes, *(text for around in padding.results for text in (*around.before, *around.after))]
        assert target - 60 < sum(map(words, texts)) <= target
        assert len(set(texts)) == len(texts)
        assert len(padding.results) == question.num_hops
        on_path = {question.world.document(key).shown for key in question.path}
        assert on_path.isdisjoint(texts)
        assert words(text_of(play(question, padding))) == words(text_of(play(question))) + sum(
            map(words, texts)
        ) + bool(padding.notes)


@pytest.mark.parametrize(("layout", "where"), [(Layout(1, 0), 0), (Layout(0, 1), 1), (Layout(0, 0), 2)])
def test_paragraphs_go_where_the_layout_says(layout, where):
    question = next(make_questions("train", 1, 12, 3))
    padding = pad(question, 500, words, layout)
    before = [text for around in padding.results for text in around.before]
    after = [text for around in padding.results for text in around.after]
    counts = [len(padding.notes), len(before), len(after)]
    assert counts[where] == sum(counts) > 10


def test_nothing_to_fill_is_left_empty_and_all_of_the_world_is_enough():
    question = next(make_questions("train", 1, 13))
    assert not pad(question, 0, words).notes
    assert not pad(question, -50, words).notes
    everything = pad(question, 10**6, words, Layout(1, 0))
    assert len(everything.notes) == len(question.world.entities) - 2


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_shares_that_are_none(share):
    with pytest.raises(InputError, match="before_share must be a share"):
        Layout(0.5, share)


def test_a_counter_asks_once():
    asked = []
    count = TokenCounter(lambda text: asked.append(text) or [0] * len(text), capacity=2)
    assert [count(text) for text in ("ab", "c", "ab")] == [2, 1, 2]
    assert asked == ["ab", "c"]
    assert [count(text) for text in ("def", "ab")] == [3, 2], "a full counter begins anew"


def test_the_instruction_gives_no_convention_away():
    assert not any(f"{kind}:" in INSTRUCTION for kind in KINDS)
    assert "I need" not in INSTRUCTION
