"""scripts/bench_mesh.py: its figures mean what it says, and a tiny engine gives all of them."""

import argparse

import engines
import numpy as np
import pytest
from script_modules import load_script

bench_mesh = load_script("bench_mesh")
Kernel = bench_mesh.Kernel


def test_an_all_reduce_takes_what_the_last_device_takes():
    first = [Kernel("gemm", 0, 9e6), Kernel("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 9e6, 5e6),
             Kernel("ncclDevKernel_AllGather", 20e6, 7e6), Kernel("all-reduce.3", 30e6, 2e6)]  # fmt: skip
    last = [Kernel("all_reduce_kernel", 31e6, 4e6), Kernel("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 12e6, 2e6)]
    assert bench_mesh.all_reduce_ms([first, last]) == pytest.approx((4.0, 6.5, 2))
    assert bench_mesh.all_reduce_ms([first, last[:1]]) == pytest.approx((4.0, 5.5, 2))
    own = [Kernel("psum_fusion", 0, 3e6, "psum-fusion.7"), Kernel("loop_add_fusion", 3e6, 1e6, "add.2")]
    assert bench_mesh.all_reduce_ms([own]) == pytest.approx((3.0, 3.0, 1))
    assert bench_mesh.all_reduce_ms([]) == bench_mesh.all_reduce_ms([first[:1]]) == (0.0, 0.0, 0)


def test_a_step_is_what_the_longer_trace_has_more_and_may_show_no_all_reduce():
    prefill = Kernel("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 0, 9e6)
    step = [Kernel("gemm", 10e6, 2e6), Kernel("fusion_1", 20e6, 1e6, "all-reduce.2-fusion.1"),
            Kernel("MemcpyD2D", 19e6, 1e6, "all-reduce.2-fusion.1")]  # fmt: skip
    short, long = [[prefill], [prefill]], [[prefill, *step * 4], [prefill, *step * 4]]
    assert bench_mesh.of_a_step(short, long, 4) == {
        "all_reduce_ms": 1.0, "all_reduce_kernel_ms": 1.0, "all_reduces": 1.0, "kernels": [3.0, 3.0],
    }  # fmt: skip
    slower = [[prefill._replace(duration_ns=9.5e6), *step[:1] * 4]] * 2
    found = bench_mesh.of_a_step(short, slower, 4)
    assert found == {
        "all_reduce_ms": None, "all_reduce_kernel_ms": None, "all_reduces": bench_mesh.NOT_SEEN, "kernels": [1.0, 1.0],
    }  # fmt: skip
    assert bench_mesh.all_reduce_share(found | {"step_ms": 4.0}) == bench_mesh.NOT_SEEN
    assert bench_mesh.all_reduce_share({"all_reduce_ms": 1.0, "step_ms": 4.0}) == 0.25
    assert bench_mesh.most_frequent(slower[:1]) == [[("gemm", "", 4), (prefill.name, "", 1)]]
    numbered = [bench_mesh.Kernel(f"loop_add_fusion_{i}", i, 1, f"add.{i}.clone") for i in (1, 22)]
    assert bench_mesh.most_frequent([numbered]) == [[("loop_add_fusion", "add.clone", 2)]]


def test_a_compiler_option_is_a_name_and_a_value():
    assert bench_mesh.compiler_option("xla_some=A=B") == ("xla_some", "A=B")
    for wrong in ("xla_some", "=True"):
        with pytest.raises(argparse.ArgumentTypeError, match="NAME=VALUE"):
            bench_mesh.compiler_option(wrong)


def scores(*best_and_second: tuple[int, float]) -> np.ndarray:
    """Rows in which one token is best, ahead of all others by so much."""
    rows = np.zeros((len(best_and_second), 8), np.float32)
    for row, (best, margin) in zip(rows, best_and_second, strict=True):
        row[best] = margin
    return rows


def test_generated_tokens_are_compared_up_to_the_first_tie():
    one = [3, 4, 5], scores((3, 1.0), (4, 1e-4), (5, 1.0))
    after_the_tie = [3, 6, 1], scores((3, 1.0), (6, 1e-4), (1, 1.0))
    assert bench_mesh.compare_generated(one, after_the_tie) | {"max_difference": 0} == {
        "equal": True, "compared": 1, "max_difference": 0,
    }  # fmt: skip
    before = [2, 4, 5], scores((2, 1.0), (4, 1e-4), (5, 1.0))
    assert not bench_mesh.compare_generated(one, before)["equal"]
    late = [3, 4, 6], scores((3, 1.0), (4, 1.0), (6, 1.0))
    assert not bench_mesh.compare_generated(([3, 4, 5], scores((3, 1.0), (4, 1.0), (5, 1.0))), late)["equal"]


def test_the_best_of_clear_rows_must_be_the_same():
    one = scores((3, 1.0), (4, 0.01))
    assert bench_mesh.compare_scored(one, scores((3, 0.9), (5, 0.01))) == {
        "equal": True, "compared": 1, "max_difference": pytest.approx(0.1),
    }  # fmt: skip
    assert not bench_mesh.compare_scored(one, scores((5, 0.9), (4, 0.01)))["equal"]


def test_too_few_devices_are_said_before_anything_is_made(monkeypatch, capsys):
    def make(*arguments):
        raise AssertionError("an engine was made")

    monkeypatch.setattr(bench_mesh, "make_engine", make)
    monkeypatch.setattr("sys.argv", ["bench_mesh.py", "--preset", "tiny", "--devices", "4096"])
    with pytest.raises(SystemExit, match="2"):
        bench_mesh.main()
    assert "--devices 4096: tensor_parallel is 4096, and JAX sees" in capsys.readouterr().err


def test_a_tiny_engine_is_measured(capsys):
    setting = bench_mesh.Setting(
        engines.CONFIG, "float32", rank=4, contexts=(9, 20), chunk=32, decoded=4, repeats=2, page_size=8,
        implementation=None,
    )  # fmt: skip
    engine = engines.tiny_engine("base_lr", num_pages=setting.num_pages)
    ids, logits = bench_mesh.generate_and_score(engine, 9, 4)
    again = bench_mesh.score(engine, 9, ids)
    assert bench_mesh.compare_generated((ids, logits), (logits.argmax(-1).tolist(), again))["equal"]
    assert bench_mesh.drawn_as_scored(engine, 9, 8) == {"as_scored": 8, "of": 8}
    times = bench_mesh.measure(engine, setting, trace=False)
    assert times.keys() == {"9", "20"}
    assert all(result["step_ms"] > 0 for result in times.values())
    assert engine.cache_stats().bytes_used == 0
    row = {"one_ms": 2.0, "several_ms": 1.5, "ratio": 0.75, "all_reduce_ms": 0.2, "all_reduce_kernel_ms": 0.3,
           "all_reduces": 65.0, "all_reduce_share": 0.13}  # fmt: skip
    unseen = row | {"all_reduce_ms": None, "all_reduce_share": bench_mesh.NOT_SEEN}
    bench_mesh.show({"devices": 2, "preset": "tiny", "device": "cpu", "contexts": {"9": row, "20": unseen},
                     "drawn": {"as_scored": 7, "of": 8},
                     "tokens": {"bfloat16": bench_mesh.compare_scored(logits, again)}})  # fmt: skip
    shown = capsys.readouterr().out
    assert "0.750 missed" in shown
    assert "13.0%" in shown
    assert shown.count(bench_mesh.NOT_SEEN) == 1
    assert "the same" in shown
    assert "7 as scored" in shown
