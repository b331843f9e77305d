"""What the README shows is there, and runs."""

import asyncio
import inspect
import re
import shlex
import textwrap
from pathlib import Path

import engines
import pytest
import text_models
from typer.core import TyperGroup
from typer.main import get_command

import lragent_jax as lra
from lragent_jax import embedded, episodes
from lragent_jax.cli.app import app
from lragent_jax.sharing import SHARING_MODES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FILES = (ROOT / "docs" / "files.md").read_text()
FOLDERS = ("kernels", "kernels/lora_attention", "models", "lragent_jax", "lragent_jax/cli", "scripts")


def code_block(start: str, text: str = README) -> str:
    """The fenced block whose text begins with `start`."""
    [block] = [block for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) if block.startswith(start)]
    return block


def commands() -> list[str]:
    """The shell lines that call `lragent`, continuations joined."""
    joined = code_block("lragent demo").replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.startswith("lragent ")]


def command_line() -> TyperGroup:
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    return group


def test_fits_in_one_reading():
    assert len(README.splitlines()) <= 250


def test_the_list_of_files_names_every_one_once():
    listed, folder = [], ""
    for line in code_block("kernels/lora_attention/", FILES).splitlines():
        name, description = line.strip().split(maxsplit=1)
        assert description
        if line.startswith(" "):
            listed.append(f"{folder}{name}")
        else:
            folder = name
    files = [str(file.relative_to(ROOT)) for folder in FOLDERS for file in (ROOT / folder).glob("*.py")]
    assert sorted(name for name in listed if name.endswith(".py")) == sorted(
        file for file in files if not file.endswith("__init__.py")
    )
    assert all((ROOT / name).exists() for name in listed)


def test_the_first_python_example_runs(monkeypatch, capsys):
    example = compile(code_block("import lragent_jax"), "README.md", "exec")

    def embedded_engine(*args, **options):
        bound = inspect.signature(embedded.embedded_engine).bind(*args, **options)
        return text_models.text_engine(sharing=bound.arguments["sharing"], num_pages=256)

    monkeypatch.setattr(lra, "embedded_engine", embedded_engine)
    monkeypatch.setattr(episodes, "_MOST_TOKENS", {"thought": 3, "tool": 2, "argument": 3, "verdict": 2})
    exec(example, {})
    assert "Question: " in capsys.readouterr().out


def test_the_second_python_example_runs(monkeypatch, capsys):
    example = compile(code_block("engine = lra.Engine.from_pretrained("), "README.md", "exec")
    calls = []

    def from_pretrained(model, **options):
        inspect.signature(lra.Engine.from_pretrained).bind(model, **options)
        del options["adapters"], options["dtype"]
        calls.append(options)
        inspect.signature(lra.Engine.__init__).bind(None, None, None, None, None, **options)
        return engines.tiny_engine(options["sharing"], tokenizer=engines.ascii_tokenizer())

    monkeypatch.setattr(lra.Engine, "from_pretrained", from_pretrained)
    exec(example, {"lra": lra})
    assert len(calls) == 1
    assert len(capsys.readouterr().out) > 0


def test_the_example_for_a_server_runs(capsys):
    body = textwrap.indent(code_block("async with lra.AsyncEngine"), "    ")
    names = {"lra": lra, "engine": engines.tiny_engine("base_lr", tokenizer=engines.ascii_tokenizer())}
    exec(compile(f"async def main():\n{body}", "README.md", "exec"), names)
    asyncio.run(names["main"]())
    assert len(capsys.readouterr().out) > 0


def test_the_calls_it_mentions_exist():
    for name in re.findall(r"`engine\.(\w+)\(", README):
        assert callable(getattr(lra.Engine, name))
    for name in re.findall(r"`trajectory\.(\w+)\(", README):
        assert callable(getattr(lra.Trajectory, name))
    for name in re.findall(r"`lra\.(\w+)", README):
        assert name in lra.__all__


def test_the_table_has_every_mode():
    section = README.split("## The sharing modes")[1].split("\n## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", section, re.M)) == SHARING_MODES


@pytest.mark.parametrize("line", commands())
def test_the_command_lines_are_understood(line):
    _, name, *arguments = shlex.split(line)
    command_line().commands[name].make_context(name, arguments)


def test_every_command_is_shown():
    assert {shlex.split(line)[1] for line in commands()} == set(command_line().commands)
