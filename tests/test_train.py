"""Agents are trained, cut off, gone on with and written, on a task that a tiny model learns."""

import itertools
import json
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from text_models import CONFIG, tokenizer, write_text_model
from tolerances import assert_close
from training_data import lines, write_lines

from lragent_jax.engine import Engine
from lragent_jax.models.adapter_checkpoint import restore_adapter
from lragent_jax.models.errors import CheckpointError, ConfigError, InputError, LRAgentError
from lragent_jax.models.peft import read_peft
from lragent_jax.training import trainer
from lragent_jax.training.checkpoints import TrainingCheckpoints
from lragent_jax.training.loss_curve import LossCurve, read_losses
from lragent_jax.training.options import TrainingOptions
from lragent_jax.training.programs import Programs, learning_rate
from lragent_jax.training.trainer import train

SETTINGS: dict[str, Any] = {
    "kind": "shared_a", "rank": 4, "alpha": 6, "targets": ("q", "v"), "steps": 24, "tokens_per_step": 128,
    "sequence_length": 64, "learning_rate": 3e-2, "dtype": "float32", "checkpoint_every": 23, "validate_every": 10,
}  # fmt: skip


class Killed(Exception):
    pass


class KeptPrograms(Programs):
    """Weights are arguments of programs: all trainings of one form can run the same ones."""

    kept: ClassVar[dict[Any, dict]] = {}

    def __init__(self, config, graphdef, params, options):
        super().__init__(config, graphdef, params, options)
        form = options.rank, options.targets, options.scale, options.max_grad_norm, options.weight_decay
        self._compiled = self.kept.setdefault(form, {})


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_form_are_compiled_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "Programs", KeptPrograms)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("training")
    return {
        "model": write_text_model(folder / "model"),
        "plan": write_lines(folder / "plan.jsonl", lines()),
        "action": write_lines(folder / "action.jsonl", lines(shift=1)),
    }


def run(files: dict[str, Path], out: Path, progress=None, init=None, validation=None, **changes):
    agents = {name: files[name] for name in ("plan", "action")}
    validation = {"action": files["action"]} if validation is None else validation
    options = TrainingOptions(**SETTINGS | changes)
    return trainer.train(
        files["model"], agents, out,
        validation=validation, options=options, init=init, base_model="some/base", progress=progress,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory) -> tuple[Path, dict[str, dict[str, Any]]]:
    out = tmp_path_factory.mktemp("out") / "agents"
    return out, run(files, out)


def losses(out: Path, agent: str) -> list[dict[str, Any]]:
    """What does not depend on the clock."""
    return [
        {k: v for k, v in line.items() if k != "tokens_per_second"}
        for line in read_losses(out / agent / "losses.jsonl")
    ]


def test_losses_go_down(trained):
    out, results = trained
    for agent in ("plan", "action"):
        curve = [line["loss"] for line in losses(out, agent) if "loss" in line]
        assert len(curve) == SETTINGS["steps"]
        assert curve[-1] < 0.5 * curve[0]
        assert_close(results[agent]["train_loss"], np.mean(curve[-2:]), "equal")
    seen = [line["step"] for line in losses(out, "action") if "validation_loss" in line]
    assert seen == [0, 10, 20, 24]
    assert results["action"]["validation_loss"] < 0.5 * losses(out, "action")[0]["validation_loss"]
    assert results["plan"]["validation_loss"] is None
    assert not (out / "checkpoints").exists()


def test_shared_a_stays_as_it_is(trained):
    out, results = trained
    plan, action = (load_file(out / agent / "adapter_model.safetensors") for agent in ("plan", "action"))
    assert plan.keys() == action.keys()
    for name in plan:
        same = np.array_equal(plan[name], action[name])
        assert same == name.endswith("v_proj.lora_A.weight"), name
    assert results["plan"]["a_group"] == results["action"]["a_group"] is not None


def test_an_engine_reads_what_was_written(trained, files):
    """With alpha / r = 1.5 as PEFT sees it, and folded in; the engine's losses are those that training saw."""
    out, results = trained
    fields = json.loads((out / "plan" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["base_model_name_or_path"]) == (4, 6, "some/base")
    adapter = read_peft(out / "plan", CONFIG)
    assert adapter.content_hash == restore_adapter(out / "plan.orbax").content_hash == results["plan"]["content_hash"]
    stored = load_file(out / "plan" / "adapter_model.safetensors")
    b = stored["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"]
    np.testing.assert_array_equal(adapter.weights[1, "v"].lora_b, b.T * np.float32(1.5))
    engine = Engine.from_pretrained(
        files["model"], {"action": out / "action"}, dtype="float32", sharing="none", num_pages=32, page_size=16,
        prefill_buckets=(32,),
    )  # fmt: skip
    of_tokens, right = [], []
    for line in lines(shift=1):
        ids = tokenizer().encode(line["output"])
        with engine.trajectory().append(line["input"]) as trajectory:
            scores = engine.score(trajectory, ids, "action").astype(np.float64)
        of_tokens += [
            np.log(np.exp(row - row.max()).sum()) + row.max() - row[i] for row, i in zip(scores, ids, strict=True)
        ]
        right += (scores.argmax(-1) == ids).tolist()
    assert_close(results["action"]["validation_loss"], np.mean(of_tokens), "equal")
    assert results["action"]["validation_accuracy"] == pytest.approx(np.mean(right))


def test_killed_and_called_again_it_is_the_same(trained, files, tmp_path):
    """Also what is told of the last steps, some of which were run before the kill."""
    out, results = trained

    def kill(done: int, total: int, what: str) -> None:
        if what.startswith("action: loss") and done == 24:
            raise Killed

    with pytest.raises(Killed):
        run(files, tmp_path / "agents", kill)
    assert (tmp_path / "agents" / "checkpoints" / "action" / "step_23").is_dir()
    assert read_losses(tmp_path / "agents" / "action" / "losses.jsonl")[-1]["step"] == 24
    started: list[str] = []
    again = run(files, tmp_path / "agents", lambda done, total, what: started.append(f"{done} {what}"))
    assert [text[:15] for text in started if "loss" in text] == ["24 action: loss"]
    clock = dict.fromkeys(("seconds", "tokens_per_second"))
    for agent in ("plan", "action"):
        assert losses(tmp_path / "agents", agent) == losses(out, agent)
        assert again[agent] | clock == results[agent] | clock


def test_finished_agents_are_not_trained_again(trained, files):
    out, results = trained
    told: list[str] = []
    assert run(files, out, lambda done, total, what: told.append(what)) == results
    assert not [what for what in told if "loss" in what or "compiling" in what]


def test_other_settings_in_the_same_folder_are_refused(trained, files, tmp_path):
    out, _ = trained
    with pytest.raises(CheckpointError, match="other settings") as caught:
        run(files, out, learning_rate=1e-3, targets=("v",), validate_every=1)
    assert str(caught.value).splitlines()[1:] == [
        '  - targets: ["q", "v"] there, ["v"] now',
        "  - learning_rate: 0.03 there, 0.001 now",
    ]
    with pytest.raises(CheckpointError, match=r'validation.action: "\w+" there, nothing now'):
        run(files, out, validation={})
    other = write_lines(tmp_path / "plan.jsonl", lines(shift=2))
    with pytest.raises(CheckpointError, match=r"data\.plan: "):
        run(files | {"plan": other}, out)


def test_another_model_or_batch_in_the_same_folder_is_refused(trained, files, tmp_path, monkeypatch):
    out, _ = trained
    weights = load_file(files["model"] / "model.safetensors")
    model = write_text_model(tmp_path / "model")
    save_file({name: 2 * w for name, w in weights.items()}, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="weights: "):
        run(files | {"model": model}, out)
    tokenizer_file = json.loads((model / "tokenizer.json").read_text())
    tokenizer_file["model"]["merges"] = tokenizer_file["model"]["merges"][:20]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer_file))
    with pytest.raises(CheckpointError, match=r"token_ids\.plan: "):
        run(files | {"model": model}, out)
    monkeypatch.setattr(trainer, "num_data_parts", lambda mesh: 8)
    with pytest.raises(CheckpointError, match=r"rows_per_step\.64: 2 there, 8 now"):
        run(files, out)


def test_a_training_starts_from_the_adapters_of_another(trained, files, tmp_path):
    out, results = trained
    folder = tmp_path / "further"
    run(files, folder, init=out, steps=1, learning_rate=1e-12, warmup=0, kind="apart")
    first = losses(folder, "action")[0]
    assert_close(first["validation_loss"], results["action"]["validation_loss"], "equal")
    for agent in ("plan", "action"):
        one, other = (read_peft(path / agent, CONFIG) for path in (out, folder))
        for place, pair in one.weights.items():
            assert_close(other.weights[place].lora_a, pair.lora_a, "equal")
            assert_close(other.weights[place].lora_b, pair.lora_b, "equal")
    settings = json.loads((folder / "lragent_training.json").read_text())["settings"]
    assert settings["init"] == {agent: results[agent]["content_hash"] for agent in ("plan", "action")}
    with pytest.raises(CheckpointError, match=r"init\.plan: .* there, nothing now"):
        run(files, folder, steps=1, learning_rate=1e-12, warmup=0, kind="apart")


def test_a_shared_a_is_the_first_agents_new_one(trained, files, tmp_path):
    out, results = trained
    again = run(files, tmp_path / "further", init=out, steps=2)
    assert again["plan"]["a_group"] == again["action"]["a_group"] != results["plan"]["a_group"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rank": 2, "alpha": 3}, "plan: q of layer 0 has rank 4 and alpha 6 there, asked for are 2 and 3"),
        ({"alpha": 8}, "action: q of layer 0 has rank 4 and alpha 6 there, asked for are 4 and 8"),
        ({"targets": ("v",)}, "plan: targets are q,v there, v asked for"),
    ],
)
def test_adapters_of_another_form_are_not_started_from(trained, files, tmp_path, changes, problem):
    with pytest.raises(InputError, match="cannot be started from") as caught:
        run(files, tmp_path / "further", init=trained[0], **changes)
    assert f"  - {problem}" in str(caught.value).splitlines()
    with pytest.raises(InputError, match=r"action: there is no folder .*nowhere/action"):
        run(files, tmp_path / "further", init=tmp_path / "nowhere")
    assert not (tmp_path / "further").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match=r"cannot be made: .* is not writable"):
        train("absent", {"plan": "absent.jsonl"}, tmp_path / "out")


def test_folders_that_hold_something_else_are_refused(files, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("keep me")
    with pytest.raises(CheckpointError, match="holds other things"):
        run(files, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is a file"):
        run(files, tmp_path / "out" / "notes.txt")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "checkpoints", "plan.orbax", "lragent_training.json"])
def test_names_that_make_no_folder_are_refused(files, tmp_path, name):
    with pytest.raises(InputError, match="call the agent something else"):
        train(files["model"], {name: files["plan"]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_trained_on_is_refused(files, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="there is no agent"):
        train(files["model"], {}, out)
    with pytest.raises(InputError, match="validation examples for plam, who is not trained"):
        train(files["model"], {"plan": files["plan"]}, out, validation={"plam": files["plan"]})
    bad = write_lines(tmp_path / "bad.jsonl", [*lines(), {"input": "a", "output": ""}])
    with pytest.raises(InputError, match=r"bad\.jsonl:9: the output is empty"):
        train(files["model"], {"plan": bad}, out)
    with pytest.raises(InputError, match=r"bad\.jsonl:9: the output is empty"):
        train(files["model"], {"plan": files["plan"]}, out, validation={"plan": bad})
    mute = write_text_model(tmp_path / "mute")
    (mute / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="came without a tokenizer"):
        train(mute, {"plan": files["plan"]}, out)
    with pytest.raises(InputError, match="there is no file"):
        train(files["model"], {"plan": tmp_path / "none.jsonl"}, out)
    with pytest.raises(CheckpointError, match="no model"):
        train(tmp_path / "nowhere", {"plan": files["plan"]}, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1"),
        ({"rank": True}, "rank must be a whole number"),
        ({"rank": None}, "rank must be a whole number"),
        ({"kind": "shared_a", "targets": ("q", "up")}, "shares A of k or v: name one of them in targets"),
        ({"targets": ("q", "w")}, "unknown targets: w; there are: q, k, v"),
        ({"targets": ()}, "targets is empty"),
        ({"kind": "together"}, "kind must be one of apart, shared_a"),
        ({"steps": 0}, "steps must be"),
        ({"alpha": float("inf")}, "alpha must be a positive number"),
        ({"learning_rate": -1.0}, "learning_rate must be"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"sequence_length": 100}, "multiple of 64"),
        ({"warmup": -1}, "warmup must be"),
        ({"remat": "all"}, "remat must be one of"),
        ({"attention": "flash"}, "attention must be one of cudnn, xla"),
    ],
)
def test_options_that_mean_nothing_are_refused(changes, problem):
    with pytest.raises(InputError, match=problem):
        TrainingOptions(**changes)


def test_a_dtype_that_weights_cannot_have_is_refused():
    with pytest.raises(ConfigError, match="int8"):
        TrainingOptions(dtype="int8")


def test_a_loss_that_is_no_number_ends_it(files, tmp_path):
    with pytest.raises(LRAgentError, match=r"the loss of plan is .* a lower learning rate"):
        train(
            files["model"], {"plan": files["plan"]}, tmp_path / "out",
            options=TrainingOptions(**{**SETTINGS, "learning_rate": 1e38}),
        )  # fmt: skip


def test_the_rate_rises_and_falls():
    options = TrainingOptions(learning_rate=1.0, warmup=4)
    rates = [learning_rate(options, step, 12) for step in range(12)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[4:]))
    assert_close(rates[8], 0.5, "equal")
    assert learning_rate(TrainingOptions(learning_rate=1.0, warmup=50), 11, 12) == 1.0  # never reached its fall


def test_states_on_disk(tmp_path):
    checkpoints = TrainingCheckpoints(tmp_path / "states")
    state = {"a": np.arange(3, dtype=np.float32), "b": (np.int32(5), {"c": np.eye(2, dtype=np.float32)})}
    like = jax.tree.map(jax.numpy.zeros_like, state)
    assert checkpoints.restore(like) is None
    for step in (4, 8, 12):
        checkpoints.save(step, jax.tree.map(lambda leaf, step=step: jax.numpy.asarray(leaf) + step, state))
    assert sorted(path.name for path in (tmp_path / "states").iterdir()) == ["step_12", "step_8"]
    (tmp_path / "states" / ".step_16.draft").mkdir()  # what a kill in the middle of a save leaves
    found = checkpoints.restore(like)
    assert found is not None
    assert found[0] == 12
    jax.tree.map(lambda got, want: np.testing.assert_array_equal(got, want + 12), found[1], state)
    with pytest.raises(CheckpointError, match=r"array 0 is .*; delete it"):
        checkpoints.restore(like | {"a": jax.numpy.zeros(4)})
    with pytest.raises(CheckpointError, match="holds 3 arrays, not 1; delete it"):
        checkpoints.restore(jax.numpy.zeros(3))
    checkpoints.clear()
    assert not (tmp_path / "states").exists()


def test_a_loss_file_goes_on_where_the_state_is(tmp_path):
    path = tmp_path / "agent" / "losses.jsonl"
    curve = LossCurve(path, 0)
    for step in range(1, 6):
        curve.add(step=step, loss=1.0 / step)
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # a kill in the middle of a line
    LossCurve(path, 3).add(step=4, loss=0.5)
    assert [line["step"] for line in read_losses(path)] == [1, 2, 3, 4]
    LossCurve(path, 0)
    assert read_losses(path) == []
