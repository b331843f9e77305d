"""scripts/bench_kernels.py: what it measures, on what data, and how it judges; all of it at toy sizes."""

import importlib.util
import json
import math
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from script_modules import load_script

from lragent_jax.kernels.lora_attention import lora_attention
from lragent_jax.measure.attention import AttentionCase, Heads, RandomCaches, cycle, page_table
from lragent_jax.measure.timing import DeviceSpeed, chain, median_seconds

bench_kernels = load_script("bench_kernels")
SPEED = DeviceSpeed(bytes_per_s=1e9, flop_per_s=1e10)
LLAMA, TOY = bench_kernels.PRESETS["llama-3.1-8b"], bench_kernels.PRESETS["toy"]


@pytest.fixture
def without_device(monkeypatch):
    monkeypatch.setattr(bench_kernels, "measure_device", lambda: SPEED)


def run(monkeypatch, capsys, *arguments: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--preset", "toy", *arguments])
    bench_kernels.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_last_line_is_json_and_every_result_was_checked(without_device, monkeypatch, capsys, tmp_path):
    plot = tmp_path / "targets.png"
    arguments = ["--rows", "scatter,decode", "--implementations", "xla"]
    if importlib.util.find_spec("matplotlib"):
        arguments += ["--plot", str(plot)]
    report = run(monkeypatch, capsys, *arguments)
    assert plot.exists() == ("--plot" in arguments)
    ours = [row for row in report["rows"] if row["name"] == "xla"]
    assert len(ours) == 5  # decode at two contexts, one of them contiguous, too, and prefill at random and contiguous
    assert all(row["us"] > 0 and row["relative_error"] < 1e-5 for row in ours)
    assert {target["what"] for target in report["targets"]} == {
        "scattered to contiguous: decode",
        "scattered to contiguous: prefill",
        "decode, share of copy bandwidth",
    }


def test_what_is_refused_says_why_and_stops_nothing(without_device, monkeypatch, capsys):
    report = run(monkeypatch, capsys, "--rows", "prefill", "--implementations", "xla", "--skip-checks")
    by_name = {row["name"]: row for row in report["rows"]}
    assert set(by_name) == {"xla", "cudnn", "unfused", "shipped_triton", "shipped_mosaic"}
    assert "cuDNN" in by_name["cudnn"]["reason"]
    assert "us" in by_name["xla"]


def test_a_wrong_result_is_seen(without_device, monkeypatch, capsys):
    def wrong(q, *args, implementation, **kwargs):
        o: Any = lora_attention(q, *args, **kwargs)
        return o if implementation == "xla" else o * 1.5

    monkeypatch.setattr(bench_kernels, "lora_attention", wrong)
    arguments = ("--rows", "decode", "--peers", "", "--implementations", "reference")
    report = run(monkeypatch, capsys, *arguments)
    assert all(row["relative_error"] == pytest.approx(0.5, abs=1e-4) for row in report["rows"])


@pytest.mark.parametrize("arguments", [["--rows", "decode,lunch"], ["--implementations", "cudnn"], ["--peers", "xla"]])
def test_unknown_names_are_refused(arguments, without_device, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, *arguments)
    assert "is none of" in capsys.readouterr().err


def test_every_row_of_the_table_has_a_limit_or_is_a_figure_of_its_own():
    """One fake run: every case takes 1 s, but shared work a third of it."""
    bench = bench_kernels.Bench(LLAMA, SPEED, check=False)
    for row, cases in bench_kernels.rows_of(LLAMA).items():
        for case in cases:
            for name in ("pallas_mosaic_gpu", "pallas_triton", *bench_kernels.peers_of(row, case)):
                seconds = 1 / 3 if case.prefix and case.share else 2.0 if name == "unfused" else 1.0
                bench.results[name, case] = bench_kernels.Result(name, case, seconds=seconds)
    found = bench_kernels.targets(bench, ["pallas_mosaic_gpu", "pallas_triton"])
    by_what = {(target.what, target.name): target for target in found}
    assert len(by_what) == len(found) == 25 + 25 + 3
    assert by_what["prefill 8192 to shipped Triton", "pallas_triton"].reached
    assert ("prefill 8192 to shipped Triton", "pallas_mosaic_gpu") not in by_what
    assert by_what["32 trajectories on one prefix to no sharing", "pallas_triton"].value == pytest.approx(1 / 3)
    assert by_what["decode, times faster than unfused", "pallas_triton"].reached  # 2.0, at least 1.9
    assert by_what["decode, times faster than unfused", "pallas_triton"].of_limit == pytest.approx(0.95)
    assert not by_what["decode, T=1 S=4096 r=16", "pallas_triton"].reached  # a second, at most 15 µs
    assert math.isinf(by_what["low-rank keys on top: decode, 8 agents", "pallas_triton"].limit)


def test_chains_go_through_more_caches_than_a_device_keeps():
    for cases in bench_kernels.rows_of(LLAMA).values():
        for case in cases:
            assert cycle(case, LLAMA.heads, LLAMA.cycled_bytes) * LLAMA.heads.kv_bytes(case.distinct_tokens) > 200e6


# Data.


def test_a_chain_feeds_every_call_the_last_result():
    data = tuple(jnp.float32(x) for x in (1, 10, 100))
    first, last = chain(lambda x, y, shared: x + y * shared, calls=2, turns=3)(jnp.float32(0), data, 2)
    assert first == 2
    assert last == 2 * (1 + 3 * (10 + 100))


def test_median_seconds_is_of_one_run():
    calls = []
    assert median_seconds(lambda: calls.append(None), repeats=5, runs=3) >= 0
    assert len(calls) == 1 + 5 * 3


def tables(**case):
    table, adapter_ids = page_table(AttentionCase(S=64, B=3, **case), p=8, num_pages=32)
    assert adapter_ids is not None
    return np.asarray(table.base), np.asarray(table.low_rank), np.asarray(adapter_ids)


def test_agents_of_one_trajectory_read_the_same_pages():
    base, low_rank, adapter_ids = tables()
    assert (base == base[0]).all()
    assert (low_rank == low_rank[0]).all()
    assert len(set(base[0])) == 8
    assert adapter_ids.tolist() == [1, 2, 3]


def test_a_group_per_agent_shares_the_base_alone():
    base, low_rank, _ = tables(groups=3)
    assert (base == base[0]).all()
    assert len(set(low_rank.flat)) == 24


def test_trajectories_share_their_prefix_or_nothing():
    base, low_rank, _ = tables(prefix=32)
    assert len(set(base.flat)) == len(set(low_rank.flat)) == 4 + 3 * 4
    assert (base[:, :4] == base[0, :4]).all()
    apart, _, _ = tables(prefix=32, share=False)
    assert len(set(apart.flat)) == 24


def test_pages_lie_at_random_or_in_order():
    base, _, _ = tables()
    assert np.array_equal(tables(scattered=False)[0][0], np.arange(8))
    assert not np.array_equal(np.sort(base[0]), base[0])


def test_too_small_a_pool_is_refused():
    with pytest.raises(ValueError, match=r"names 24 pages of 8 tokens; the pools have 23"):
        page_table(AttentionCase(S=64, B=3, share=False), p=8, num_pages=23)


def test_floors_count_each_byte_once():
    heads = Heads()
    one, agents = AttentionCase(65_536, r_v=0), AttentionCase(65_536, B=8, r_v=0)
    queries = 2 * heads.N * heads.H * 2
    assert one.floor_bytes(heads) == 65_536 * 8 * 256 * 2 + queries
    assert agents.floor_bytes(heads) - one.floor_bytes(heads) == 7 * queries
    assert AttentionCase(4096, T=4096).flop(heads) == 4 * 32 * 128 * 4096 * 4097 / 2


def test_outputs_fed_back_stay_queries_of_a_usual_size():
    case, heads = AttentionCase(512, r_v=4, r_k=4), Heads(4, 2, 16, 8, "float32")
    caches = RandomCaches(heads)
    table, adapter_ids = page_table(case, heads.p, 64)
    q: Any = caches.queries(case)
    (layer,) = caches.caches(case, 64, 1)
    for _ in range(4):
        q = lora_attention(q, *layer, table, adapter_ids, rope_inv_freq=caches.inv_freq(case), implementation="xla")
    assert 0.1 < float(jnp.std(q)) < 50
