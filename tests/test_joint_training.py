"""Agents that are trained at once: what comes out, what it is good for, and going on after a kill."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_cli import fail, no_cache_in_the_users_home, succeed  # noqa: F401  (a fixture that commands need)
from test_train import KeptPrograms, Killed
from text_models import CONFIG, tokenizer, write_text_model
from tolerances import assert_close
from training_data import ANSWERS, write_lines

from lragent_jax.engine import Engine
from lragent_jax.models.adapter_checkpoint import restore_adapter
from lragent_jax.models.errors import CheckpointError, InputError
from lragent_jax.models.peft import read_peft
from lragent_jax.training import joint_trainer, trainer
from lragent_jax.training.loss_curve import read_losses
from lragent_jax.training.options import TrainingOptions

AGENTS = ("plan", "action")
SETTINGS: dict[str, Any] = {
    "kind": "joint", "rank": 4, "alpha": 8, "steps": 30, "tokens_per_step": 256, "sequence_length": 128,
    "learning_rate": 3e-2, "dtype": "float32", "checkpoint_every": 100, "validate_every": 20,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_form_are_compiled_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "Programs", KeptPrograms)
        yield


def options(**changes: Any) -> TrainingOptions:
    return TrainingOptions(**SETTINGS | changes)


def trajectories() -> list[dict[str, Any]]:
    """Plan and action take turns; what action writes was in what plan or nobody wrote."""
    names, answers = list(ANSWERS), list(ANSWERS.values())
    lines = []
    for (i, name), (j, other) in itertools.product(enumerate(names), repeat=2):
        pieces = [
            (f"Question: {name} or {other}?\nThought 1:", None), (f" the {answers[(i + j) % 4]}\n", "plan"),
            ("Action 1:", None), (" Search[", "plan"), (f"{name}]\n", "action"), ("Thought 2:", None),
            (f" {other}\n", "plan"), ("Action 2: Finish[", None), (f"{answers[j]}]\n", "action"),
        ]  # fmt: skip
        lines.append({"pieces": [{"text": text, "agent": agent} for text, agent in pieces]})
    return lines


def examples(agent: str) -> list[dict[str, str]]:
    """The same for one agent."""
    lines = []
    for line in trajectories():
        text = ""
        for piece in line["pieces"]:
            if piece["agent"] == agent:
                lines.append({"input": text, "output": piece["text"]})
            text += piece["text"]
    return lines


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("joint")
    by_agent = {agent: write_lines(folder / f"{agent}.jsonl", examples(agent)) for agent in AGENTS}
    whole = write_lines(folder / "trajectories.jsonl", trajectories())
    return {"model": write_text_model(folder / "model"), "trajectories": whole, **by_agent}


def run(files: dict[str, Path], out: Path, progress=None, init=None, data=None, **changes):
    return joint_trainer.train_jointly(
        files["model"], data or files["trajectories"], out,
        validation=files["trajectories"], options=options(**changes), init=init,
        base_model="some/base", progress=progress,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory) -> tuple[Path, dict[str, dict[str, Any]]]:
    out = tmp_path_factory.mktemp("out") / "joint"
    return out, run(files, out)


@pytest.fixture(scope="module")
def apart(files, tmp_path_factory) -> Path:
    """One agent after the other, with as many steps for each as the others have for all."""
    out = tmp_path_factory.mktemp("out") / "shared_a"
    trainer.train(files["model"], {agent: files[agent] for agent in AGENTS}, out, options=options(kind="shared_a"))
    return out


def losses(out: Path) -> list[dict[str, Any]]:
    """What does not depend on the clock."""
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_losses(out / "losses.jsonl")]


def test_one_training_makes_all_agents_one_a_group(trained):
    out, results = trained
    assert sorted(path.name for path in out.iterdir()) == [
        "action", "action.orbax", "losses.jsonl", "lragent_training.json", "plan", "plan.orbax",
    ]  # fmt: skip
    curve = losses(out)
    seen = {line["step"]: line["validation"] for line in curve if "validation" in line}
    assert list(seen) == [0, 20, 30]
    steps = [line["loss"] for line in curve if "loss" in line]
    assert len(steps) == 30
    assert steps[-1] < 0.6 * steps[0]
    for agent in AGENTS:
        result = results[agent]
        assert result == json.loads((out / agent / "training.json").read_text())
        assert_close(result["train_loss"], np.mean(steps[-3:]), "equal")
        assert seen[30][agent] == {name: result[name] for name in seen[30][agent]}
        for name in ("validation_loss", "separate_loss"):
            assert seen[30][agent][name] < 0.7 * seen[0][agent][name]
        adapter = read_peft(out / agent, CONFIG)
        assert adapter.content_hash == restore_adapter(out / f"{agent}.orbax").content_hash == result["content_hash"]
    assert results["plan"]["a_group"] == results["action"]["a_group"] is not None
    plan, action = (load_file(out / agent / "adapter_model.safetensors") for agent in AGENTS)
    for name in plan:
        assert np.array_equal(plan[name], action[name]) == name.endswith("v_proj.lora_A.weight"), name


def test_an_engine_that_shares_the_cache_has_the_losses_that_training_saw(trained, files):
    out, results = trained
    engine = Engine.from_pretrained(
        files["model"], {agent: out / agent for agent in AGENTS}, dtype="float32", sharing="base_lr", num_pages=32,
        page_size=16, prefill_buckets=(32,), prefix_cache=False,
    )  # fmt: skip
    found: dict[str, list[float]] = {agent: [] for agent in AGENTS}
    for line in trajectories():
        with engine.trajectory() as turns:
            for piece in line["pieces"]:
                if piece["agent"] is None:
                    turns.append(piece["text"])
                    continue
                ids = tokenizer().encode(piece["text"])
                scores = engine.score(turns, ids, piece["agent"]).astype(np.float64)
                lse = np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1)) + scores.max(-1)
                found[piece["agent"]] += (lse - scores[np.arange(len(ids)), ids]).tolist()
    for agent in AGENTS:
        assert_close(results[agent]["validation_loss"], np.mean(found[agent]), "equal")


def test_agents_read_each_other_better_than_those_trained_apart(trained, apart, files, tmp_path):
    """On the shared cache. The others have no step less, and read better what they have run themselves."""
    _, joint = trained
    others = run(files, tmp_path / "look", init=apart, steps=1, learning_rate=1e-12, warmup=0)
    assert joint["action"]["validation_loss"] < others["action"]["validation_loss"] - 0.2
    assert others["action"]["separate_loss"] < others["action"]["validation_loss"] - 0.3, "nothing to cure"
    drift = {name: found["action"]["validation_loss"] - found["action"]["separate_loss"]
             for name, found in (("joint", joint), ("apart", others))}  # fmt: skip
    assert drift["joint"] < 0 < drift["apart"]


def test_killed_and_called_again_it_is_the_same(files, tmp_path):
    whole = run(files, tmp_path / "whole", steps=5, checkpoint_every=3)

    def kill(done: int, total: int, what: str) -> None:
        if what.startswith("joint: loss") and done == 5:
            raise Killed

    with pytest.raises(Killed):
        run(files, tmp_path / "joint", kill, steps=5, checkpoint_every=3)
    assert (tmp_path / "joint" / "checkpoints" / "joint" / "step_3").is_dir()
    started: list[str] = []
    again = run(
        files,
        tmp_path / "joint",
        lambda done, total, what: started.append(f"{done} {what}"),
        steps=5,
        checkpoint_every=3,
    )
    assert [text[:13] for text in started if "loss" in text] == ["4 joint: loss", "5 joint: loss"]
    assert losses(tmp_path / "joint") == losses(tmp_path / "whole")
    clock = dict.fromkeys(("seconds", "tokens_per_second"))
    for agent in AGENTS:
        assert again[agent] | clock == whole[agent] | clock
    assert not (tmp_path / "joint" / "checkpoints").exists()
    told: list[str] = []
    assert (
        run(files, tmp_path / "joint", lambda done, total, what: told.append(what), steps=5, checkpoint_every=3)
        == again
    )
    assert not [what for what in told if "loss" in what or "compiling" in what]


def test_other_settings_in_the_same_folder_are_refused(trained, files, tmp_path):
    out, _ = trained
    with pytest.raises(CheckpointError, match="other settings") as caught:
        run(files, out, separate_share=0.5)
    assert str(caught.value).splitlines()[1:] == ["  - separate_share: 0.25 there, 0.5 now"]
    other = write_lines(tmp_path / "other.jsonl", trajectories()[1:])
    with pytest.raises(CheckpointError, match="data: "):
        run(files, out, data=other)


def test_what_cannot_be_trained_at_once_is_refused(files, apart, tmp_path):
    out = tmp_path / "out"
    line = {"pieces": [{"text": "a"}, {"text": "b", "agent": "somebody"}]}
    other = write_lines(tmp_path / "other.jsonl", [line])
    with pytest.raises(InputError, match="validation outputs of plan, action, who is not trained"):
        run(files, out, data=other)
    line["pieces"][1]["agent"] = "../plan"  # type: ignore[assignment]
    with pytest.raises(InputError, match="cannot be the name of a folder"):
        run(files, out, data=write_lines(tmp_path / "path.jsonl", [line]))
    with pytest.raises(InputError, match="somebody: there is no folder"):
        joint_trainer.train_jointly(files["model"], other, out, init=apart, options=options())
    with pytest.raises(InputError, match="kind apart does not train on trajectories"):
        joint_trainer.train_jointly(files["model"], other, out, options=options(kind="apart"))
    with pytest.raises(InputError, match="kind joint trains on whole trajectories"):
        trainer.train(files["model"], {"plan": files["plan"]}, out, options=options())
    assert not out.exists()


def test_agents_of_several_a_groups_are_not_started_from(files, trained, apart, tmp_path):
    for agent, folder in zip(AGENTS, (trained[0], apart), strict=True):
        (tmp_path / "mixed").mkdir(exist_ok=True)
        (tmp_path / "mixed" / agent).symlink_to(folder / agent)
    with pytest.raises(InputError, match="its agents are not one A-group"):
        run(files, tmp_path / "out", init=tmp_path / "mixed")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"kind": "joint", "targets": ("q", "k", "v")}, "kind joint cannot adapt k"),
        ({"kind": "joint", "separate_share": 1.5}, "separate_share must be a number from 0 to 1"),
        ({"kind": "joint", "separate_share": True}, "separate_share must be a number"),
        ({"kind": "apart", "separate_share": 0.5}, "an option of the kind joint alone"),
    ],
)
def test_options_that_mean_nothing_are_refused(changes, problem):
    with pytest.raises(InputError, match=problem):
        TrainingOptions(**changes)


def test_other_kinds_do_not_know_the_share():
    assert "separate_share" not in TrainingOptions(kind="shared_a").settings()
    assert TrainingOptions(kind="joint").settings()["separate_share"] == 0.25


def test_the_command_takes_trajectories(files, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(joint_trainer, "train_jointly", lambda *args, **keywords: calls.append((args, keywords)) or {})
    begin = ("train", files["model"], "--out", tmp_path / "out")
    printed = succeed(
        *begin, "--kind", "joint", "--trajectories", "a.jsonl", "--validation-trajectories", "b.jsonl",
        "--separate-share", 0.5, "--init", "before", "--base-model", "a/b", "--json",
    )  # fmt: skip
    [((model, data, out), keywords)] = calls
    assert (model, data, out) == (files["model"], Path("a.jsonl"), tmp_path / "out")
    assert (keywords["validation"], keywords["init"], keywords["base_model"]) == (
        Path("b.jsonl"),
        Path("before"),
        "a/b",
    )
    assert keywords["options"] == TrainingOptions(kind="joint", separate_share=0.5)
    assert json.loads(printed)["agents"] == {}
    for given, problem in (
        (("--kind", "joint"), "give their file"),
        (("--kind", "joint", "--trajectories", "a", "--agent", "plan=a"), "in --trajectories alone"),
        (("--trajectories", "a"), "ask for --kind joint"),
        ((), "name an agent and its file"),
    ):
        assert problem in " ".join(fail(*begin, *given, code=2).split())
