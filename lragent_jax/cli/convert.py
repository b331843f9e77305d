"""`lragent convert`: models and adapters from one format to another, and stacking."""

from pathlib import Path
from typing import Annotated

import typer

from lragent_jax.cli import options
from lragent_jax.cli.console import labelled, progress_bar

_FORMATS = ("orbax", "peft")


def convert(
    source: Annotated[
        list[str],
        typer.Argument(
            help="A model or an adapter; with --stack, agents as NAME=FOLDER.", metavar="SOURCE...", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.", show_default=False)],
    model: options.OptionalModel = None,
    to: Annotated[str, typer.Option(help="Of adapters: orbax or peft. Models become Orbax checkpoints.")] = "orbax",
    stack: Annotated[
        bool, typer.Option("--stack", help="Make the adapters one A-group; writes one folder per agent.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Of a model: bfloat16, float16 or float32.")] = "bfloat16",
    force: Annotated[bool, typer.Option("--force", help="Replace what is there, if it is of the same kind.")] = False,
) -> None:
    """Convert a model (Hugging Face, GGUF) or an adapter (PEFT) to Orbax or an adapter back, or stack adapters."""
    if to not in _FORMATS:
        raise typer.BadParameter(f"adapters are written as {' or '.join(_FORMATS)}, not {to!r}", param_hint="--to")
    agents = options.name_path_pairs(source, "SOURCE") if stack else {}
    if not stack and len(source) != 1:
        raise typer.BadParameter("one source at a time; --stack takes several adapters", param_hint="SOURCE")
    if stack and model is None:
        raise typer.BadParameter("stacking adapters needs the model they belong to", param_hint="--model")
    from lragent_jax import convert as library
    from lragent_jax.models.folder import find_model

    with progress_bar() as progress:
        if stack:
            assert model is not None
            progress(0, 0, "stacking")
            written = library.stack(agents, out, model, to=_format(to), force=force)
            for name, adapter in written.items():
                ranks = ", ".join(f"{target} {adapter.rank(target)}" for target in adapter.targets)
                print(f"{out / name}: ranks {ranks}; A-group {(adapter.a_group_hash or 'none')[:12]}")
        elif library.is_adapter(source[0]):
            if model is None:
                raise typer.BadParameter("converting an adapter needs the model it belongs to", param_hint="--model")
            progress(0, 0, "converting the adapter")
            library.convert_adapter(source[0], out, model, to=_format(to), force=force)
            print(out)
        else:
            find_model(source[0])  # what is no model, and a folder that is not there, have errors of their own
            if to != "orbax":
                raise typer.BadParameter(
                    "only adapters become PEFT; models become Orbax checkpoints", param_hint="--to"
                )
            progress(0, 0, "reading the model")
            library.convert_model(
                source[0], out, dtype=dtype, force=force, progress=labelled(progress, "reading, then writing the model")
            )
            print(out)


def _format(name: str):
    """The literal that the library's annotations ask for."""
    return "peft" if name == "peft" else "orbax"
