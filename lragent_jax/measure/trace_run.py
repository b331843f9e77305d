"""One engine timed from outside: a whole trace, a decode step, a prefill; only runs in which nothing was compiled."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lragent_jax.compile_watch import CompileWatch
from lragent_jax.engine import Engine
from lragent_jax.measure.react_trace import Call
from lragent_jax.outputs import GenerationOutput
from lragent_jax.sampling_params import SamplingParams
from lragent_jax.trajectory import Trajectory

Figures = dict[str, float]

_ATTEMPTS = 3  # at a run without a compilation, beyond those that were asked for


class CleanRuns(NamedTuple):
    """The medians of runs without a compilation, and what compiling took before them."""

    medians: Figures
    num_programs: int
    compile_s: float


def clean_runs(run: Callable[[], Figures], repeats: int, warm: Callable[[], Any] | None = None) -> CleanRuns:
    """`run` until `repeats` runs have compiled nothing, after one of `warm` (`run` by default) that is not counted.

    Raises `RuntimeError` where every run compiles something: then its figures would not be those of a warm engine.
    """
    return clean_runs_in_turn({"": run}, repeats, {"": warm or run})[""]


def clean_runs_in_turn(
    runs: Mapping[str, Callable[[], Figures]], repeats: int, warm: Mapping[str, Callable[[], Any]]
) -> dict[str, CleanRuns]:
    """The same of several that are compared with each other: one run of each after the other, time and again.

    What a machine has to do beside it changes by the minute; in turn, all have their share of that.
    """
    found: dict[str, list[Figures]] = {name: [] for name in runs}
    programs, seconds = dict.fromkeys(runs, 0), dict.fromkeys(runs, 0.0)

    def watched(name: str, run: Callable[[], Any]) -> tuple[Any, bool]:
        """What it returns, and whether nothing was compiled."""
        with CompileWatch() as watch:
            result = run()
        programs[name] += watch.num_programs
        seconds[name] += watch.seconds
        return result, watch.num_programs == 0

    for name, run in warm.items():
        watched(name, run)
    for _ in range(repeats + _ATTEMPTS):
        for name, run in runs.items():
            if len(found[name]) < repeats:
                figures, clean = watched(name, run)
                if clean:
                    found[name].append(figures)
    for name, figures in found.items():
        if len(figures) < repeats:
            num_compiling = repeats + _ATTEMPTS - len(figures)
            raise RuntimeError(
                f"{name}{name and ': '}programs were compiled in {num_compiling} runs of {repeats + _ATTEMPTS}"
            )
    return {name: CleanRuns(medians(figures), programs[name], seconds[name]) for name, figures in found.items()}


def medians(runs: Sequence[Mapping[str, float]]) -> Figures:
    """Of each figure by itself."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def exactly(num_tokens: int) -> SamplingParams:
    """Greedy, and never stopped early."""
    return SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)


def random_ids(engine: Engine, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, engine.config.vocab_size, count)


def run_trace(engine: Engine, calls: Sequence[Call]) -> Figures:
    """The trace once, on the same random ids every time: give the engine no prefix cache."""
    ids = random_ids(engine, sum(new for _, new, _ in calls))
    outputs, used = [], 0
    with engine.trajectory() as trajectory:
        for agent, new, decoded in calls:
            trajectory.append(ids[used : used + new])
            used += new
            outputs.append(engine.generate(trajectory, agent, exactly(decoded)))
        return trace_figures(outputs, len(trajectory), engine.cache_stats().bytes_used)


def trace_figures(outputs: Sequence[GenerationOutput], total_tokens: int, cache_bytes: int) -> Figures:
    """TTFT summed over the calls; tokens of the trace per second of all calls; milliseconds per token decoded."""
    ttft, latency = sum(out.ttft_s for out in outputs), sum(out.latency_s for out in outputs)
    prefilled = sum(out.num_prefilled_tokens for out in outputs)
    return {
        "total_tokens": total_tokens,
        "prefilled_tokens": prefilled,
        "cached_tokens": sum(out.num_cached_tokens for out in outputs),
        "cache_bytes": cache_bytes,
        "ttft_s": ttft,
        "us_per_prefilled_token": 1e6 * ttft / prefilled,
        "decode_ms_per_token": 1e3 * (latency - ttft) / sum(len(out.token_ids) - 1 for out in outputs),
        "tokens_per_s": total_tokens / latency,
    }


def decode_step(
    engine: Engine, trajectories: Sequence[Trajectory], agents: Sequence[str], steps: int, repeats: int
) -> Figures:
    """Milliseconds of one decode step of all rows together, from `steps` steps without a look of the host at them.

    Whatever is new in the trajectories is read first, and the tokens join them. `context` is the mean context of the
    steps that count.
    """
    contexts: list[float] = []

    def run() -> Figures:
        outputs = engine.generate(list(trajectories), list(agents), exactly(1 + steps))
        contexts.append(statistics.mean(map(len, trajectories)) - steps / 2)
        return {"ms": 1e3 * statistics.median((out.latency_s - out.ttft_s) / steps for out in outputs)}

    figures = clean_runs(run, repeats).medians
    return {"ms": figures["ms"], "context": statistics.mean(contexts[-repeats:]), "rows": len(trajectories)}


def prefill_seconds(engine: Engine, agent: str, num_tokens: int, repeats: int) -> float:
    """From a cold context of so many tokens to its first token."""
    ids = random_ids(engine, num_tokens, seed=1)

    def run() -> Figures:
        with engine.trajectory() as trajectory:
            return {"s": engine.generate(trajectory.append(ids), agent, exactly(1)).ttft_s}

    return clean_runs(run, repeats).medians["s"]


def wall_seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
