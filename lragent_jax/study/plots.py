"""The plots of a study."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lragent_jax.figures import MODE_COLOURS, Plot, can_plot, legend_beside, write_figures
from lragent_jax.study.agent_set import repeated_kinds
from lragent_jax.study.grid import Grid
from lragent_jax.study.results import Results

_MAIN_LENGTH = 1000


def write_plots(results: Results, folder: Path) -> list[Path]:
    """Writes those plots that there are results for, accuracy-*.png; none where matplotlib is not installed."""
    if not can_plot():
        return []
    return write_figures(folder, ((f"accuracy-{name}", size, draw) for name, size, draw in _plots(results)))


def _plots(results: Results) -> Iterator[Plot]:
    grid = Grid(results)
    for kind in grid.first_kinds:
        if len(grid.complete_lengths(kind)) > 1:
            yield f"length-{kind}", (6.4, 4.0), lambda axes, kind=kind: _by_length(axes, grid, kind)
    for kind in grid.first_kinds:
        yield f"hops-{kind}", (6.4, 4.0), lambda axes, kind=kind: _by_hops(axes, grid, kind)
    if cells := _first(results.cells("similarity")):
        yield "similarity", (6.4, 4.0), lambda axes: _similarity(axes, cells)
    if cells := _first(results.cells("sensitivity")):
        yield "sensitivity", (6.4, 3.2), lambda axes, cells=cells: _sensitivity(axes, cells)


def _first(cells: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of no repeated training: lines of one kind are drawn once."""
    again = repeated_kinds({cell["kind"] for cell in cells.values()})
    return [cell for cell in cells.values() if cell["kind"] not in again]


def _by_length(axes, grid: Grid, kind: str) -> None:
    modes = grid.modes(kind)
    for i, mode in enumerate(modes):
        found = [
            (tokens, accuracy)
            for tokens in grid.complete_lengths(kind)
            if (group := grid.group(kind, mode, tokens)) and (accuracy := group.accuracy())
        ]
        if not found:
            continue
        shift = 1 + 0.02 * (i - len(modes) / 2)  # so that intervals stand side by side
        xs, estimates = [tokens * shift for tokens, _ in found], [estimate for _, estimate in found]
        axes.errorbar(
            xs, [100 * e.value for e in estimates], yerr=_bars(estimates),
            label=mode, color=MODE_COLOURS[mode], marker="o", markersize=3, linewidth=1.2, elinewidth=0.8, capsize=2,
        )  # fmt: skip
    axes.set(xscale="log", xlabel="tokens of a right episode", ylabel="questions right (%)", title=kind, ylim=(-2, 102))
    lengths = grid.complete_lengths(kind)
    axes.set_xticks(lengths, [f"{tokens:,}" for tokens in lengths])
    axes.minorticks_off()
    legend_beside(axes)


def _by_hops(axes, grid: Grid, kind: str) -> None:
    lengths, modes = grid.lengths(kind), grid.modes(kind)
    tokens = _MAIN_LENGTH if _MAIN_LENGTH in lengths else lengths[0]
    for i, mode in enumerate(modes):
        group = grid.group(kind, mode, tokens)
        found = [(hops, estimate) for hops in (1, 2, 3) if group and (estimate := group.of_hops(hops))]
        estimates = [estimate for _, estimate in found]
        axes.bar(
            [hops + (i - (len(modes) - 1) / 2) * 0.8 / len(modes) for hops, _ in found],
            [100 * e.value for e in estimates],
            width=0.75 / len(modes), yerr=_bars(estimates), label=mode, color=MODE_COLOURS[mode],
            error_kw={"elinewidth": 0.8, "capsize": 2},
        )  # fmt: skip
    axes.set(xlabel="hops", ylabel="questions right (%)", title=f"{kind}, {tokens:,} tokens", ylim=(0, 100))
    axes.set_xticks([1, 2, 3])
    legend_beside(axes)


def _similarity(axes, cells) -> None:
    styles = {"base": "-", "low_rank": "--", "adapter": ":"}
    for number, cell in enumerate(cells):
        for part, style in styles.items():
            label = f"{cell['kind']}: {part.replace('_', ' ')}"
            axes.plot(cell[part], style, color=f"C{number}", label=label, linewidth=1.2)
    axes.set(xlabel="layer", ylabel="cosine similarity of V across agents")
    legend_beside(axes)


def _sensitivity(axes, cells) -> None:
    for number, cell in enumerate(cells):
        drift, layers = cell["drift"], cell["layers"]
        axes.plot(drift, "-", color=f"C{number}", label=cell["kind"], linewidth=1.2)
        axes.plot(layers, [drift[layer] for layer in layers], "o", color=f"C{number}", markersize=4)
    axes.set(xlabel="layer (dots: recomputed)", ylabel="KL to none, shared alone (nats)", yscale="log")
    legend_beside(axes)


def _bars(estimates) -> list[list[float]]:
    """Distances to both ends of the intervals, in percent."""
    return [
        [100 * max(0.0, e.value - e.low) for e in estimates],
        [100 * max(0.0, e.high - e.value) for e in estimates],
    ]
