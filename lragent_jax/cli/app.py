"""The commands, and what becomes of our errors."""

from typing import Any

import typer
from typer.core import TyperGroup

from lragent_jax.cli import convert, demo, generate, info, replay, train, world
from lragent_jax.cli.console import stderr
from lragent_jax.models.errors import LRAgentError


class _Commands(TyperGroup):
    """Tells errors of ours, and that it was interrupted, in words, without a traceback."""

    def invoke(self, ctx) -> Any:
        try:
            return super().invoke(ctx)
        except LRAgentError as error:
            stderr().print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            advice = "; the same command goes on from the last checkpoint" if ctx.invoked_subcommand == "train" else ""
            stderr().print(f"interrupted{advice}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    name="lragent",
    help="Several LoRA agents over one Llama, one shared KV cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for command in (replay.replay, generate.generate, convert.convert, info.info, demo.demo, train.train, world.world):
    app.command()(command)
