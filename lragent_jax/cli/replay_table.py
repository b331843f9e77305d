"""A replay's report as a table."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lragent_jax.replay_report import DECODED_TOKENS, ReplayReport


def print_report(report: ReplayReport) -> None:
    """The table of modes on standard output, and below it what its columns mean and what was left out."""
    table = Table(
        title=_title(report),
        title_justify="left",
        title_style="",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    columns = (
        "sharing",
        "tokens\nprefilled",
        "from\ncache",
        "cache\nbytes",
        "to first\ntoken (s)",
        "tokens\nper s",
        f"top-1 as\n{report.reference}",
        f"KL from\n{report.reference}",
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for mode, figures in report.modes.items():
        table.add_row(
            mode,
            f"{figures.prefilled_tokens:,}",
            f"{figures.cached_tokens:,}",
            f"{figures.cache_bytes:,}",
            f"{figures.ttft_s:.2f}",
            "-" if figures.tokens_per_s is None else f"{figures.tokens_per_s:.1f}",
            f"{100 * figures.top1_agreement:.1f} %",
            f"{figures.kl:.1e}",
        )
    console = Console()
    if not console.is_terminal:
        console.width = 120  # no terminal, no reason to squeeze large numbers
    console.print(table)
    for line in (*_LEGEND, *report.notes):
        console.print(line, markup=False, highlight=False)


_LEGEND = (
    "Tokens and seconds to the first token are sums over all calls; cache bytes are those of the largest trajectory.",
    f"Tokens per second: one call of {DECODED_TOKENS} tokens. KL in nats, a mean over the recorded outputs' positions.",
)


def _title(report: ReplayReport) -> str:
    trajectories = f"{report.num_trajectories} trajector{'y' if report.num_trajectories == 1 else 'ies'}"
    return (
        f"{trajectories}, {report.num_tokens:,} tokens, of which {report.num_output_tokens:,} in {report.num_outputs} "
        "recorded outputs"
    )
