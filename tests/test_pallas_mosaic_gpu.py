"""The Mosaic GPU implementation against the contract: on a Hopper GPU or newer, and some of it interpreted anywhere."""

import dataclasses
import itertools

import jax
import pytest
from attention_contract import BY_NAME, AttentionContract, Case, arguments, check, make_inputs, oracle
from mosaic_interpreter import in_interpreter

from lragent_jax.kernels.interpret import interpreted
from lragent_jax.kernels.lora_attention import lora_attention, pallas_mosaic_gpu
from lragent_jax.kernels.lora_attention.decode_plan import PlanSizes, plan_decode
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu import (
    decode,
    expansion,
    merge,
    stream_compute,
    stream_feed,
)
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.stream_shapes import (
    BASE,
    KEYS,
    PRODUCT_WIDTH,
    QUERIES,
    VALUES,
    WARPS,
    Shapes,
    turns,
)

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


@on_hopper
class TestManyQueries(AttentionContract):
    """The kernel that prefills, which so few queries would not get."""

    implementation = "pallas_mosaic_gpu"

    @pytest.fixture(autouse=True)
    def _prefill_always(self, monkeypatch):
        monkeypatch.setattr(pallas_mosaic_gpu, "MAX_DECODE_ROWS", 0)

    def adapt(self, case):
        return to_kernel(case, p=64, H=128)


@on_hopper
class TestManyQueriesExpanded(TestManyQueries):
    """Values expanded before, which so few queries would not get, either."""

    @pytest.fixture(autouse=True)
    def _expand_always(self, monkeypatch):
        jax.clear_caches()  # what it compiled without
        monkeypatch.setattr(expansion, "FLOP_PER_BYTE", 0)
        yield
        jax.clear_caches()


@on_hopper
class TestFewPrograms(AttentionContract):
    """Programs of decode that run many items each."""

    implementation = "pallas_mosaic_gpu"

    @pytest.fixture(autouse=True)
    def _few_programs(self, monkeypatch):
        jax.clear_caches()  # what it compiled with other block sizes
        heuristic = decode.heuristic
        monkeypatch.setattr(
            decode, "heuristic", lambda *args, **keywords: dataclasses.replace(heuristic(*args, **keywords), programs=4)
        )
        yield
        jax.clear_caches()

    def adapt(self, case):
        return to_kernel(case, p=64, H=128)


def test_products_of_several_readers_fit_the_registers():
    for compute, r_v, readers in itertools.product((1, 2), range(8, 65, 8), range(1, 65)):
        shapes = Shapes(
            B=readers, T=1, K=1, G=1, H=128, p=64, R=readers, r_v=r_v, r_k=0, readers=readers, stages=2,
            compute=compute, scale=1.0,
        )  # fmt: skip
        assert shapes.joined in (1, 2, 4, 8, 16)
        assert shapes.joined * r_v <= max(PRODUCT_WIDTH // compute, r_v)
        assert shapes.joined < 2 * readers


def test_every_reader_and_every_slot_is_some_warps_turn():
    for r_v, r_k, readers, rows in itertools.product((0, 8, 16, 64), (0, 16), (1, 3, 16, 64), (1, 8, 64)):
        shapes = Shapes(
            B=readers, T=1, K=8, G=1, H=128, p=64, R=rows, r_v=r_v, r_k=r_k, readers=readers, stages=2,
            compute=1, scale=1.0,
        )  # fmt: skip
        warps = range(WARPS)
        for first, count in ((VALUES, shapes.products * shapes.joined), (KEYS, readers), (QUERIES, rows)):
            taken = [n for warp in warps for n in turns(warp, first, range(count))]
            assert sorted(taken) == list(range(count))
        brings = [warp for warp in warps if shapes.brings_values(warp) or shapes.brings_keys(warp)]
        assert {BASE, *brings} <= set(shapes.block_warps)
        assert (shapes.block_warps == [BASE]) == (r_v == r_k == 0)


A_GROUPS = "decode, A-groups on one prefix"


@in_interpreter
@pytest.mark.parametrize(
    ("name", "p", "compute", "lanes"),
    [(A_GROUPS, 32, 1, 2), (A_GROUPS, 16, 2, 2), ("low-rank keys", 64, 2, 2), ("many blocks", 64, 1, 3)],
)
def test_decode_interpreted_equals_the_oracle_without_races(name, p, compute, lanes, monkeypatch, capsys):
    """Programs run several items; of many blocks, one begins in the middle of a tile; parts are merged one by one."""
    case = to_kernel(BY_NAME[name], p=p, H=64)
    sizes = decode.BlockSizes(num_stages=2, compute=compute, programs=lanes * case.K)
    monkeypatch.setattr(decode, "heuristic", lambda r_k, is_batch: sizes)
    monkeypatch.setattr(merge, "BATCH", 1)
    if compute == 1:  # as for many rows: less is asked for ahead, and multiplied at once
        monkeypatch.setattr(stream_feed, "MAX_AHEAD", 0)
        monkeypatch.setattr(stream_compute, "MOST_AT_ONCE", 1)
        monkeypatch.setattr(merge, "BATCH", 16)
        monkeypatch.setattr(merge, "ONE_WAVE", 0)
        monkeypatch.setattr(merge, "FEW", 1)
    jax.clear_caches()
    args, keywords = arguments(make_inputs(case))
    rows = PlanSizes(min(64 // case.G, len(case.rows) * case.T), max(1, 64 // p), sizes.programs, case.K)
    plan = plan_decode(args[4], None, T=case.T, page_size=p, sizes=rows)
    assert (plan.lanes[:, 1] - plan.lanes[:, 0]).max() > 1
    assert name != "many blocks" or plan.parts.max() > 0  # its rows share nothing: each is a tile
    with interpreted():
        got = lora_attention(*args, **keywords, return_lse=True, implementation="pallas_mosaic_gpu")
    jax.clear_caches()
    check(case, got, oracle(make_inputs(case)))
    assert "RACE" not in capsys.readouterr().out
