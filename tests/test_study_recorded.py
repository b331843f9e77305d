"""Recorded text in the study: what is trained on and what is not, and lines that the trainer reads."""

import json

import pytest
import text_models
from script_modules import load_script

from lragent_jax.models.errors import InputError
from lragent_jax.react import ReactTrajectory, Step
from lragent_jax.recording import Recording
from lragent_jax.study.recorded import recordings, split, write_examples
from lragent_jax.training.examples import read_examples, tokenize

TOKENIZER = text_models.tokenizer()
MANY = [
    ReactTrajectory(
        "Prefix.", f"question {i}?", "", (Step("so", f"Finish[{i}]", "ok"), Step("yes", "Reflect[right]", ""))
    )
    for i in range(10)
]


def test_a_fifth_is_held_out_and_always_the_same():
    training, held_out = split(MANY)
    assert (len(training), len(held_out)) == (8, 2)
    assert sorted(t.question for t in training + held_out) == [t.question for t in MANY]
    assert split(MANY) == (training, held_out)
    assert held_out != MANY[8:], "not by their place in the file"
    with pytest.raises(InputError, match="1 trajectories are too few"):
        split(MANY[:1])


def test_the_trainer_reads_the_ids_that_replay_runs(tmp_path):
    numbers = write_examples(text_models.TRAJECTORIES, tmp_path, TOKENIZER, 4096)
    for role in ("plan", "action", "reflect"):
        examples = read_examples(tmp_path / f"{role}.jsonl")
        assert len(examples) == numbers[role] > 0
        found = tokenize(examples, TOKENIZER, text_models.CONFIG)
        assert len(found) == len(text_models.TRAJECTORIES), "one sequence for each trajectory"
        for sequence, trajectory in zip(found, text_models.TRAJECTORIES, strict=True):
            parts = Recording.tokenize(trajectory, TOKENIZER).parts
            ids = [token for part in parts for token in part.ids]
            wanted = [part.role == role for part in parts for _ in part.ids]
            assert sequence.ids.tolist() == ids[: len(sequence.ids)]
            assert sequence.is_output.tolist() == wanted[: len(sequence.ids)]
            assert not any(wanted[len(sequence.ids) :])


def test_what_does_not_fit_is_left_out(tmp_path):
    whole = Recording.tokenize(text_models.TRAJECTORIES[0], TOKENIZER)
    write_examples(text_models.TRAJECTORIES[:1], tmp_path, TOKENIZER, whole.num_tokens - 1)
    texts = [json.loads(line)["output"] for line in (tmp_path / "reflect.jsonl").read_text().splitlines()]
    assert len(texts) == sum(part.role == "reflect" for part in whole.parts) - 1
    assert recordings(text_models.TRAJECTORIES[:1], TOKENIZER, 3) == []
    [cut] = recordings(text_models.TRAJECTORIES[:1], TOKENIZER, whole.num_tokens - 1)
    assert cut.num_outputs == whole.num_outputs - 1


def test_the_script_writes_the_training_lines(tmp_path, capsys):
    model = text_models.write_text_model(tmp_path / "model")
    (tmp_path / "recorded.json").write_text(json.dumps(text_models.file_of(MANY)))
    out = tmp_path / "out"
    script = load_script("study")
    script.main(["--write-recorded", str(tmp_path / "recorded.json"), "--model", str(model), "--out", str(out)])
    assert json.loads(capsys.readouterr().out) == {
        "training": 8,
        "held_out": 2,
        "lines": {"plan": 16, "action": 8, "reflect": 16},
    }
    training, held_out = split(MANY)
    written = (out / "plan.jsonl").read_text()
    assert all(trajectory.question in written for trajectory in training)
    assert not any(trajectory.question in written for trajectory in held_out)
