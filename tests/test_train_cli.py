"""`lragent train` on a tiny model: what it prints where, and with which exit code."""

import json

import pytest
from script_modules import load_script
from test_cli import fail, no_cache_in_the_users_home, succeed  # noqa: F401  (a fixture that all of them need)
from text_models import CONFIG, write_text_model
from training_data import lines, write_lines

from lragent_jax.models.peft import read_peft
from lragent_jax.training import trainer
from lragent_jax.training.options import TrainingOptions


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def data(tmp_path):
    return write_lines(tmp_path / "plan.jsonl", lines())


@pytest.fixture
def asked(monkeypatch):
    """What the trainer is asked for, in place of a training."""
    calls = []

    def train(*args, **keywords):
        calls.append((args, keywords))
        result = {
            "steps": 1, "tokens_per_second": 2, "padding_share": 0.1, "train_loss": 1.0, "validation_loss": None,
            "validation_accuracy": None, "a_group": "abc",
        }  # fmt: skip
        return dict.fromkeys(args[1], result)

    monkeypatch.setattr(trainer, "train", train)
    return calls


def test_a_training_prints_a_table_and_a_line_of_json(model, data, tmp_path):
    out = tmp_path / "out"
    printed = succeed(
        "train", model, "--agent", f"plan={data}", "--validation", f"plan={data}", "--out", out, "--steps", 2,
        "--tokens-per-step", 128, "--sequence-length", 64, "--dtype", "float32", "--rank", 2, "--targets", "q",
    )  # fmt: skip
    result = json.loads(printed.splitlines()[-1])["agents"]["plan"]
    assert result == json.loads((out / "plan" / "training.json").read_text())
    assert read_peft(out / "plan", CONFIG).content_hash == result["content_hash"]
    assert "padding" in printed


def test_every_option_arrives(model, data, tmp_path, asked):
    printed = succeed(
        "train", model, "--agent", f"plan={data}", "--agent", "action=b.jsonl", "--validation", "action=c.jsonl",
        "--out", tmp_path, "--kind", "shared_a", "--rank", 3, "--alpha", 5, "--targets", "all", "--epochs", 2,
        "--learning-rate", 0.25, "--warmup", 7, "--weight-decay", 0.5, "--max-grad-norm", 2, "--tokens-per-step", 64,
        "--sequence-length", 128, "--seed", 9, "--dtype", "float16", "--validate-every", 4, "--checkpoint-every", 3,
        "--attention", "xla", "--remat", "dots", "--base-model", "a/b", "--init", "before", "--json",
    )  # fmt: skip
    [(args, keywords)] = asked
    assert [str(path) for path in args[1].values()] == [str(data), "b.jsonl"]
    assert str(keywords["validation"]["action"]) == "c.jsonl"
    assert (keywords["base_model"], str(keywords["init"])) == ("a/b", "before")
    assert keywords["options"] == TrainingOptions(
        kind="shared_a", rank=3, alpha=5, targets=("q", "k", "v", "o", "gate", "up", "down"), epochs=2,
        learning_rate=0.25, warmup=7, weight_decay=0.5, max_grad_norm=2, tokens_per_step=64, sequence_length=128,
        seed=9, dtype="float16", validate_every=4, checkpoint_every=3, attention="xla", remat="dots",
    )  # fmt: skip
    assert len(printed.splitlines()) == 1
    assert set(json.loads(printed)["agents"]) == {"plan", "action"}


def test_what_cannot_be_done_is_one_message(model, data, tmp_path):
    begin = ("train", model, "--agent", f"plan={data}", "--out", tmp_path / "out")
    assert "unknown targets: x" in fail(*begin, "--targets", "q,x")
    assert "rank must be" in fail(*begin, "--rank", 0)
    bad = write_lines(tmp_path / "bad.jsonl", ["{"])
    assert f"{bad}:1: no JSON" in fail("train", model, "--agent", f"plan={bad}", "--out", tmp_path / "out")
    assert "not of the form" in fail("train", model, "--agent", "plan", "--out", tmp_path / "out", code=2)
    assert "not of the form" in fail(*begin, "--mesh", "rows=2", code=2)
    assert "devices, not 64" in fail(*begin, "--mesh", "data=32,model=2", code=2)
    assert not (tmp_path / "out").exists()


def test_the_script_trains_the_three_roles(data, tmp_path, monkeypatch, capsys):
    calls = []
    script = load_script("train")
    monkeypatch.setattr(script, "train", lambda *args, **keywords: calls.append((args, keywords)) or {})
    monkeypatch.setattr(script.compilation_cache, "enable", lambda: None)
    options = "--validation held --init before --kind shared_a --targets q,v --rank 16"
    monkeypatch.setattr("sys.argv", ["train.py", "model", str(tmp_path), "out", *options.split()])
    script.main()
    [((model, agents, out), keywords)] = calls
    assert (str(model), str(out)) == ("model", "out")
    assert list(agents) == ["plan", "action", "reflect"]
    assert agents["action"] == tmp_path / "action.jsonl"
    assert list(map(str, keywords["validation"].values())) == [f"held/{role}.jsonl" for role in agents]
    assert str(keywords["init"]) == "before"
    assert keywords["options"] == TrainingOptions(kind="shared_a", rank=16)
    assert capsys.readouterr().out == "{}\n"
