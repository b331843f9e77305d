"""`lragent demo`: the embedded default."""

from typing import Annotated

import typer

from lragent_jax.cli import options
from lragent_jax.cli.console import labelled, progress_bar

_INTRODUCTION = """\
Three agents (plan, action, reflect), each a LoRA adapter over SmolLM2-135M-Instruct, work through a recorded ReAct
trajectory under five sharing modes. The text is the same in all of them: what differs is how much of it each agent
runs for itself, how much it reads from the cache the others filled, and how far that moves the next token.
The adapters are untrained; the model and the text are real.
"""


def demo(
    limit: Annotated[int, typer.Option(min=1, help="How many trajectories; each takes about half a minute.")] = 1,
    json: options.Json = False,
) -> None:
    """Show five sharing modes on a small real Llama; under two minutes on two CPU cores."""
    from lragent_jax import compilation_cache
    from lragent_jax.cli.replay_table import print_report
    from lragent_jax.demo import DEMO_MODES, demo_engine, demo_trajectories, find_model
    from lragent_jax.replay import replay as run

    model, trajectories = find_model(), demo_trajectories()[:limit]
    compilation_cache.enable()
    if not json:
        print(_INTRODUCTION, flush=True)
    with progress_bar() as progress:
        progress(0, 0, "reading SmolLM2-135M-Instruct")
        engine = demo_engine(model, labelled(progress, "reading SmolLM2-135M-Instruct"))
        report = run(engine, trajectories, DEMO_MODES, warmup=True, progress=progress)
    if not json:
        print_report(report)
    print(report.to_json())
