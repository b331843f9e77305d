"""A replay's report as a table."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from lragent_jax.replay_report import ReplayReport


def print_report(report: "ReplayReport") -> None:
    """The table of modes on standard output, with what was left out below it."""
    columns = (
        "sharing",
        "tokens\nprefilled",
        "tokens read\nfrom cache",
        "cache\nbytes",
        "time to first\ntoken (s)",
        "tokens\nper second",
        f"top-1 as\nin {report.reference}",
        f"KL from {report.reference}\n(nats)",
    )
    table = Table(title=_title(report), title_justify="left", title_style="")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for mode, figures in report.modes.items():
        table.add_row(
            mode,
            f"{figures.prefilled_tokens:,}",
            f"{figures.cached_tokens:,}",
            f"{figures.cache_bytes:,}",
            f"{figures.ttft_s:.2f}",
            f"{figures.tokens_per_s:.1f}",
            f"{100 * figures.top1_agreement:.1f} %",
            f"{figures.kl:.2e}",
        )
    # A table that is not shown but piped must not lose columns to a terminal's width.
    console = Console()
    if not console.is_terminal:
        console.width = 140
    console.print(table)
    for note in report.notes:
        console.print(note, markup=False, highlight=False)


def _title(report: "ReplayReport") -> str:
    trajectories = f"{report.num_trajectories} trajector{'y' if report.num_trajectories == 1 else 'ies'}"
    return (
        f"{trajectories}, {report.num_tokens:,} tokens, of which {report.num_output_tokens:,} in {report.num_outputs} "
        "recorded outputs"
    )
