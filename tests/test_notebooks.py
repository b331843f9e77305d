"""The notebooks, cell by cell, in a fresh process on eight virtual devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_of(notebook: Path) -> str:
    cells = json.loads(notebook.read_text())["cells"]
    assert all(not cell.get("outputs") for cell in cells), "outputs belong to whoever ran it: clear them"
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook):
    environment = {
        name: value for name, value in os.environ.items() if name not in ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE")
    } | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    command = [sys.executable, "-W", "error", "-c", code_of(notebook)]
    run = subprocess.run(
        command, env=environment, cwd=notebook.parent, capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr[-4000:]
    lines = run.stdout.splitlines()
    assert lines[0] == "8 x cpu"
    assert [line.split("|")[0].strip() for line in lines[-3:]] == ["sharing", "none", "base_lr"]
    prefilled = [int(line.split("|")[1]) for line in lines[-2:]]
    assert prefilled[0] > 2 * prefilled[1] > 0


def test_there_are_notebooks():
    assert NOTEBOOKS
