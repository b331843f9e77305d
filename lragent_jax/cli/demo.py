"""`lragent demo`: the embedded agents at work."""

from typing import Annotated

import typer

from lragent_jax.cli import options
from lragent_jax.cli.console import labelled, progress_bar

_INTRODUCTION = """\
Three agents (plan, action, reflect), each a LoRA adapter over SmolLM2-135M-Instruct, answer questions about a made-up
world that their training never showed: they write freely, tools answer, and all of them read one growing context.
They do so once in each of four sharing modes. Questions and tools are the same in all of them: what differs is how much
each agent runs for itself, how much it reads from the cache that others filled, and what that makes of the answers.
"""


def demo(
    questions: Annotated[int, typer.Option(min=1, help="How many; they run as one batch.")] = 4,
    hops: Annotated[int, typer.Option(min=1, max=3, help="Facts that lead from a question to its answer.")] = 1,
    tokens: Annotated[
        int, typer.Option(min=1, help="Length of an episode, by paragraphs that nobody asked for.")
    ] = 250,
    seed: Annotated[int, typer.Option(min=0, help="Of the questions.")] = 0,
    json: options.Json = False,
) -> None:
    """Let trained agents answer questions in four sharing modes."""
    from lragent_jax import compilation_cache
    from lragent_jax.cli.demo_table import print_episode, print_table
    from lragent_jax.demo import run_demo
    from lragent_jax.embedded import embedded_engine, find_model
    from lragent_jax.world.question import make_questions

    find_model()  # without it nothing is said but how to get it
    compilation_cache.enable()
    if not json:
        print(_INTRODUCTION, flush=True)
    with progress_bar() as progress:
        progress(0, 0, "reading SmolLM2-135M-Instruct")
        engine = embedded_engine("full", num_pages=1, progress=labelled(progress, "reading SmolLM2-135M-Instruct"))
        asked = list(make_questions("evaluation", questions, seed, hops))
        # A right episode takes one step for every hop, or two, and one to finish.
        report = run_demo(engine, asked, target_tokens=tokens, max_steps=2 * hops + 1, progress=progress)
    if not json:
        last_mode, outcome = list(report.modes.items())[-1]
        print_episode(last_mode, outcome.episodes[0])
        print_table(report)
    print(report.to_json())
