"""The report of a study, from its results alone."""

from pathlib import Path

from lragent_jax.study.plots import write_plots
from lragent_jax.study.results import Results
from lragent_jax.study.tables import markdown


def write_report(results: Results, folder: Path) -> list[Path]:
    """Writes accuracy.md and, where matplotlib is installed, the plots that it shows; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = write_plots(results, folder)
    page = folder / "accuracy.md"
    page.write_text(markdown(results, [plot.name for plot in plots]))
    return [page, *plots]
