"""What is shipped: real files of every layer, no links, and a package that imports where nothing else of us lies."""

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import lragent_jax

ROOT = Path(__file__).parents[1]
SHIPPED = ("kernels", "models", "lragent_jax")
CACHES = shutil.ignore_patterns("__pycache__")


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory) -> Path:
    """A copy of what a build reads, links kept, so that building leaves nothing behind in the working tree."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    for name in SHIPPED:
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=CACHES)
    return tree


@pytest.fixture(scope="module")
def sdist(source_tree) -> Iterator[tarfile.TarFile]:
    build(source_tree, "sdist")
    with tarfile.open(next((source_tree / "dist").glob("*.tar.gz"))) as archive:
        yield archive


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Iterator[zipfile.ZipFile]:
    """Built from the sdist, as pip does it: what one of the two lacks is missing here."""
    folder = tmp_path_factory.mktemp("unpacked")
    sdist.extractall(folder, filter="data")
    unpacked = next(folder.iterdir())
    build(unpacked, "wheel")
    with zipfile.ZipFile(next((unpacked / "dist").glob("*.whl"))) as archive:
        yield archive


def build(tree: Path, kind: str) -> None:
    """Runs the build backend in `tree`, which needs no network."""
    program = f"from setuptools import build_meta; build_meta.build_{kind}('dist')"
    done = subprocess.run([sys.executable, "-c", program], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def shipped_files() -> set[str]:
    """Every source and data file, under the name it has for whoever imports it."""
    files = set()
    for name in SHIPPED:
        inside = Path() if name == "lragent_jax" else Path(name)
        for file in (ROOT / name).rglob("*"):
            path = file.relative_to(ROOT / name)
            linked = any(parent.is_symlink() for parent in (file, *file.parents))
            if file.is_file() and not linked and "__pycache__" not in path.parts:
                files.add((Path("lragent_jax") / inside / path).as_posix())
    return files


def test_sdist_holds_every_file_and_no_link(sdist):
    top = sdist.getnames()[0].split("/")[0]
    names = {member.name.removeprefix(f"{top}/") for member in sdist if member.isfile()}
    assert shipped_files() <= names
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names
    assert [member.name for member in sdist if member.issym() or member.islnk()] == []
    assert [name for name in names if name.startswith(("tests/", "scripts/"))] == []


def test_wheel_holds_exactly_our_files(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == shipped_files()


def test_wheel_is_what_its_metadata_says(wheel):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = f"lragent_jax-{lragent_jax.__version__}.dist-info"
    metadata = wheel.read(f"{folder}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert f"Requires-Python: {','.join(sorted(project['requires-python'].split(',')))}" in metadata
    assert wheel.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert "lragent = lragent_jax.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()


def test_installed_wheel_imports(wheel, tmp_path):
    wheel.extractall(tmp_path)
    modules = "lragent_jax, lragent_jax.kernels.lora_attention, lragent_jax.models.llama"
    program = f"import {modules}; print(lragent_jax.__file__, lragent_jax.models.llama.__file__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(Path(file).is_relative_to(tmp_path) for file in done.stdout.split())
