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


# The oldest and the newest with all shapes, what lies between with two each; `scripts/compile_tpu.py` has them all.
ON_CHIPS = [(chip, shape) for chip in ("v5e", "tpu7x") for shape in SHAPES] + [
    ("v5p", "decode, one head of 64, low-rank keys"), ("v5p", "prefill, heads of 64"),
    ("v6e", "decode"), ("v6e", "prefill, low-rank keys"),
]  # fmt: skip


@pytest.mark.parametrize(("chip", "shape"), ON_CHIPS)
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


@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_adapters_add_no_collective_and_no_program_copies_caches_or_weights(program):
    plain = Workload(ONE_LAYER, model_mesh(slice_devices("v5e", "2x4")), targets=(), tokens=256, pages=4096)
    adapted = dataclasses.replace(plain, targets=TARGETS)
    without, found = (collectives(check(workload, program, "v5e")) for workload in (plain, adapted))
    assert found == without
    assert found["all-reduce"]["count"] >= 3


def test_decode_copies_no_weights_into_another_layout():
    """TPU7x would, in front of the loop, without the compiler option of `DeviceJit`."""
    check(
        Workload(ONE_LAYER, model_mesh(slice_devices("tpu7x", "1x1x1")), targets=TARGETS, pages=4096), "decode", "tpu7x"
    )


def check(workload: Workload, program: str, chip: str) -> jax.stages.Compiled:
    """The program, with caches and weights where they are."""
    compiled, arguments = workload.lower(program).compile(), workload.arguments(program)
    result = report(compiled, arguments, workload.caches(), CHIPS[chip].hbm)
    assert faults(result) == []
    assert 0 <= result["padding"] <= 2**20
    assert result["donated"] >= device_bytes(workload.caches())
    # Weights given another layout in front of decode's loop would be temporaries, too.
    assert result["temporaries"] < device_bytes(arguments[0]) / 8
    return compiled


def test_copies_are_seen_where_there_are_some():
    """A scatter into a low-rank pool is what XLA takes the whole pool to VMEM for."""
    workload = Workload(ONE_LAYER, model_mesh(slice_devices("v5e", "2x4")), implementation="xla", pages=2048)
    compiled = workload.lower("decode").compile()
    assert cache_copies(compiled, workload.caches())


def test_a_program_over_hbm_is_refused():
    workload = Workload(ONE_LAYER, model_mesh(slice_devices("v5e", "2x4")), targets=(), pages=300_000)
    with pytest.raises(jax.errors.JaxRuntimeError, match="memory on HBM"):
        workload.lower("decode").compile()
