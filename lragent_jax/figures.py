"""Plots as files: what those of a study and of a benchmark have in common. Needs matplotlib."""

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lragent_jax.sharing import SHARING_MODES

MODE_COLOURS: dict[str, str] = dict(
    zip(SHARING_MODES, ("#222222", "#c1272d", "#0571b0", "#1b9e77", "#7570b3", "#e6a100", "#8c564b"), strict=True)
)

Plot = tuple[str, tuple[float, float], Callable[[Any], None]]
"""A file's name without its ending, width and height in inches, and what draws into matplotlib's axes."""


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def legend_beside(axes: Any) -> None:
    """Says to the right of the plot what is what."""
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def write_figures(folder: Path, plots: Iterable[Plot]) -> list[Path]:
    """Writes every plot as a PNG, the same bytes for the same numbers; makes the folder. Returns the files."""
    importlib.import_module("matplotlib").use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, size, draw in plots:
        figure, axes = pyplot.subplots(figsize=size, layout="constrained")
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=120, metadata={"Software": None})
        pyplot.close(figure)
        written.append(path)
    return written
