"""What a demo shows: one episode with who wrote what, and a table of modes."""

import textwrap

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lragent_jax.demo import DemoReport
from lragent_jax.episodes import Episode
from lragent_jax.sharing import SharingMode

_WIDTH = 120
_WRITERS = {"Thought": "plan", "Action": "plan, action", "Observation": "a tool", "Reflect": "reflect"}
_COLUMNS = ("sharing", "answers\nright", "tokens\nprefilled", "from\ncache", "cache\nbytes", "seconds")


def print_episode(mode: SharingMode, episode: Episode) -> None:
    """The episode from its question on, line by line, each with its writer."""
    print(f"One episode under {mode}, from its question on ({len(episode.token_ids)} tokens in all):\n")
    text = episode.text[episode.text.index("\nQuestion:") + 1 :].rstrip("\n")
    for line in text.split("\n"):
        label = line.split(":", 1)[0].split(" ", 1)[0]
        margin = f"{_WRITERS.get(label, ''):>14}  "
        print(textwrap.fill(line, _WIDTH, initial_indent=margin, subsequent_indent=" " * len(margin)))
    truth = episode.question.answer.partition(": ")[2]
    print(f"\n{'Right' if episode.right else 'Wrong'}: it is {truth}.\n")


def print_table(report: DemoReport) -> None:
    """A row for every mode, and below what the columns mean."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for i, column in enumerate(_COLUMNS):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for mode, outcome in report.modes.items():
        table.add_row(
            mode,
            f"{outcome.right} of {report.num_questions}",
            f"{outcome.prefilled_tokens:,}",
            f"{outcome.cached_tokens:,}",
            f"{outcome.cache_bytes:,}",
            f"{outcome.seconds:.1f}",
        )
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH  # no terminal, no reason to squeeze large numbers
    console.print(table)
    print("Tokens are sums over all calls, cache bytes those of all episodes in the end; seconds leave compiling out,")
    print(f"which took {report.compile_seconds:.1f} s beforehand. What answers cost in accuracy: docs/accuracy.md.")
