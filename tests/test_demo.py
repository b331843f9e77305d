"""The demo on a tiny model that gets nothing right: what is counted and shown, and that no time has compiling in it."""

import dataclasses
import json
import re

import pytest
import text_models
from typer.testing import CliRunner

from lragent_jax import compilation_cache, demo, embedded, episodes
from lragent_jax.cli.app import app
from lragent_jax.cli.demo_table import print_episode, print_table
from lragent_jax.compile_watch import CompileWatch
from lragent_jax.demo import DEMO_MODES, DemoReport, ModeOutcome, run_demo
from lragent_jax.episodes import Episode
from lragent_jax.react import ROLES
from lragent_jax.world.oracle import play
from lragent_jax.world.question import make_questions
from lragent_jax.world.transcript import text_of

QUESTIONS = list(make_questions("evaluation", 2, 5, 1))


@pytest.fixture(autouse=True)
def short_outputs(monkeypatch):
    monkeypatch.setattr(compilation_cache, "enable", lambda: None)
    monkeypatch.setattr(episodes, "_MOST_TOKENS", {"thought": 3, "tool": 2, "argument": 3, "verdict": 2})
    # So that all three have a turn, whatever it is that they write.
    monkeypatch.setattr(episodes.transcript, "read_tool", lambda output: "Finish")
    monkeypatch.setattr(episodes.transcript, "read_argument", lambda output: "nothing")


@pytest.fixture
def watched(monkeypatch) -> list[int]:
    """How many programs each mode's episodes compiled."""
    found = []

    def run_episodes(*args, **options):
        with CompileWatch() as watch:
            done = episodes.run_episodes(*args, **options)
        found.append(watch.num_programs)
        return done

    monkeypatch.setattr(demo, "run_episodes", run_episodes)
    return found


def test_the_command_counts_and_shows(tmp_path, monkeypatch, watched):
    model = text_models.write_text_model(tmp_path / "model")
    folders = text_models.write_adapters(tmp_path, text_models.adapters())
    monkeypatch.setattr(embedded, "find_model", lambda: model)
    monkeypatch.setattr(embedded, "adapter_folders", lambda: folders)
    monkeypatch.setattr(embedded, "_CPU_OPTIONS", {"prefill_buckets": (256,), "decode_block": 1})
    result = CliRunner().invoke(app, ["demo", "--questions", "2", "--tokens", "1000", "--seed", "5"])
    assert result.exit_code == 0, result.output
    assert watched == [0] * len(DEMO_MODES), "everything is compiled beforehand"
    *shown, last = result.stdout.splitlines()
    report = json.loads(last)
    assert list(report["modes"]) == list(DEMO_MODES)
    assert report["questions"] == 2
    modes = report["modes"]
    assert [one["question"] for one in modes["none"]["episodes"]] == [question.text for question in QUESTIONS]
    assert modes["none"]["prefilled_tokens"] > 1.5 * modes["full"]["prefilled_tokens"]
    assert modes["base"]["prefilled_tokens"] > 1.5 * modes["base_lr"]["prefilled_tokens"]
    assert modes["none"]["cache_bytes"] > modes["base_lr"]["cache_bytes"] > modes["full"]["cache_bytes"] > 0
    for mode, numbers in modes.items():
        [row] = [line.split() for line in shown if line.split()[:1] == [mode]]
        assert row[1:4] == ["0", "of", "2"]
        assert row[4] == f"{numbers['prefilled_tokens']:,}"
        assert row[6] == f"{numbers['cache_bytes']:,}"
    assert f"  Question: {QUESTIONS[0].text}" in "\n".join(shown)


def test_several_a_groups_compile_nothing_while_they_are_timed(watched):
    engine = text_models.text_engine(text_models.adapters((1, 2, 3)), prefill_buckets=(512,), decode_block=2)
    run_demo(engine, QUESTIONS[:1], ("pre_lr", "base_lr"), max_steps=1)
    assert watched == [0, 0]


def finished_episode(right: bool) -> Episode:
    counts = dict.fromkeys(ROLES, 1)
    return Episode(
        question=QUESTIONS[0], answer="x", right=right, verdict="right", end="finished", num_steps=2,
        text=text_of(play(QUESTIONS[0])), token_ids=[0] * 7, num_outputs=counts, bad_outputs=counts,
        num_prefilled_tokens=counts, num_cached_tokens=counts, batch_cache_bytes=12_345,
    )  # fmt: skip


def test_an_episode_is_shown_with_its_writers(capsys):
    print_episode("base_lr", finished_episode(right=True))
    out = capsys.readouterr().out
    writers = re.findall(r"^ *(plan|plan, action|a tool|reflect)  (Thought|Action|Observation|Reflect)\b", out, re.M)
    assert set(writers) == {
        ("plan", "Thought"), ("plan, action", "Action"), ("a tool", "Observation"), ("reflect", "Reflect"),
    }  # fmt: skip
    assert "7 tokens" in out
    assert f"Right: it is {QUESTIONS[0].answer.partition(': ')[2]}." in out
    assert "Tools: Search" not in out, "not the instruction"
    assert max(map(len, out.splitlines())) <= 120
    print_episode("full", finished_episode(right=False))
    assert "Wrong: it is" in capsys.readouterr().out


def test_the_table_says_how_many_answers_are_right(capsys):
    outcome = ModeOutcome(3, 1234, 5678, 12_345, 1.25, [finished_episode(right=True)])
    report = DemoReport({"none": outcome, "full": dataclasses.replace(outcome, right=0)}, 4, 2.0)
    print_table(report)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(" none")]
    assert rows == [["none", "3", "of", "4", "1,234", "5,678", "12,345", "1.2"]]
    assert json.loads(report.to_json())["modes"]["none"]["right"] == 3
