"""The notebooks, cell by cell, in a fresh process on eight virtual devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import text_models

ROOT = Path(__file__).parents[1]


def code_of(notebook: Path) -> str:
    cells = json.loads(notebook.read_text())["cells"]
    assert all(not cell.get("outputs") for cell in cells), "outputs belong to whoever ran it: clear them"
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def run(name: str, **variables: str) -> list[str]:
    """What a notebook prints, line by line."""
    notebook = ROOT / "notebooks" / f"{name}.ipynb"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE")
    } | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    command = [sys.executable, "-W", "error", "-c", code_of(notebook)]
    done = subprocess.run(
        command, env=environment | variables, cwd=notebook.parent,
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_tpu():
    lines = run("tpu")
    assert lines[0] == "8 x cpu"
    assert [line.split("|")[0].strip() for line in lines[-3:]] == ["sharing", "none", "base_lr"]
    prefilled = [int(line.split("|")[1]) for line in lines[-2:]]
    assert prefilled[0] > 2 * prefilled[1] > 0


def test_agents(tmp_path):
    """With a tiny model in the place of the real one."""
    model = text_models.write_text_model(tmp_path / "model")
    text_models.write_adapters(model / "adapters", text_models.adapters())
    lines = run("agents", LRAGENT_NOTEBOOK_MODEL=str(model))
    assert lines[0] == "8 x cpu, plan, action, reflect, float32"
    assert lines[-1] == "done"
    rows = [line.split() for line in lines]
    prefilled = {row[0]: int(row[4].replace(",", "")) for row in rows if row[2:3] == ["of"]}
    assert list(prefilled) == ["none", "full", "base", "base_lr"]
    assert prefilled["none"] >= prefilled["full"] > 0
    assert any(line.lstrip().startswith("plan  Thought 1:") for line in lines)


def test_every_notebook_has_a_test():
    notebooks = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {f"test_{name}" for name in notebooks} <= set(globals())
