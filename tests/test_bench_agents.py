"""scripts/bench_agents.py at toy sizes: every regime runs, counts right, and refuses what cannot fit."""

import json
import os
from types import SimpleNamespace
from typing import Any

import pytest
from script_modules import load_script

from lragent_jax.measure import torch_peer, trace_run
from lragent_jax.measure.page_budget import PageBudget, pool_options
from lragent_jax.measure.react_trace import react_trace, spans
from lragent_jax.measure.ready import PHASES, measure_ready
from lragent_jax.measure.timing import DeviceSpeed
from lragent_jax.measure.trace_bench import largest_engine, side_by_side
from lragent_jax.measure.trace_run import clean_runs, clean_runs_in_turn, trace_figures
from lragent_jax.models.config import LlamaConfig
from lragent_jax.outputs import GenerationOutput

bench_agents = load_script("bench_agents")
TOY = "--preset tiny --layers 1 --rank 8 --dtype float32 --page-size 8 --repeats 1 --steps 2 --no-compilation-cache"


@pytest.fixture
def run(monkeypatch, capsys):
    """The last line of one run, and what it says on the way."""
    monkeypatch.setattr(bench_agents, "measure_device", lambda: DeviceSpeed(1e10, 1e11))
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "")

    def call(*arguments: str) -> tuple[dict, str]:
        monkeypatch.setattr("sys.argv", ["bench_agents.py", *TOY.split(), *arguments])
        bench_agents.main()
        captured = capsys.readouterr()
        return json.loads(captured.out.splitlines()[-1]), captured.err

    return call


def test_a_trace_and_a_batch(run, tmp_path):
    out = tmp_path / "results.json"
    found, _ = run("--trace", "8", "--modes", "none,base_lr", "--prefill-buckets", "64",
                   "--batch", "2", "--prefix", "16", "--context", "32", "--profile", "--out", str(out))  # fmt: skip
    trace = found["trace"]["8"]
    calls = react_trace(8)
    assert trace["total_tokens"] == 944
    for mode in ("none", "base_lr"):
        figures = trace["modes"][mode]
        assert figures["prefilled_tokens"] == sum(stop - start for start, stop in spans(calls, mode)), mode
        assert 0 < figures["ttft_floor_s"] < figures["ttft_s"]
        assert figures["compile_s"] > 0
    # Pages of 8 tokens under f32 heads of 8 and r = 8: a low-rank page is a quarter of a base page.
    pages = -(-943 // 8)
    layer_bytes = {"base": 8 * 2 * 2 * 8 * 4, "low_rank": 8 * 8 * 4}
    assert trace["modes"]["base_lr"]["cache_bytes"] == pages * sum(layer_bytes.values())
    assert trace["modes"]["none"]["cache_bytes"] <= 3 * pages * layer_bytes["base"]
    assert set(trace["decode_steps"]) == {"short", "long"}
    assert found["batch"]["one_ms"] > 0
    assert found["batch"]["fitting"]["base_lr"] > 2 * found["batch"]["fitting"]["none"]
    assert len(found["profile"]) == 3
    assert json.loads(out.read_text())["trace"]["8"]["modes"] == trace["modes"]
    assert [row["what"] for row in found["targets"]] == [
        "trajectories that fit, base_lr to none", "decode step of 2 rows: x floor", "tokens/s of 2 rows to one"
    ]  # fmt: skip


def test_traces_of_one_run_share_their_programs(run):
    found, _ = run("--trace", "8,16", "--modes", "base_lr", "--no-solo")
    first, second = (found["trace"][length] for length in ("8", "16"))
    assert (first["total_tokens"], second["total_tokens"]) == (944, 976)
    assert first["prefill_buckets"] == second["prefill_buckets"]
    assert first["modes"]["base_lr"]["num_programs"] > 0
    assert second["modes"]["base_lr"]["num_programs"] == 0


def test_engines_are_made_for_the_longest_trace_that_fits():
    budget = PageBudget(LlamaConfig.preset("tiny"), 8, 4, 8)
    setting: Any = SimpleNamespace(budget=budget, repeats=1, steps=2, device_bytes=0)
    model: Any = SimpleNamespace(agents=["a", "b", "c"], weight_bytes=10**6)

    pages = {chunk: budget.pages(912 + 4 * chunk + 27) + 1 for chunk in (8, 1000)}

    def needed(chunk: int, copies: int) -> int:
        return 10**6 + budget.pool_bytes(copies * pages[chunk]) + budget.activation_bytes(64, 912 + 4 * chunk + 27)

    def chosen(device_bytes: int, chunks: set[int]):
        setting.device_bytes = device_bytes
        context, pools, missing = largest_engine(model, setting, "full", ["none", "full"], chunks, 64)
        return context, pools["num_pages"], missing

    assert chosen(needed(1000, 3), {8, 1000}) == (4939, 3 * pages[1000], None)
    assert chosen(needed(1000, 3) - 1, {8, 1000}) == (4939, pages[1000], None), "without the pools of `none`"
    assert chosen(needed(1000, 1) - 1, {8, 1000}) == (971, 3 * pages[8], None)
    context, _, missing = chosen(needed(8, 1) - 1, {8, 1000})
    assert (context, missing) == (971, {"bytes_needed": needed(8, 1), "bytes_limit": needed(8, 1) - 1})


def test_modes_whose_engines_fit_together_are_side_by_side():
    budget = PageBudget(LlamaConfig.preset("tiny"), 8, 4, 8)
    setting: Any = SimpleNamespace(budget=budget, repeats=1, steps=2, device_bytes=None)
    model: Any = SimpleNamespace(agents=["a", "b", "c"], weight_bytes=10**6)
    modes: list[Any] = ["none", "base", "base_lr"]

    def grouped(device_bytes: int | None) -> list[list[str]]:
        setting.device_bytes = device_bytes
        return [list(group) for group in side_by_side(model, setting, modes, {1000}, 64)]

    def bytes_of(mode: Any) -> int:
        return budget.pool_bytes(**largest_engine(model, setting, mode, modes, {1000}, 64).pools)

    rest = 10**6 + budget.activation_bytes(64, 912 + 4 * 1000 + 27)
    none, other = bytes_of("none"), bytes_of("base")
    assert other == bytes_of("base_lr")
    assert grouped(None) == grouped(rest + none + 2 * other) == [["none", "base", "base_lr"]]
    assert grouped(rest + none + 2 * other - 1) == [["none", "base"], ["base_lr"]]
    assert grouped(rest + none + other - 1) == [["none"], ["base", "base_lr"]]
    assert grouped(rest + none - 1) == [["none", "base"], ["base_lr"]], "the first does not fit at all"
    setting.device_bytes = rest + other - 1
    assert all(size.missing for group in side_by_side(model, setting, modes, {1000}, 64) for size in group.values())


def test_what_agents_and_trajectories_cost(run):
    found, _ = run("--memory", "--agents", "3", "--preset", "llama-3.1-8b", "--dtype", "bfloat16")
    memory = found["memory"]
    base, low_rank = 64 * 2 * 8 * 128 * 2, 64 * 8 * 2  # 64 tokens of one layer
    assert memory["tokens"] == 64
    assert memory["cache_bytes"] == {
        "none": {"3": 3 * base},
        "full": {"3": base},
        "base": {"3": base + 3 * low_rank},
        "base_lr": {"3": base + low_rank},
        "pre_lr": {"3": base + 3 * low_rank},
    }
    opened = memory["opened"]
    assert opened["tried"] == {mode: opened["counted"][mode] for mode in ("none", "base_lr")}
    assert opened["tried"] == {"none": 4, "base_lr": 13}


def test_a_mode_that_does_not_fit_says_what_it_needs_and_allocates_nothing(run, monkeypatch):
    monkeypatch.setattr(bench_agents, "device_bytes", lambda: 10**6)
    monkeypatch.setattr("lragent_jax.measure.bench_model.BenchModel.engine", None)
    found, said = run("--trace", "8", "--modes", "none,base_lr", "--batch", "3")
    sizes = {mode: figures["bytes_needed"] for mode, figures in found["trace"]["8"]["modes"].items()}
    assert sizes["none"] > sizes["base_lr"] > found["batch"]["bytes_limit"] == 10**6
    assert f"none: 944 tokens need {sizes['none']:,} bytes, the device has 1,000,000" in said


def test_the_peer_says_what_it_lacks(run, monkeypatch, capsys):
    monkeypatch.setattr(torch_peer, "PACKAGES", ("json", "no_such_package"))
    monkeypatch.setattr("sys.argv", ["torch_peer"])
    torch_peer.main()
    absent = json.loads(capsys.readouterr().out)
    assert absent == {"absent": "not installed: no_such_package"}
    monkeypatch.setattr(bench_agents, "run_peers", lambda arguments: absent)
    found, _ = run("--peers")
    assert found == {"peers": absent, "targets": []}


def test_a_second_process_traces_and_compiles_nothing(run, monkeypatch):
    toy = "--preset tiny --layers 1 --dtype float32 --pages 8 --prefill-buckets 16 --no-scoring"
    found = measure_ready(toy.split())
    for figures in found.values():
        assert figures["num_programs"] == 4  # a chunk, decoding, first tokens that are drawn, and those that are not
        assert all(figures[phase] >= 0 for phase in PHASES)
        *until_ready, _ = (figures[phase] for phase in PHASES)
        assert sum(until_ready) <= figures["ready_s"] + 0.01
    cold, warm = found["cold"], found["warm"]
    assert cold["num_compiled"] >= 3
    assert warm["num_compiled"] == 0
    # A chunk, decoding, and first tokens, which a request asks for with one of the two programs that there are.
    assert cold["num_exported"] == 0
    assert warm["num_exported"] >= 4
    assert warm["num_fetched"] == cold["num_compiled"] + cold["num_fetched"]
    monkeypatch.setattr(bench_agents, "measure_ready", lambda arguments: found)
    shown, _ = run("--ready")
    assert shown["ready"]["warm"] == found["warm"]
    assert [row["at most"] for row in shown["targets"]] == [15.0]


def test_jax_takes_the_fraction_that_was_asked_for_unless_the_user_has_chosen(monkeypatch):
    new, old = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
    for name in (new, old):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(new, "0.1")
    bench_agents.set_memory_fraction(0.95)
    assert os.environ[new] == "0.1"
    monkeypatch.delenv(new)
    monkeypatch.setenv(old, "0.2")
    bench_agents.set_memory_fraction(0.95)
    assert new not in os.environ  # both together JAX refuses
    monkeypatch.delenv(old)
    monkeypatch.setitem(os.environ, new, "to be taken back")
    del os.environ[new]
    bench_agents.set_memory_fraction(0.95)
    assert os.environ[new] == "0.95"


def test_figures_of_a_trace_by_hand():
    def output(new: int, prefilled: int, ttft: float, latency: float) -> GenerationOutput:
        return GenerationOutput(None, [0] * new, "length", prefilled, 7, ttft, latency)

    outputs = [output(5, 30, 0.2, 1.0), output(1, 10, 0.3, 0.3)]
    assert trace_figures(outputs, 100, 64) == pytest.approx({
        "total_tokens": 100, "prefilled_tokens": 40, "cached_tokens": 14, "cache_bytes": 64, "ttft_s": 0.5,
        "us_per_prefilled_token": 0.5e6 / 40, "decode_ms_per_token": 1e3 * 0.8 / 4, "tokens_per_s": 100 / 1.3,
    })  # fmt: skip


class Compilations:
    """Stands for `CompileWatch`; the runs of `compiling` compile a program each."""

    def __init__(self, monkeypatch, compiling: set[int]):
        self.num_programs, self.seconds, self.compiling, self.runs = 0, 0.0, compiling, 0
        monkeypatch.setattr(trace_run, "CompileWatch", lambda: self)

    def __enter__(self):
        self.num_programs = 0
        return self

    def __exit__(self, *exception):
        pass

    def run(self) -> dict[str, float]:
        self.num_programs += self.runs in self.compiling
        self.runs += 1
        return {"s": float(self.runs - 1), "negative": -float(self.runs - 1)}


def test_runs_that_compile_do_not_count(monkeypatch):
    watch = Compilations(monkeypatch, {0, 2, 3})
    runs = clean_runs(watch.run, repeats=3)
    assert runs.medians == {"s": 4.0, "negative": -4.0}  # of runs 1, 4 and 5
    assert runs.num_programs == 3


def test_what_is_compared_runs_in_turn(monkeypatch):
    order, compiling = [], iter([True, True, False, True, False, False, False, False, False])
    watch = Compilations(monkeypatch, set())

    def run_of(name: str):
        def run() -> dict[str, float]:
            order.append(name)
            watch.num_programs += next(compiling)
            return {"s": float(len(order))}

        return run

    runs = {name: run_of(name) for name in ("a", "b")}
    found = clean_runs_in_turn(runs, 3, runs)
    assert order == ["a", "b", "a", "b", "a", "b", "a", "b", "b"]
    assert {name: (figures.medians["s"], figures.num_programs) for name, figures in found.items()} == {
        "a": (5.0, 1), "b": (8.0, 2),
    }  # fmt: skip


def test_an_engine_that_always_compiles_is_not_timed(monkeypatch):
    watch = Compilations(monkeypatch, set(range(99)))
    with pytest.raises(RuntimeError, match="programs were compiled in 4 runs of 4"):
        clean_runs(watch.run, repeats=1)


def test_pools_that_do_not_fit_together_are_tried_alone():
    assert pool_options(["none", "full"], 3, 10)["full"] != pool_options(["full"], 3, 10)["full"]
