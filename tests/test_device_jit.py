"""Which compiler options a program gets: those of the device that it is compiled for, and no others."""

import contextlib
import threading

import jax
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, Mesh

from lragent_jax import device_jit
from lragent_jax.device_jit import DeviceJit, this_device
from lragent_jax.models.tensor_parallel import AXIS


@pytest.fixture(params=["default", "mesh"])
def where(request):
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    with jax.set_mesh(mesh) if request.param == "mesh" else contextlib.nullcontext():
        yield jax.devices()[0].device_kind


def test_it_takes_the_options_of_its_device(where, monkeypatch):
    assert this_device().device_kind == where
    monkeypatch.setattr(device_jit, "COMPILER_OPTIONS", {"another": {"of_another": "1"}, where: {"not_an_option": "1"}})
    double = DeviceJit(lambda x: 2 * x)
    with pytest.raises(jax.errors.JaxRuntimeError, match="not_an_option"):
        double(3)
    with pytest.raises(jax.errors.JaxRuntimeError, match="not_an_option"):
        double.lower(3).compile()


def test_it_takes_none_of_another_device(where, monkeypatch):
    monkeypatch.setattr(device_jit, "COMPILER_OPTIONS", {"another": {"of_another": "1"}})
    add = DeviceJit(lambda x, y: x + y, static_argnames="y")
    assert add(3, y=4) == 7
    assert add.lower(1, y=3).compile()(1) == 4
    with jax.default_device(jax.devices()[0]):
        assert this_device().device_kind == where


def test_its_own_options_are_known_to_this_jax():
    """Compilers for GPUs and CPUs take options of one list; a name that has gone would stop every prefill on a GPU."""
    double = DeviceJit(lambda x: 2 * x)
    for options in (device_jit.NO_CUDA_GRAPHS, device_jit.CUDA_GRAPHS_OF_SEVERAL):
        with double.compiled_with(options):
            assert double(3) == 6


def test_several_gpus_leave_all_reduces_to_nccl_in_one_graph():
    gpu, cpu = AbstractDevice("a GPU", None, "gpu"), AbstractDevice("cpu", None, "cpu")
    plain, graphs = DeviceJit(lambda x: x), DeviceJit(lambda x: x, cuda_graphs=True)
    here = graphs._jitted()
    with jax.sharding.use_abstract_mesh(AbstractMesh((2,), (AXIS,))):
        assert graphs.compiler_options(gpu) == device_jit.CUDA_GRAPHS_OF_SEVERAL
        assert plain.compiler_options(gpu) == device_jit.NO_CUDA_GRAPHS
        assert graphs.compiler_options(cpu) == {}
        assert graphs._jitted() is not here
    with jax.set_mesh(Mesh(np.array(jax.devices()[:1]), (AXIS,))):
        assert graphs.compiler_options(gpu) == {}
    assert graphs._jitted() is here


@pytest.mark.parametrize("platform", ["gpu", "cuda"])
def test_a_gpu_gets_graphs_where_they_are_asked_for(platform):
    gpu, cpu = AbstractDevice("a GPU", None, platform), AbstractDevice("cpu", None, "cpu")
    plain, graphs = DeviceJit(lambda x: x), DeviceJit(lambda x: x, cuda_graphs=True)
    assert plain.compiler_options(gpu) == device_jit.NO_CUDA_GRAPHS
    assert plain.compiler_options(cpu) == graphs.compiler_options(gpu) == {}
    with plain.compiled_with({"xla_gpu_graph_min_graph_size": "5"}):
        assert plain.compiler_options(gpu) == {"xla_gpu_graph_min_graph_size": "5"}


def test_a_thread_that_compiles_while_others_options_come_and_go_leaves_none_behind(monkeypatch):
    double = DeviceJit(lambda x: 2 * x)
    inside, over = threading.Event(), threading.Event()
    jit, refused = jax.jit, []

    def slow_jit(*args, **options):
        if options["compiler_options"]:
            inside.set()
            assert over.wait(60)
        return jit(*args, **options)

    def call():
        try:
            double(3)
        except jax.errors.JaxRuntimeError as error:
            refused.append("not_an_option" in str(error))

    monkeypatch.setattr(jax, "jit", slow_jit)
    thread = threading.Thread(target=call)
    with double.compiled_with({"not_an_option": "1"}):
        thread.start()
        assert inside.wait(60)
    over.set()
    thread.join()
    assert refused == [True]
    assert double(3) == 6


def test_for_a_comparison_it_takes_others():
    double = DeviceJit(lambda x: 2 * x)
    with double.compiled_with({"not_an_option": "1"}), pytest.raises(jax.errors.JaxRuntimeError, match="not_an_option"):
        double(3)
    assert double(3) == 6
