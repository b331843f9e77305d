"""ptxas is started once, and not for every condition in a kernel."""

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import aot
import jax
import pytest
from jax.experimental.mosaic.gpu import fragmented_array

from lragent_jax.kernels import hopper, ptxas_version

ROOT = Path(__file__).parents[1]
library: Any = fragmented_array  # has what is asked and exports it not
assert hopper  # imported here, it has asked before a test puts anything else in its place


def question():
    return library.mgpu_lib._mosaic_gpu_ext._get_ptxas_isa_version


@pytest.fixture
def started(monkeypatch):
    """An entry for every process that was started to answer."""
    started = []

    def ask() -> int:
        started.append("ptxas")
        return 90

    extension = types.SimpleNamespace(_get_ptxas_isa_version=ask)
    monkeypatch.setattr(fragmented_array, "mgpu_lib", types.SimpleNamespace(_mosaic_gpu_ext=extension))
    return started


def test_the_answer_is_kept(started):
    for _ in range(3):
        ptxas_version.ask_once()
        assert question()() == 90
    assert len(started) == 1


@pytest.mark.parametrize("library", [None, types.SimpleNamespace(_mosaic_gpu_ext=types.SimpleNamespace())])
def test_nothing_is_done_where_there_is_no_such_question(monkeypatch, library):
    monkeypatch.setattr(fragmented_array, "mgpu_lib", library)
    ptxas_version.ask_once()
    monkeypatch.delattr(fragmented_array, "mgpu_lib")
    ptxas_version.ask_once()


@pytest.mark.aot
@pytest.mark.parametrize("kernel", ["lora_attention", "page_write", "row_matmul"])
def test_kernels_see_to_it(kernel):
    aot.require("jax_cuda13_plugin")
    program = (
        f"import lragent_jax.kernels.{kernel}.pallas_mosaic_gpu\n"
        "from jax.experimental.mosaic.gpu import fragmented_array\n"
        "print(hasattr(fragmented_array.mgpu_lib._mosaic_gpu_ext._get_ptxas_isa_version, 'cache_info'))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


@pytest.mark.aot
def test_a_program_asks_once(started):
    """JAX would ask again and again: once it does no longer, `ptxas_version` can go."""

    def ask_while_lowering() -> int:
        started.clear()
        jax.clear_caches()
        aot.engine_workload(batch=1, tokens=1).lower("decode")
        return len(started)

    assert ask_while_lowering() > 10
    ptxas_version.ask_once()
    assert ask_while_lowering() == 1
