"""What was asked for, beside what was reached, from whatever results there are."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from lragent_jax.measure.bench_results import Results

MAX, MIN = "at most", "at least"

_MAIN = 33_680  # tokens of the trace that most rows are about; up to there base_lr may lag behind full by 2 % only
_RATIOS_TO_NONE = {33_680: (2.7, 1.7), 66_448: (2.8, 2.1), 131_984: (2.85, 2.45)}


class Target(NamedTuple):
    """One row: `bound` is MAX or MIN."""

    what: str
    bound: str
    asked: float
    reached: float

    @property
    def met(self) -> bool:
        return self.reached <= self.asked if self.bound == MAX else self.reached >= self.asked

    def as_json(self) -> dict:
        return {"what": self.what, self.bound: self.asked, "reached": round(self.reached, 4), "met": self.met}


def targets(results: Results) -> list[Target]:
    """Every row that these results have the figures for."""
    found = [row for chunk in results.get("trace", {}) for row in _of_trace(results["trace"][chunk])]
    found += _of_doubling(results)
    found += _of_memory(results.get("memory", {}))
    found += _of_batch(results)
    found += _of_peers(results)
    found += _of_idle(results)
    found += _of_ready(results)
    return found


def _of_trace(trace: Results) -> Iterator[Target]:
    total = trace["total_tokens"]
    at = f"at {total:,} tokens"
    modes = {mode: figures for mode, figures in trace["modes"].items() if "ttft_s" in figures}
    for name, limit in (("short", 1.10), ("long", 1.12)):
        if total == _MAIN and (step := trace.get("decode_steps", {}).get(name)):
            reached = step["ms"] / step["floor_ms"]
            yield Target(f"decode step on {step['context']:,.0f} tokens: x floor", MAX, limit, reached)
    base_lr = modes.get("base_lr")
    if base_lr is None:
        return
    if total == _MAIN:
        yield Target(f"TTFT of base_lr {at}: x floor", MAX, 1.30, base_lr["ttft_s"] / base_lr["ttft_floor_s"])
    if full := modes.get("full"):
        limit = 1.02 if total <= _MAIN else 1.035
        yield Target(f"base_lr to full {at}, TTFT", MAX, limit, base_lr["ttft_s"] / full["ttft_s"])
        yield Target(f"base_lr to full {at}, throughput", MIN, 0.99, base_lr["tokens_per_s"] / full["tokens_per_s"])
    if (none := modes.get("none")) and total in _RATIOS_TO_NONE:
        ttft, throughput = _RATIOS_TO_NONE[total]
        yield Target(f"none to base_lr {at}, TTFT", MIN, ttft, none["ttft_s"] / base_lr["ttft_s"])
        ratio = base_lr["tokens_per_s"] / none["tokens_per_s"]
        yield Target(f"base_lr to none {at}, throughput", MIN, throughput, ratio)
    if none and total == _MAIN:
        yield Target(f"base_lr to none {at}, cache bytes", MAX, 0.34, base_lr["cache_bytes"] / none["cache_bytes"])
    if pre_lr := modes.get("pre_lr"):
        ratio = pre_lr["tokens_per_s"] / base_lr["tokens_per_s"]
        yield Target(f"pre_lr to base_lr {at}, throughput", MIN, 0.98, ratio)


def _of_doubling(results: Results) -> Iterator[Target]:
    """Time per prefilled token of C to 2C against what attention's own FLOP per token grow by."""
    traces = results.get("trace", {})
    for chunk in traces:
        short, long = traces[chunk]["modes"], traces.get(str(2 * int(chunk)), {"modes": {}})["modes"]
        for mode in short:
            if "ttft_s" in short[mode] and "ttft_s" in long.get(mode, {}):
                grown, allowed = (
                    long[mode][name] / short[mode][name]
                    for name in ("us_per_prefilled_token", "attention_flop_per_token")
                )
                what = f"time per prefilled token, {mode}, C = {chunk} to {2 * int(chunk)}"
                yield Target(what, MAX, allowed, grown)


def _of_memory(memory: Results) -> Iterator[Target]:
    limits = {"base": 0.01, "pre_lr": 0.01, "base_lr": 0.0}
    for mode, by_agents in memory.get("cache_bytes", {}).items():
        if mode in limits and len(by_agents) > 1:
            yield Target(f"cache bytes per further agent, {mode}", MAX, limits[mode], growth_per_agent(by_agents))
    if opened := memory.get("opened"):
        tried = opened["tried"]
        yield Target("trajectories opened in a small pool, base_lr to none", MIN, 2.8, tried["base_lr"] / tried["none"])


def growth_per_agent(by_agents: Results) -> float:
    """The largest growth per agent added, relative to the bytes with the fewest. Keys are numbers of agents."""
    counts = sorted(int(count) for count in by_agents)
    fewest = by_agents[str(counts[0])]
    return max(
        (by_agents[str(b)] - by_agents[str(a)]) / ((b - a) * fewest) for a, b in itertools.pairwise(counts)
    )  # fmt: skip


def _of_batch(results: Results) -> Iterator[Target]:
    batch = results.get("batch", {})
    if "ms" in batch:
        rows, fit = batch["rows"], batch["fitting"]
        yield Target("trajectories that fit, base_lr to none", MIN, 2.8, fit["base_lr"] / max(1, fit["none"]))
        yield Target(f"decode step of {rows} rows: x floor", MAX, 1.3, batch["ms"] / batch["floor_ms"])
        # 23 x for 64 rows: as much of what 64 rows could give at best.
        yield Target(f"tokens/s of {rows} rows to one", MIN, 23 * rows / 64, rows * batch["one_ms"] / batch["ms"])


def _of_peers(results: Results) -> Iterator[Target]:
    peers = results.get("peers", {})
    solo = [trace["solo"] for trace in results.get("trace", {}).values() if "solo" in trace]
    if not solo or "absent" in peers:
        return
    ours = max(solo, key=lambda figures: len(figures["prefill_s"]))  # the shortest trace that has them all
    for tokens, seconds in peers.get("prefill_s", {}).items():
        if tokens in ours["prefill_s"]:
            ratio = seconds / ours["prefill_s"][tokens]
            yield Target(f"transformers + PEFT to us, prefill of {int(tokens):,}", MIN, 1.3, ratio)
    for name, what, limit in (("eager", "eager", 12), ("merged", "merged, static, compiled", 1.0)):
        if f"{name}_decode_ms" in peers:
            ratio = peers[f"{name}_decode_ms"] / ours["decode_ms"]
            yield Target(f"transformers + PEFT to us, decode, {what}", MIN, limit, ratio)


def _of_idle(results: Results) -> Iterator[Target]:
    for name, profile in results.get("profile", {}).items():
        if "idle_untraced" in profile:
            yield Target(f"share of a step that the device idles, {name}", MAX, 0.03, profile["idle_untraced"])


def _of_ready(results: Results) -> Iterator[Target]:
    if ready := results.get("ready"):
        yield Target(f"seconds to ready, programs on disk, {ready['preset']}", MAX, 15.0, ready["warm"]["ready_s"])
