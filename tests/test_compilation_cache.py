"""The persistent compilation cache, and noticing compilations."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from lragent_jax.compile_watch import CompileWatch

PROGRAM = """
import jax, jax.numpy as jnp
from lragent_jax import compilation_cache
print(compilation_cache.enable({folder}))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(float(jax.jit(lambda x: jnp.sin(x) + 1)(jnp.float32(0))))
"""


def run(folder: str = "", **environment: str) -> tuple[Path | None, str]:
    """(the folder that `enable` named, what was printed to standard error) of a fresh process that compiles."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(folder=folder)],
        env=inherited | {"JAX_PLATFORMS": "cpu"} | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    used, result = done.stdout.split()
    assert result == "1.0"
    return None if used == "None" else Path(used), done.stderr


def test_programs_are_kept_in_the_users_cache_folder_and_read_quietly(tmp_path):
    folder, _ = run(XDG_CACHE_HOME=str(tmp_path))
    assert folder is not None
    assert folder == tmp_path / "lragent_jax" / "xla"
    kept = sorted(folder.iterdir())
    assert [name for name in kept if name.name.startswith("jit_") and name.name.endswith("-cache")]
    again, printed = run(XDG_CACHE_HOME=str(tmp_path))
    assert again == folder
    assert sorted(path for path in folder.iterdir() if not path.name.endswith("-atime")) == [
        path for path in kept if not path.name.endswith("-atime")
    ], "the second run compiled nothing new"
    assert printed == ""


def test_what_the_user_configured_stays(tmp_path):
    mine = tmp_path / "mine"
    folder, _ = run(JAX_COMPILATION_CACHE_DIR=str(mine), XDG_CACHE_HOME=str(tmp_path / "xdg"))
    assert folder == mine
    assert any(mine.iterdir())
    assert not (tmp_path / "xdg").exists()
    named, _ = run(folder=repr(str(tmp_path / "named")), XDG_CACHE_HOME=str(tmp_path / "xdg"))
    assert named == tmp_path / "named"


def test_no_folder_means_no_cache(tmp_path):
    (tmp_path / "file").write_text("in the way")
    folder, _ = run(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert folder is None


def test_a_compilation_is_noticed_and_a_second_call_is_none():
    program = jax.jit(lambda x: 3 * x - 7)
    x = jnp.arange(5)
    with CompileWatch() as first:
        program(x)
    with CompileWatch() as second:
        program(x)
    with CompileWatch() as other_shape:
        program(x[:3])
    assert first.num_programs >= 1
    assert second.num_programs == 0
    assert other_shape.num_programs >= 1
    program(x[:2])
    assert second.num_programs == 0, "it listens inside its block only"
