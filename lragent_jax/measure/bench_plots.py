"""Figures from the file of results alone."""

from collections.abc import Iterator
from pathlib import Path

from lragent_jax.figures import MODE_COLOURS, Plot, legend_beside, write_figures
from lragent_jax.measure.bench_results import Results
from lragent_jax.measure.targets import MAX, targets


def write_plots(results: Results, folder: Path) -> list[Path]:
    """Writes those plots that there are results for, agents-*.png. Needs matplotlib."""
    return write_figures(folder, ((f"agents-{name}", size, draw) for name, size, draw in _plots(results)))


def _plots(results: Results) -> Iterator[Plot]:
    traces = list(results.get("trace", {}).values())
    figures = (
        ("ttft", "ttft_s", "ttft_floor_s", "time to first tokens, s"),
        ("throughput", "tokens_per_s", "tokens_per_s_floor", "tokens per s"),
        ("decode", "decode_ms_per_token", "decode_floor_ms", "ms per token decoded"),
    )
    for name, figure, floor, label in figures:
        if any(figure in of_mode for trace in traces for of_mode in trace["modes"].values()):
            yield name, (6.4, 4.0), lambda axes, of=(figure, floor, label): _by_length(axes, traces, *of)
    if bytes_by_mode := results.get("memory", {}).get("cache_bytes"):
        yield "memory", (6.4, 4.0), lambda axes: _by_agents(axes, bytes_by_mode)
    for i, profile in enumerate(p for p in results.get("profile", {}).values() if p.get("kernels")):
        yield f"timeline-{i + 1}", (8.0, 1.8), lambda axes, profile=profile: _timeline(axes, profile)
    if rows := targets(results):
        yield "targets", (8.0, 0.6 + 0.24 * len(rows)), lambda axes: _targets(axes, rows)


def _by_length(axes, traces: list[Results], figure: str, floor: str, label: str) -> None:
    lengths = sorted({trace["total_tokens"] for trace in traces})
    for mode, colour in MODE_COLOURS.items():
        found = [
            (trace["total_tokens"], trace["modes"][mode])
            for trace in sorted(traces, key=lambda trace: trace["total_tokens"])
            if figure in trace["modes"].get(mode, {})
        ]
        if found:
            axes.plot(*zip(*((x, of[figure]) for x, of in found), strict=True), "o-", color=colour, markersize=4,
                      linewidth=1.2, label=mode)  # fmt: skip
        floors = [(x, of[floor]) for x, of in found if floor in of]
        if floors:
            axes.plot(*zip(*floors, strict=True), ":", color=colour, linewidth=1.0, label=f"{mode}: floor")
    axes.set(xscale="log", yscale="log", xlabel="tokens of the trace", ylabel=label)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize=8)
    axes.minorticks_off()
    legend_beside(axes)


def _by_agents(axes, bytes_by_mode: Results) -> None:
    for mode, by_agents in bytes_by_mode.items():
        counts = sorted(map(int, by_agents))
        one = by_agents[str(counts[0])]
        ratios = [by_agents[str(count)] / one for count in counts]
        axes.plot(counts, ratios, "o-", color=MODE_COLOURS[mode], markersize=4, linewidth=1.2, label=mode)
    axes.set(xlabel="agents", ylabel="cache bytes, over those of one agent", yscale="log")
    axes.legend(frameon=False, fontsize=8)


def _timeline(axes, profile: Results) -> None:
    """The kernels around the longest gap between two of them."""
    bars = [(start, duration) for start, duration, _ in profile["kernels"]]
    axes.broken_barh(bars, (0, 1), facecolors=MODE_COLOURS["base_lr"], edgecolors="white", linewidth=0.3)
    title = f"idle: {profile['idle']:.1%} of the time while traced, {profile['idle_untraced']:.1%} otherwise"
    axes.set(xlabel="µs from the longest gap of the block", yticks=[], title=title)


def _targets(axes, rows: list) -> None:
    """How far each row is from what was asked for: 1 is just met, less is missed."""
    margins = [
        (row.asked / row.reached if row.reached else 1.0) if row.bound == MAX else row.reached / row.asked
        for row in rows
    ]
    colours = [MODE_COLOURS["base_lr" if row.met else "full"] for row in rows]
    axes.barh(range(len(rows)), margins, color=colours, height=0.7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row.what for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="met from 1 on", xlim=(0, 2))
