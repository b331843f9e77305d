"""Training examples: files, lengths, and pieces that tokenise as the whole text does."""

import dataclasses
import importlib.util
import itertools
import json
from collections import Counter

import pytest
import text_models
from typer.testing import CliRunner

from lragent_jax import embedded
from lragent_jax.cli.app import app
from lragent_jax.models.errors import CheckpointError, InputError
from lragent_jax.react import ROLES
from lragent_jax.tokenizer import load_tokenizer
from lragent_jax.world.examples import DEFAULT_MIX, LengthBand, Mix, padding_for, trajectory, write_examples
from lragent_jax.world.names import SPLITS
from lragent_jax.world.oracle import MISTAKES, play
from lragent_jax.world.padding import Padding
from lragent_jax.world.question import make_questions
from lragent_jax.world.transcript import text_of


def words(text: str) -> int:
    return len(text.split())


def lines_of(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def whole_text(line: dict[str, str]) -> str:
    """The trajectory, of a line of reflect."""
    return line["input"] + line["output"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples") / "new"
    size = write_examples(folder, "train", 30, 1, words, Mix.of_length(400))
    return folder, size


def test_files_hold_what_each_agent_reads_and_writes(written):
    folder, size = written
    for role in ROLES:
        lines = lines_of(folder, role)
        assert len(lines) == size.lines[role]
        assert all(line.keys() == {"input", "output"} and line["input"] and line["output"] for line in lines)
    assert all(line["input"].endswith("[") and line["output"].endswith("]\n") for line in lines_of(folder, "action"))
    assert all(line["input"].endswith(":") and line["output"][-1] in "[\n" for line in lines_of(folder, "plan"))
    assert all(line["input"].endswith("\nReflect:") for line in lines_of(folder, "reflect"))
    assert size.lines["questions"] == size.lines["reflect"] == 30
    assert size.mean_tokens == pytest.approx(sum(words(whole_text(line)) for line in lines_of(folder, "reflect")) / 30)


@pytest.mark.parametrize("role", ["plan", "action"])
def test_a_line_begins_with_the_one_before_where_an_agent_speaks_again(written, role):
    lines = lines_of(written[0], role)
    openings = Counter(line["input"].split("Thought 1:")[0] for line in lines)
    follows = sum(
        line["input"].startswith(before["input"] + before["output"]) for before, line in itertools.pairwise(lines)
    )
    assert follows == len(lines) - len(openings)
    assert follows > len(openings)


def test_examples_are_the_taught_outputs_and_no_others(written):
    mix = Mix.of_length(400)
    pieces = [piece for q in make_questions("train", 30, 1) for piece in trajectory(q, words, mix)]
    for role in ROLES:
        taught = [piece.text for piece in pieces if piece.role == role and piece.taught]
        assert [line["output"] for line in lines_of(written[0], role)] == taught
    assert any(not piece.taught for piece in pieces)


def test_the_same_files_again_and_others_for_another_seed(written, tmp_path):
    write_examples(tmp_path / "same", "train", 30, 1, words, Mix.of_length(400))
    write_examples(tmp_path / "other", "train", 30, 2, words, Mix.of_length(400))
    for role in ROLES:
        text = (written[0] / f"{role}.jsonl").read_text()
        assert (tmp_path / "same" / f"{role}.jsonl").read_text() == text
        assert (tmp_path / "other" / f"{role}.jsonl").read_text() != text


@pytest.mark.parametrize("target", [500, 1000])
def test_trajectories_have_the_length_that_was_asked_for(target):
    for question in make_questions("validation", 9, 3):
        for mistake in (None, *MISTAKES):
            padding = padding_for(question, target, words, mistake=mistake)
            assert target - 60 < words(text_of(play(question, padding, mistake))) <= target + 1
    assert padding_for(next(make_questions("validation", 1, 3)), None, words) == Padding()


def test_the_mix_draws_every_length_and_every_mistake():
    question = next(make_questions("train", 1, 0))
    drawn = [DEFAULT_MIX.draw(dataclasses.replace(question, number=number)) for number in range(1500)]
    mistakes = Counter(mistake for _, mistake in drawn)
    assert 0.35 < 1 - mistakes[None] / 1500 < 0.45
    assert all(80 < mistakes[mistake] < 160 for mistake in MISTAKES)
    for band in DEFAULT_MIX.lengths:
        share = sum(band.low <= length <= band.high for length, _ in drawn) / 1500
        assert abs(share - band.share) < 0.03
    assert 1100 < sum(length for length, _ in drawn) / 1500 < 1300
    assert sum(band.share for band in DEFAULT_MIX.lengths) == pytest.approx(1)
    only = Mix(lengths=(LengthBand(2, 5, 5), LengthBand(0, 9, 9)), mistakes_share=0)
    assert {only.draw(question) for question in make_questions("train", 50, 0)} == {(5, None)}


def test_long_work_shows_its_progress(tmp_path):
    reports = []
    write_examples(tmp_path, "validation", 101, 0, words, Mix.of_length(1), lambda *report: reports.append(report))
    assert reports == [(done, 101, "trajectories of validation") for done in (0, 100, 101)]


def test_sets_that_cannot_be_written_are_refused(tmp_path):
    with pytest.raises(InputError, match="at least one question"):
        write_examples(tmp_path, "train", 0, 0, words)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        write_examples(tmp_path / "file", "train", 1, 0, words)
    with pytest.raises(CheckpointError, match="holds other things"):
        write_examples(tmp_path, "train", 1, 0, words, force=True)


def test_a_set_is_replaced_on_purpose_only_and_never_half_written(tmp_path):
    out, few = tmp_path / "set", Mix.of_length(1)
    write_examples(out, "train", 3, 0, words, few)
    before = (out / "plan.jsonl").read_text()
    with pytest.raises(CheckpointError, match="exists"):
        write_examples(out, "train", 2, 1, words, few)

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_examples(out, "train", 2, 1, words, few, interrupt, force=True)
    assert (out / "plan.jsonl").read_text() == before
    write_examples(out, "train", 2, 1, words, few, force=True)
    assert len(lines_of(out, "questions")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_pieces_tokenise_as_the_whole_text_does():
    """With the tokenizer of the embedded base, which agents are trained on in one piece and run on in many."""
    if importlib.util.find_spec(embedded.MODEL_PACKAGE) is None:
        pytest.skip(f"needs {embedded.MODEL_REQUIREMENT}")
    tokenizer = load_tokenizer(embedded.find_model())
    assert tokenizer is not None
    for split in SPLITS:
        for question in make_questions(split, 6, 5):
            pieces = trajectory(question, words)
            pieces_ids = [i for n, piece in enumerate(pieces) for i in tokenizer.encode(piece.text, add_bos=n == 0)]
            assert pieces_ids == tokenizer.encode(text_of(pieces), add_bos=True)


def lragent(*arguments):
    return CliRunner().invoke(app, ["world", *map(str, arguments)])


def test_the_command_writes_a_set(tmp_path):
    model = text_models.write_text_model(tmp_path / "model")
    out = tmp_path / "set"
    result = lragent("--out", out, "--split", "evaluation", "--num-questions", 3, "--tokens", 1500, "--model", model)
    assert result.exit_code == 0, result.output
    assert f"{out / 'plan.jsonl'}: {len(lines_of(out, 'plan'))} lines" in result.stdout
    assert "trajectories of evaluation" in result.stderr
    lengths = [len(text_models.tokenizer().encode(whole_text(line))) for line in lines_of(out, "reflect")]
    assert all(1300 < length <= 1501 for length in lengths)
    assert f"3 trajectories of {sum(lengths) / 3:,.0f} tokens on average" in result.stdout
    assert [line["split"] for line in lines_of(out, "questions")] == ["evaluation"] * 3


def test_the_command_says_when_trajectories_are_longer_than_asked(tmp_path):
    model = text_models.write_text_model(tmp_path / "model")
    result = lragent("--out", tmp_path / "set", "--num-questions", 2, "--tokens", 10, "--model", model)
    assert result.exit_code == 0, result.output
    assert "more than the 10 asked for" in " ".join(result.stdout.split())


def test_the_command_refuses_what_makes_no_set(tmp_path):
    assert "none of train" in lragent("--out", tmp_path, "--split", "test").stderr
    assert lragent("--out", tmp_path, "--split", "test").exit_code == 2
    assert lragent("--out", tmp_path, "--num-questions", 0).exit_code == 2
    assert lragent("--num-questions", 1).exit_code == 2
    missing = lragent("--out", tmp_path, "--model", tmp_path / "none")
    assert missing.exit_code == 1
    assert "none" in missing.stderr
