"""The Mosaic GPU implementation against the contract, on a Hopper GPU or newer."""

import dataclasses

import jax
import pytest
from attention_contract import AttentionContract, Case

HOPPER = jax.default_backend() == "gpu" and float(jax.devices()[0].compute_capability) >= 9.0
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs an NVIDIA GPU of the Hopper generation or newer")


def to_kernel(case: Case, p: int, H: int) -> Case:
    """The case in a shape that the kernels take; rows, groups, sharing and raggedness stay."""
    return dataclasses.replace(
        case,
        dtype="float16" if case.dtype == "float16" else "bfloat16",
        p=max(p, case.p),
        H=max(H, case.H),
        r_v=-(-case.r_v // 8) * 8,
        r_k=-(-case.r_k // 16) * 16,
    )


@on_hopper
class TestPagesOf16(AttentionContract):
    implementation = "pallas_mosaic_gpu"

    def adapt(self, case):
        return to_kernel(case, p=16, H=64)

    def refuses(self, case):
        return "page size 16 with low-rank keys" if case.r_k and case.p < 64 else None


@on_hopper
class TestPagesOf128(AttentionContract):
    implementation = "pallas_mosaic_gpu"

    def adapt(self, case):
        return to_kernel(case, p=128, H=128)
