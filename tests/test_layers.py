"""The layers of the house: imports go down only, and no file outgrows a head."""

import ast
import dataclasses
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from lragent_jax.models.config import Llama3RopeScaling, LlamaConfig

ROOT = Path(__file__).parents[1]
LAYERS = ("kernels", "models", "lragent_jax", "scripts")
"""From the ground up."""

KERNELS_MAY_IMPORT = {"jax", "numpy", "jaxtyping", *sys.stdlib_module_names}
MAX_LINES = 500


def files_of(layer: str) -> list[Path]:
    """Python files of a top-level folder, without those of the folders that are linked into it."""
    files = sorted((ROOT / layer).rglob("*.py"))
    return [file for file in files if not any(parent.is_symlink() for parent in file.parents)]


def imports_of(source: str) -> Iterator[str]:
    """Full names of what a file imports: for `from a.b import c` it is `a.b.c`, for a relative import `.`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" if not node.level else "." for alias in node.names)


def layer_of(name: str) -> str | None:
    """The layer that a module belongs to; None if it is not ours."""
    first, *rest = name.split(".")
    if first != "lragent_jax":
        return None
    return rest[0] if rest and rest[0] in LAYERS else first


def wrong_imports(layer: str, source: str) -> list[str]:
    """What a file of `layer` imports and may not; `tests` may look into every layer but scripts."""
    allowed = LAYERS[: LAYERS.index(layer) + 1] if layer in LAYERS else LAYERS[:-1]
    wrong = []
    for name in imports_of(source):
        first, imported = name.split(".")[0], layer_of(name)
        third_party_in_kernels = layer == "kernels" and imported is None and first not in KERNELS_MAY_IMPORT
        by_plain_name = first in ("", "kernels", "models", "scripts", "tests")
        if by_plain_name or third_party_in_kernels or (imported is not None and imported not in allowed):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("layer", [*LAYERS, "tests"])
def test_imports_go_down_only(layer):
    wrong = {str(file.relative_to(ROOT)): wrong_imports(layer, file.read_text()) for file in files_of(layer)}
    assert wrong, f"found no files in {layer}"
    assert {file: names for file, names in wrong.items() if names} == {}


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("kernels", "import flax"),
        ("kernels", "from lragent_jax.models import config"),
        ("kernels", "def f():\n    from lragent_jax.models.config import LlamaConfig"),
        ("kernels", "import lragent_jax"),
        ("kernels", "from . import api"),
        ("models", "from lragent_jax.engine import Engine"),
        ("models", "from lragent_jax import sharing"),
        ("models", "import models.config"),
        ("models", "from kernels.lora_attention import api"),
        ("lragent_jax", "import scripts.generate"),
        ("lragent_jax", "from tests.tolerances import assert_close"),
        ("tests", "from scripts import generate"),
    ],
)
def test_an_import_that_goes_up_is_found(layer, source):
    assert len(wrong_imports(layer, source)) == 1


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("kernels", "import math, jax.numpy, jaxtyping\nfrom lragent_jax.kernels.lora_attention import api"),
        ("models", "import flax\nfrom lragent_jax import kernels\nfrom lragent_jax.models import config"),
        ("lragent_jax", "from lragent_jax import models\nfrom lragent_jax.engine import Engine"),
        ("scripts", "import lragent_jax as lra"),
    ],
)
def test_an_import_that_goes_down_passes(layer, source):
    assert wrong_imports(layer, source) == []


def test_linked_folders_are_relative_links_and_no_packages_of_their_own():
    for name in ("kernels", "models"):
        assert (ROOT / "lragent_jax" / name).readlink() == Path("..") / name
        # transformers probes for an installed package named `kernels`, and would take ours.
        assert not (ROOT / name / "__init__.py").exists()


def distribution(name: str) -> str:
    """A distribution's name in the one spelling that registries compare."""
    return name.replace("_", "-").lower()


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {distribution(re.split(r"[^\w.-]", line)[0]) for line in project["dependencies"]}
    distributions = packages_distributions()
    undeclared = {}
    for file in (file for layer in LAYERS for file in files_of(layer)):
        for name in imports_of(file.read_text()):
            package = name.split(".")[0]
            if package in sys.stdlib_module_names or package == "lragent_jax":
                continue
            if not declared & {distribution(name) for name in distributions.get(package, [package])}:
                undeclared[package] = str(file.relative_to(ROOT))
    assert undeclared == {}


@pytest.mark.parametrize("module", ["lragent_jax", "lragent_jax.kernels.lora_attention"])
def test_low_layers_do_not_load_what_is_above_them(module):
    assert loaded(module, HEAVY) == []


def test_an_engine_does_not_wait_for_readers_of_files_that_it_may_not_have():
    assert loaded("lragent_jax.engine", ("orbax", "transformers", "tokenizers")) == []


def loaded(module: str, packages: tuple[str, ...]) -> list[str]:
    """Modules of these packages that importing `module` has imported."""
    program = f"import sys, {module}\nprint(*sorted(m for m in sys.modules if m.split('.')[0] in {packages}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


HEAVY = ("flax", "orbax", "transformers", "tokenizers", "gguf", "typer", "rich")


@pytest.mark.parametrize("config", [LlamaConfig, Llama3RopeScaling])
def test_every_config_field_is_read_somewhere(config):
    read = {
        node.attr
        for file in (file for layer in LAYERS for file in files_of(layer))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    assert {field.name for field in dataclasses.fields(config)} - read == set()


def test_no_file_outgrows_a_head():
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text().splitlines())
        for layer in (*LAYERS, "tests")
        for file in files_of(layer)
    }
    assert {file: length for file, length in lengths.items() if length > MAX_LINES} == {}
