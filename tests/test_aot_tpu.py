"""What libtpu makes of the TPU kernels and of the engine's programs, with no TPU there."""

import dataclasses
import math

import aot
import jax
import pytest

from lragent_jax.measure.tpu_chips import CHIPS
from lragent_jax.measure.tpu_programs import KernelShape, Workload, model_mesh, slice_devices
from lragent_jax.measure.tpu_report import cache_copies, collectives, kernel_vmem, report
from lragent_jax.models.config import LlamaConfig

pytestmark = pytest.mark.aot


@pytest.fixture(autouse=True)
def libtpu():
    aot.require("libtpu")


ONE_CHIP = {"v5e": "1x1", "v5p": "1x1x1", "v6e": "1x1", "tpu7x": "1x1x1"}
SHAPES = {
    "decode": (8, 1, 32, 8, 128, 16, 0, "bfloat16"),
    "decode, one head of 64, low-rank keys": (2, 1, 4, 1, 64, 8, 8, "bfloat16"),
    "prefill, low-rank keys": (1, 1024, 32, 8, 128, 16, 16, "bfloat16"),
    "prefill, heads of 64": (2, 16, 9, 3, 64, 64, 0, "float32"),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chip", ONE_CHIP)
def test_kernels_take_the_pools_as_they_are(chip, shape):
    case = KernelShape(model_mesh(slice_devices(chip, ONE_CHIP[chip])[:1]), *SHAPES[shape])
    compiled = case.lower().compile()
    sizes = [math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(case.arguments())]
    pools = [math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(case.pools())]
    memory = compiled.memory_analysis()
    assert memory is not None
    assert sum(sizes) <= memory.argument_size_in_bytes <= sum(sizes) + 2**20  # tiles of small arrays
    assert memory.temp_size_in_bytes < min(pools)
    assert cache_copies(compiled, case.pools()) == []
    assert aot.implementations_in(compiled) == {"pallas_mosaic_tpu"}
    path = "decode" if SHAPES[shape][1] == 1 else "prefill"
    assert any(name.startswith(f"lora_{path}_") for name in kernel_vmem(compiled))


def test_a_kernel_that_needs_more_vmem_than_there_is_is_refused(monkeypatch):
    monkeypatch.setattr("lragent_jax.kernels.lora_attention.pallas_mosaic_tpu.call.VMEM_LIMIT", 2**20)
    # A shape of its own: what was traced before under another limit is not traced again.
    case = KernelShape(model_mesh(slice_devices("v5e", "1x1")), 1, 1024, 32, 8, 128, 24, 0, "bfloat16")
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        case.lower().compile()


# One layer of Llama-3.1-8B, its vocabulary cut: sampling takes long to compile and is not what is looked at.
ONE_LAYER = dataclasses.replace(LlamaConfig.preset("llama-3.1-8b"), num_layers=1, vocab_size=1024)
ALL_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_adapters_add_no_collective_and_no_program_copies_a_cache(program):
    plain = Workload(ONE_LAYER, model_mesh(slice_devices("v5e", "2x4")), targets=(), tokens=256, pages=4096)
    adapted = dataclasses.replace(plain, targets=ALL_TARGETS)
    compiled = {workload: workload.lower(program).compile() for workload in (plain, adapted)}
    assert collectives(compiled[adapted]) == collectives(compiled[plain])
    assert collectives(compiled[plain])["all-reduce"]["count"] >= 3
    for workload, executable in compiled.items():
        result = report(executable, workload.cache(), CHIPS["v5e"].hbm)
        shards = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(workload.cache())]
        assert result["cache_copies"] == 0
        assert result["donated"] >= sum(2 * math.prod(shape) for shape in shards)
        assert result["temporaries"] < min(2 * math.prod(shape) for shape in shards)


def test_copies_are_seen_where_there_are_some():
    """A scatter into a low-rank pool is what XLA takes the whole pool to VMEM for."""
    workload = Workload(ONE_LAYER, model_mesh(slice_devices("v5e", "2x4")), implementation="xla", pages=2048)
    compiled = workload.lower("decode").compile()
    assert cache_copies(compiled, workload.cache())


def test_a_program_over_hbm_is_refused():
    workload = Workload(ONE_LAYER, model_mesh(slice_devices("v5e", "2x4")), targets=(), pages=300_000)
    with pytest.raises(jax.errors.JaxRuntimeError, match="memory on HBM"):
        workload.lower("decode").compile()
