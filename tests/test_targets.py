"""Asked and reached: right figures in the right direction, from results of several runs."""

import json

import pytest

from lragent_jax.measure import bench_results
from lragent_jax.measure.targets import growth_per_agent, targets


def mode(ttft: float, tokens_per_s: float = 1000.0, cache_bytes: int = 100, **more: float) -> dict:
    figures = {"ttft_s": ttft, "tokens_per_s": tokens_per_s, "cache_bytes": cache_bytes, "ttft_floor_s": 1.0}
    figures |= {"us_per_prefilled_token": ttft, "attention_flop_per_token": 1.0}
    return figures | more


def trace(total: int = 33_680, **modes: dict) -> dict:
    return {"total_tokens": total, "modes": modes}


def reached(results: dict) -> dict:
    return {row.what: (pytest.approx(row.reached), row.met) for row in targets(results)}


def test_ratios_of_the_trace():
    results = {"trace": {"8192": trace(
        base_lr=mode(1.25, 2000, 33), full=mode(1.2, 2050), none=mode(3.5, 1000), pre_lr=mode(1.3, 1900),
    )}}  # fmt: skip
    at = "at 33,680 tokens"
    assert reached(results) == {
        f"TTFT of base_lr {at}: x floor": (1.25, True),
        f"base_lr to full {at}, TTFT": (1.25 / 1.2, False),
        f"base_lr to full {at}, throughput": (2000 / 2050, False),
        f"none to base_lr {at}, TTFT": (2.8, True),
        f"base_lr to none {at}, throughput": (2.0, True),
        f"base_lr to none {at}, cache bytes": (0.33, True),
        f"pre_lr to base_lr {at}, throughput": (0.95, False),
    }


def test_beyond_33_680_tokens_low_rank_values_may_cost_more():
    both = {"base_lr": mode(1.03), "full": mode(1.0)}
    met = [reached({"trace": {"1": trace(total, **both)}})[f"base_lr to full at {total:,} tokens, TTFT"][1]
           for total in (33_680, 66_448)]  # fmt: skip
    assert met == [False, True]


def test_a_mode_that_did_not_fit_is_compared_with_nothing():
    out = {"bytes_needed": 2, "bytes_limit": 1}
    assert list(reached({"trace": {"8192": trace(base_lr=mode(1.0), none=out, full=out)}})) == [
        "TTFT of base_lr at 33,680 tokens: x floor"
    ]


def test_a_trace_twice_as_long():
    results = {"trace": {
        "8192": trace(33_680, none=mode(1.0, attention_flop_per_token=10.0)),
        "16384": trace(66_448, none=mode(1.9, attention_flop_per_token=18.0)),
        "65536": trace(9, none=mode(9.0)),
    }}  # fmt: skip
    [row] = targets(results)
    assert (row.asked, row.reached, row.met) == (pytest.approx(1.8), pytest.approx(1.9), False)


def test_the_rest():
    results = {
        "trace": {"8192": trace() | {
            "decode_steps": {"short": {"ms": 5.5, "floor_ms": 5.0, "context": 160.0},
                             "long": {"ms": 7.5, "floor_ms": 6.5, "context": 33_700.0}},
            "solo": {"prefill_s": {"4096": 0.1}, "decode_ms": 6.0},
        }},
        "memory": {"cache_bytes": {"base": {"1": 1000, "2": 1008, "4": 1030}, "base_lr": {"1": 5, "16": 5},
                                   "none": {"1": 1, "2": 2}},
                   "opened": {"tried": {"none": 4, "base_lr": 13}}},
        "batch": {"rows": 64, "ms": 14.0, "floor_ms": 11.0, "one_ms": 5.0, "fitting": {"none": 10, "base_lr": 27}},
        "peers": {"prefill_s": {"4096": 0.129, "8192": 0.27}, "eager_decode_ms": 90.0, "merged_decode_ms": 5.9},
        "profile": {"a": {"idle_untraced": 0.02}, "b": {"absent": "no device"}},
    }  # fmt: skip
    assert reached(results) == {
        "decode step on 160 tokens: x floor": (1.1, True),
        "decode step on 33,700 tokens: x floor": (7.5 / 6.5, False),
        "cache bytes per further agent, base": (0.011, False),
        "cache bytes per further agent, base_lr": (0.0, True),
        "trajectories opened in a small pool, base_lr to none": (3.25, True),
        "trajectories that fit, base_lr to none": (2.7, False),
        "decode step of 64 rows: x floor": (14 / 11, True),
        "tokens/s of 64 rows to one": (64 * 5 / 14, False),
        "transformers + PEFT to us, prefill of 4,096": (1.29, False),
        "transformers + PEFT to us, decode, eager": (15.0, True),
        "transformers + PEFT to us, decode, merged, static, compiled": (5.9 / 6, False),
        "share of a step that the device idles, a": (0.02, True),
    }
    assert reached({"peers": {"absent": "not installed: torch"}, "trace": results["trace"]}).keys() == {
        "decode step on 160 tokens: x floor", "decode step on 33,700 tokens: x floor"
    }  # fmt: skip


def test_growth_is_per_agent_and_the_largest():
    assert growth_per_agent({"1": 100, "2": 101, "4": 107, "16": 107}) == pytest.approx(0.03)


def test_runs_meet_in_one_file(tmp_path):
    path = tmp_path / "new" / "results.json"
    assert bench_results.read(path) == {}
    first = {"trace": {"8192": {"n": 1}, "512": {"n": 1}}, "batch": {"n": 1}, "profile": {"a": {"n": 1}}}
    bench_results.write(path, first)
    second = {"trace": {"1024": {"n": 2}, "8192": {"n": 2}}, "peers": {"n": 2}, "profile": {"b": {"n": 2}}}
    bench_results.write(path, bench_results.merged(bench_results.read(path), second))
    together = json.loads(path.read_text())
    assert list(together["trace"].items()) == [("512", {"n": 1}), ("1024", {"n": 2}), ("8192", {"n": 2})]
    assert (together["batch"], together["peers"]) == ({"n": 1}, {"n": 2})
    assert together["profile"] == {"a": {"n": 1}, "b": {"n": 2}}


def test_figures_are_drawn_of_whatever_there_is(tmp_path):
    pytest.importorskip("matplotlib")
    from lragent_jax.measure.bench_plots import write_plots

    assert write_plots({}, tmp_path) == []
    results = {
        "trace": {"8192": trace(none={"bytes_needed": 2, "bytes_limit": 1}, base_lr=mode(1.2), full=mode(1.1))},
        "profile": {"a": {"absent": "no device"},
                    "b": {"idle_untraced": 0.02, "idle": 0.1, "kernels": [[-1.0, 1.0, "k"], [2.0, 1.0, "k"]]}},
    }  # fmt: skip
    names = [path.name for path in write_plots(results, tmp_path)]
    assert names == ["agents-ttft.png", "agents-throughput.png", "agents-timeline-1.png", "agents-targets.png"]
    assert all((tmp_path / name).stat().st_size > 1000 for name in names)
