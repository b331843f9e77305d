"""`lragent world`: writes training examples and questions from a made-up world."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lragent_jax.cli import options
from lragent_jax.cli.console import progress_bar
from lragent_jax.models.errors import InputError

if TYPE_CHECKING:
    from lragent_jax.tokenizer import Tokenizer


def world(
    out: Annotated[Path, typer.Option(help="The folder to write to.", show_default=False)],
    split: Annotated[str, typer.Option(help="train, validation or evaluation: no name occurs in two.")] = "train",
    num_questions: Annotated[int, typer.Option(min=1, help="Trajectories: one for each question.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Worlds and questions follow from it.")] = 0,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of every trajectory; without it a mix.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace such a set if one is there.")] = False,
    model: options.OptionalModel = None,
) -> None:
    """Write plan.jsonl, action.jsonl, reflect.jsonl: lines of input and output; trajectories.jsonl; questions.jsonl."""
    from lragent_jax.embedded import find_model
    from lragent_jax.world.examples import DEFAULT_MIX, Mix, write_examples
    from lragent_jax.world.names import SPLITS
    from lragent_jax.world.padding import TokenCounter

    if split not in SPLITS:
        raise typer.BadParameter(f"{split!r} is none of {', '.join(SPLITS)}", param_hint="--split")
    with progress_bar() as progress:
        progress(0, 0, "reading the tokenizer")
        encode = _tokenizer(find_model() if model is None else model).encode
        mix = DEFAULT_MIX if tokens is None else Mix.of_length(tokens)
        size = write_examples(out, split, num_questions, seed, TokenCounter(encode), mix, progress, force=force)
    for name, number in size.lines.items():
        print(f"{out / name}.jsonl: {number} lines")
    told = f"{num_questions} trajectories of {size.mean_tokens:,.0f} tokens on average"
    if tokens is not None and size.mean_tokens > 1.1 * tokens:
        told += f": more than the {tokens:,} asked for, for they are as long without any text about others"
    print(told)


def _tokenizer(model: Path) -> "Tokenizer":
    from lragent_jax.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        raise InputError(f"{model} has no tokenizer to count tokens with")
    return tokenizer
