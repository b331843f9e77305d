"""Trajectory files: what is read, what is refused and how, and who wrote which part of the text."""

import copy
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_models import TRAJECTORIES, file_of

from lragent_jax.embedded import example_trajectories
from lragent_jax.models.errors import InputError
from lragent_jax.react import ReactTrajectory, Segment, Step, read_trajectories


def trajectory(*steps: Step, prefix: str = "Instructions.\n") -> ReactTrajectory:
    return ReactTrajectory(prefix=prefix, question="Which river?", answer="the Vistula", steps=steps)


def outputs(*steps: Step) -> list[tuple[str | None, str]]:
    return [(segment.role, segment.text) for segment in trajectory(*steps).segments() if segment.role]


def test_a_trajectory_is_cut_where_the_writer_changes():
    segments = trajectory(
        Step("I need the city.", "Search[Warsaw]", "It stands on the Vistula."),
        Step("So that is it.", "Finish[the Vistula]", "Please reflect."),
        Step("The article says so.", "Reflect[right]", "Correct."),
    ).segments()
    assert segments == [
        Segment("Instructions.\n\nQuestion: Which river?\nThought 1:", None),
        Segment(" I need the city.\n", "plan"),
        Segment("Action 1:", None),
        Segment(" Search[", "plan"),
        Segment("Warsaw]\n", "action"),
        Segment("Observation 1: It stands on the Vistula.\nThought 2:", None),
        Segment(" So that is it.\n", "plan"),
        Segment("Action 2:", None),
        Segment(" Finish[", "plan"),
        Segment("the Vistula]\n", "action"),
        Segment("Observation 2: Please reflect.\nThought 3:", None),
        Segment(" The article says so.\n", "reflect"),
        Segment("Action 3:", None),
        Segment(" Reflect[right]\n", "reflect"),
    ]


@pytest.mark.parametrize(
    ("step", "want"),
    [
        (Step("Now.", "Search[Warsaw].", "x"), [("plan", " Now.\n"), ("plan", " Search["), ("action", "Warsaw].\n")]),
        (Step("Now.", "give up", "x"), [("plan", " Now.\n"), ("plan", " give up\n")]),
        (Step("Now.", "", "x"), [("plan", " Now.\n")]),
        (Step("", "Search[a]", ""), [("plan", " Search["), ("action", "a]\n")]),
        (Step("Search[a]", "Search[a]", ""), [("plan", " Search[a]\n"), ("plan", " Search[a]\n")]),
        (Step("  Search[a] ", "Search[a]\n", ""), [("plan", " Search[a]\n"), ("plan", " Search[a]\n")]),
        (Step("", "Search[list[0]] and more", ""), [("plan", " Search["), ("action", "list[0]] and more\n")]),
        (Step("", "Search[", ""), [("plan", " Search["), ("action", "\n")]),
    ],
)
def test_real_agents_do_not_keep_to_the_form(step, want):
    assert outputs(step) == want


def test_reflecting_begins_behind_the_first_finish_and_never_ends():
    reflect_early = Step("Done?", "Reflect[right]", "Invalid action.")
    finish = Step("Done.", "finish[1920s].", "Please reflect.")
    wrong = Step("Hm.", "Reflect[wrong]", "Try again.")
    again = Step("Once more.", "Search[x]", "y")
    roles = [role for role, _ in outputs(reflect_early, finish, wrong, again, finish)]
    assert roles == ["plan", "plan", "action"] * 2 + ["reflect"] * 6


def test_a_finish_without_an_answer_is_none():
    assert outputs(Step("", "Finish", ""), Step("", "Reflect[right]", "")) == [
        ("plan", " Finish\n"), ("plan", " Reflect["), ("action", "right]\n")
    ]  # fmt: skip


LINES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["Search[a]", "Finish[b].", "Reflect[right]", "", " ", "Finish"]
)


@given(prefix=LINES, question=LINES, steps=st.lists(st.builds(Step, LINES, LINES, LINES), max_size=5))
def test_segments_are_the_text_in_order_and_nothing_twice(prefix, question, steps):
    segments = ReactTrajectory(prefix, question, "", tuple(steps)).segments()
    whole = f"{prefix.rstrip()}\n\n" * bool(prefix.strip()) + f"Question: {question.strip()}\n"
    for i, step in enumerate(steps, start=1):
        for label, text in (("Thought", step.thought), ("Action", step.action), ("Observation", step.observation)):
            whole += f"{label} {i}:{' ' * bool(text.strip())}{text.strip()}\n"
    assert whole.startswith("".join(segment.text for segment in segments))
    assert all(segment.text for segment in segments)
    assert all(a.role or b.role for a, b in itertools.pairwise(segments)), "two contexts in a row"
    assert bool(segments) == any(step.thought.strip() or step.action.strip() for step in steps)
    assert not segments or segments[-1].role


def test_a_file_is_read_back(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("\ufeff" + json.dumps(file_of(TRAJECTORIES) | {"comment": 1}), encoding="utf-8")
    assert read_trajectories(path) == TRAJECTORIES


def test_the_package_brings_trajectories():
    trajectories = example_trajectories()
    assert len(trajectories) >= 4
    for one in trajectories:
        assert {"plan", "action", "reflect"} <= {segment.role for segment in one.segments()}
        assert any(f"Finish[{one.answer}]" == step.action for step in one.steps)


DELETE = object()


def changed(path: list, value) -> dict:
    """A valid file with one place changed."""
    content = copy.deepcopy(file_of(TRAJECTORIES))
    *parents, last = path
    place = content
    for key in parents:
        place = place[key]
    if value is DELETE:
        del place[last]
    else:
        place[last] = value
    return content


STEP = ["trajectories", 1, "steps", 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "the file must hold an object, not a list"),
        ("text", "the file must hold an object, not text"),
        ({}, "prefixes is missing"),
        (changed(["prefixes"], "x"), "prefixes must be a list, not text"),
        (changed(["prefixes", 0], None), "prefixes[0] must be text, not null"),
        (changed(["trajectories"], DELETE), "trajectories is missing"),
        (changed(["trajectories"], {}), "trajectories must be a list, not an object"),
        (changed(["trajectories"], []), "trajectories is empty"),
        (changed(["trajectories", 1], 3), "trajectories[1] must be an object, not a whole number"),
        (changed(["trajectories", 1, "question"], DELETE), "trajectories[1].question is missing"),
        (changed(["trajectories", 1, "answer"], 1.5), "trajectories[1].answer must be text, not a fraction"),
        (changed(["trajectories", 0, "prefix"], DELETE), "trajectories[0].prefix is missing"),
        (changed(["trajectories", 0, "prefix"], True), "trajectories[0].prefix must be an index into prefixes"),
        (changed(["trajectories", 0, "prefix"], 1), "trajectories[0].prefix is 1, but the number of prefixes is 1"),
        (changed(["trajectories", 0, "prefix"], -1), "trajectories[0].prefix is -1"),
        (changed(["trajectories", 0, "steps"], None), "trajectories[0].steps must be a list, not null"),
        (changed(["trajectories", 0, "steps"], []), "trajectories[0].steps holds no thought and no action"),
        (changed(STEP, "Search"), "trajectories[1].steps[2] must be an object, not text"),
        (changed([*STEP, "thought"], DELETE), "trajectories[1].steps[2].thought is missing"),
        (changed([*STEP, "action"], ["Search"]), "trajectories[1].steps[2].action must be text, not a list"),
        (changed([*STEP, "observation"], False), "trajectories[1].steps[2].observation must be text, not false"),
        (changed([*STEP, "observation"], "\ud83d"), "trajectories[1].steps[2].observation holds half of a surrogate"),
    ],
)  # fmt: skip
def test_a_file_of_another_form_is_refused_by_place(content, message, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        read_trajectories(path)
    head, *problems = str(caught.value).splitlines()
    assert str(path) in head
    assert message in problems[0]
    assert len(problems) == 1 or content == {}, "one mistake, one problem"


def test_all_problems_are_told_at_once(tmp_path):
    path = tmp_path / "file.json"
    content = changed([*STEP, "thought"], 1)
    content["trajectories"][0]["prefix"] = 9
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"trajectories\[0\]\.prefix(.|\n)*trajectories\[1\]\.steps\[2\]\.thought"):
        read_trajectories(path)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"{'a': 1}", b"\xff\xfe{}", b"[" * 100_000, b"[" + b"9" * 5000 + b"]"], ids=range(6)
)
def test_what_is_no_json_is_refused(data, tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"file\.json cannot be read as a trajectory file in JSON"):
        read_trajectories(path)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no trajectory file"):
        read_trajectories(tmp_path / "absent.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_trajectories(tmp_path)
