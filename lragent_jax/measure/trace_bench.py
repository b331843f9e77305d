"""The trace under several modes side by side, over weights made once; and one trajectory by itself."""

import contextlib
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lragent_jax.compile_watch import CompileWatch
from lragent_jax.engine import Engine
from lragent_jax.measure.bench_model import BenchModel
from lragent_jax.measure.bench_setting import BenchSetting, say
from lragent_jax.measure.device_trace import around_longest_gap, busiest_program, idle_shares, traced_kernels
from lragent_jax.measure.page_budget import pool_options
from lragent_jax.measure.react_trace import mean_context, num_tokens, react_trace, trace_buckets
from lragent_jax.measure.roofline import Roofline, predict
from lragent_jax.measure.tpu_chips import Chip
from lragent_jax.measure.trace_run import (
    clean_runs_in_turn,
    decode_step,
    exactly,
    prefill_seconds,
    random_ids,
    run_trace,
)
from lragent_jax.sharing import SharingMode
from lragent_jax.trajectory import Trajectory

SHORT = 128
"""Tokens of a short context: next to nothing of a decode step is the cache."""

PEER_CONTEXT = 4096
PEER_PREFILLS = (4096, 8192)

_FLOORS = ("none", "full", "base_lr", "pre_lr")  # what a call runs under `base` has two kinds of floor


def spare_tokens(setting: BenchSetting) -> int:
    """What a trajectory grows by, beyond a trace, while its decode step is measured and profiled."""
    return (setting.repeats + 8) * (1 + setting.steps)


def measure_trace(
    model: BenchModel,
    setting: BenchSetting,
    chunk: int,
    modes: Sequence[SharingMode],
    buckets: Sequence[int] | None = None,
    solo: bool = True,
    beside: Sequence[int] = (),
) -> Iterator[dict[str, Any]]:
    """Figures of every mode, or the bytes it would need; in `base_lr`, `solo` adds one trajectory by itself.

    Modes whose engines fit side by side run the trace in turn. `beside` are the other traces of this run: engines are
    made for the longest of them that fits, and have chunks for all, so that programs are compiled once. After every
    such group of modes, all that is known by then.
    """
    total = num_tokens(react_trace(chunk))
    buckets = sorted(buckets or {size for length in (chunk, *beside) for size in trace_buckets(length)})
    result: dict[str, Any] = {"total_tokens": total, "prefill_buckets": buckets, "modes": {}}
    for sizes in side_by_side(model, setting, modes, {max(chunk, length) for length in (chunk, *beside)}, buckets[-1]):
        for mode, size in sizes.items():
            if size.missing:
                result["modes"][mode] = size.missing
                say(f"{mode}: {total:,} tokens need {size.missing['bytes_needed']:,} bytes, "
                    f"the device has {size.missing['bytes_limit']:,}")  # fmt: skip
        engines = {
            mode: model.engine(
                mode, size.context_length, **size.pools, prefill_buckets=buckets, prefix_cache=False,
                **setting.engine_options(),
            )
            for mode, size in sizes.items() if not size.missing
        }  # fmt: skip
        for mode, figures in _traced(engines, chunk, setting.repeats, buckets[-1]).items():
            result["modes"][mode] = figures | _floors(model, setting, mode, chunk, buckets[-1])
            say(f"{mode}: TTFT {figures['ttft_s']:.3f} s, {figures['tokens_per_s']:.0f} tokens/s, "
                f"{figures['num_programs']} programs compiled or fetched in {figures['compile_s']:.1f} s")  # fmt: skip
        yield dict(result)
        if solo and "base_lr" in engines:
            result |= _solo(engines["base_lr"], model, setting, total)
            yield dict(result)
        engines.clear()  # before the next ones are made


def _traced(engines: Mapping[str, Engine], chunk: int, repeats: int, bucket: int) -> dict[str, dict[str, float]]:
    """What the trace took every engine, and what compiling took before."""
    calls, warm = react_trace(chunk), react_trace(min(chunk, bucket))  # the same programs in less time
    compiled = {}
    for mode, engine in engines.items():
        with CompileWatch() as watch:
            times = engine.warmup(scoring=False)
        compiled[mode] = watch.num_programs, times.lower_s + times.compile_s
    all_runs = clean_runs_in_turn(
        {mode: functools.partial(run_trace, engine, calls) for mode, engine in engines.items()},
        repeats,
        {mode: functools.partial(run_trace, engine, warm) for mode, engine in engines.items()},
    )
    figures = {}
    for mode, (num_programs, compile_s) in compiled.items():
        runs = all_runs[mode]
        figures[mode] = runs.medians | {
            "num_programs": num_programs + runs.num_programs, "compile_s": compile_s + runs.compile_s,
        }  # fmt: skip
    return figures


class EngineSize(NamedTuple):
    """Context length and pools of an engine; what `missing_bytes` says of it."""

    context_length: int
    pools: dict[str, int]
    missing: dict[str, int] | None


def side_by_side(
    model: BenchModel, setting: BenchSetting, modes: Sequence[SharingMode], chunks: Collection[int], bucket: int
) -> list[dict[SharingMode, EngineSize]]:
    """The modes in order, cut into groups whose engines fit into the device together."""
    groups: list[dict[SharingMode, EngineSize]] = []
    for mode in modes:
        size = largest_engine(model, setting, mode, modes, chunks, bucket)
        beside = [] if not groups else [other for other in groups[-1].values() if not other.missing]
        held = sum(setting.budget.pool_bytes(**other.pools) for other in beside)
        longest = max(other.context_length for other in (size, *beside))
        if not groups or (not size.missing and missing_bytes(model, setting, size.pools, bucket, longest, held)):
            groups.append({})
        groups[-1][mode] = size
    return groups


def largest_engine(
    model: BenchModel, setting: BenchSetting, mode: SharingMode, modes: Sequence[SharingMode],
    chunks: Collection[int], bucket: int,
) -> EngineSize:  # fmt: skip
    """That of an engine for the longest of these traces that fits, with the pools of `modes` if these fit, too; where
    not even the shortest does, that of the shortest.
    """

    def sized(chunk: int, among: Sequence[SharingMode]) -> EngineSize:
        context_length = num_tokens(react_trace(chunk)) + spare_tokens(setting)  # the longest exceeds the preset's
        pools = pool_options(among, len(model.agents), setting.budget.pages(context_length) + 1)[mode]
        return EngineSize(context_length, pools, missing_bytes(model, setting, pools, bucket, context_length))

    alone: list[SharingMode] = [mode]
    sizes = [sized(chunk, among) for chunk in sorted(chunks, reverse=True) for among in (modes, alone)]
    return next((size for size in sizes if size.missing is None), sizes[-1])


def missing_bytes(
    model: BenchModel, setting: BenchSetting, pools: dict[str, int], chunk: int, context: int, held: int = 0
) -> dict[str, int] | None:  # fmt: skip
    """None if pools of that size fit beside the weights and what is `held`, or nobody knows; else what is needed and
    what there is.
    """
    activations = setting.budget.activation_bytes(chunk, context)
    needed = model.weight_bytes + held + setting.budget.pool_bytes(**pools) + activations
    if setting.device_bytes is None or needed <= setting.device_bytes:
        return None
    return {"bytes_needed": needed, "bytes_limit": setting.device_bytes}


def _floors(model: BenchModel, setting: BenchSetting, mode: str, chunk: int, bucket: int) -> dict[str, float]:
    """The least time for the mode's work, and what attention has to do for each token of it."""
    c = model.config
    context = mean_context(react_trace(chunk), mode)
    figures = {"attention_flop_per_token": 4.0 * c.num_layers * c.num_heads * c.head_dim * context}
    if mode in _FLOORS:
        here = Chip("here", 0, setting.speed.bytes_per_s, setting.speed.flop_per_s)
        floors = predict(Roofline(here, 1, c, setting.rank, chunk=bucket, itemsize=setting.itemsize), mode, chunk)
        figures |= {
            "ttft_floor_s": floors["ttft_s"], "decode_floor_ms": floors["decode_ms_per_token"],
            "tokens_per_s_floor": floors["tokens_per_s"],
        }  # fmt: skip
    return figures


def _solo(engine: Engine, model: BenchModel, setting: BenchSetting, total: int) -> dict[str, Any]:
    """One trajectory: decode steps on short and long contexts, and prefills that peers are compared with."""
    agent, room = model.agents[0], total
    steps, profile = {}, {}
    contexts = {"short": SHORT, str(PEER_CONTEXT): PEER_CONTEXT, "long": total}
    for name, context in contexts.items():
        if context > room:
            continue
        with contextlib.closing(engine.trajectory()) as trajectory:
            trajectory.append(random_ids(engine, context))
            step = decode_step(engine, [trajectory], [agent], setting.steps, setting.repeats)
            steps[name] = step | {"floor_ms": setting.step_floor_ms(model.weight_bytes, step["context"])}
            if setting.profile and name != str(PEER_CONTEXT):
                profile[f"one row on {context:,} tokens"] = profiled(
                    engine, [trajectory], [agent], 2 * setting.steps, step["ms"]
                )
    prefills = {
        str(tokens): prefill_seconds(engine, agent, tokens, setting.repeats)
        for tokens in PEER_PREFILLS
        if tokens <= room
    }
    result: dict[str, Any] = {"decode_steps": steps}
    if str(PEER_CONTEXT) in steps:
        result["solo"] = {"prefill_s": prefills, "decode_ms": steps[str(PEER_CONTEXT)]["ms"]}
    return result | ({"profile": profile} if profile else {})


def profiled(
    engine: Engine, trajectories: Sequence[Trajectory], agents: Sequence[str], steps: int, step_ms: float
) -> dict[str, Any]:  # fmt: skip
    """When the device idles while so many steps are decoded, of `step_ms` each without the profiler.

    Nothing new should be in the trajectories.
    """
    kernels = busiest_program(
        traced_kernels(lambda: engine.generate(list(trajectories), list(agents), exactly(1 + steps)))
    )
    if not kernels:
        return {"absent": "the profiler saw no device"}
    return idle_shares(kernels, steps, step_ms) | {"kernels": around_longest_gap(kernels)}
