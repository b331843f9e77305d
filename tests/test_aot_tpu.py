"""What libtpu makes of the TPU kernels and of the engine's programs, with no TPU there."""

import dataclasses

import aot
import jax
import pytest

from lragent_jax.measure.tpu_chips import CHIPS
from lragent_jax.measure.tpu_programs import KernelShape, Workload, model_mesh, slice_devices
from lragent_jax.measure.tpu_report import cache_copies, collectives, device_bytes, faults, kernel_vmem, report
from lragent_jax.models.adapter_bank import TARGETS
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
    result = report(compiled, case.arguments(), case.caches(), CHIPS[chip].hbm)
    assert faults(result) == []
    assert 0 <= result["padding"] <= 2**20  # tiles of small arrays
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


@pytest.mark.parametrize(
    ("program", "chip", "chips"), [("prefill", "v5e", "2x4"), ("decode", "v5e", "2x4"), ("decode", "tpu7x", "1x1x1")]
)
def test_adapters_add_no_collective_and_no_program_copies_caches_or_weights(program, chip, chips):
    mesh = model_mesh(slice_devices(chip, chips))
    plain = Workload(ONE_LAYER, mesh, targets=(), tokens=256, pages=4096)
    adapted = dataclasses.replace(plain, targets=TARGETS)
    compiled = {workload: workload.lower(program).compile() for workload in (plain, adapted)}
    assert collectives(compiled[adapted]) == collectives(compiled[plain])
    assert collectives(compiled[plain])["all-reduce"]["count"] >= 3
    for workload, executable in compiled.items():
        arguments = workload.arguments(program)
        result = report(executable, arguments, workload.caches(), CHIPS[chip].hbm)
        assert faults(result) == []
        assert 0 <= result["padding"] <= 2**20
        assert result["donated"] >= device_bytes(workload.caches())
        # Weights given another layout in front of decode's loop would be temporaries, too.
        assert result["temporaries"] < device_bytes(arguments[0]) / 8


def test_copies_are_seen_where_there_are_some():
    """A scatter into a low-rank pool is what XLA takes the whole pool to VMEM for."""
    workload = Workload(ONE_LAYER, model_mesh(slice_devices("v5e", "2x4")), implementation="xla", pages=2048)
    compiled = workload.lower("decode").compile()
    assert cache_copies(compiled, workload.caches())


def test_a_program_over_hbm_is_refused():
    workload = Workload(ONE_LAYER, model_mesh(slice_devices("v5e", "2x4")), targets=(), pages=300_000)
    with pytest.raises(jax.errors.JaxRuntimeError, match="memory on HBM"):
        workload.lower("decode").compile()
