"""`lragent train`: LoRA agents for one base model, from JSON lines."""

import contextlib
import json as json_module
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lragent_jax.cli import options
from lragent_jax.cli.console import Progress, progress_bar, stderr

_AXES = ("data", "model")


def train(
    model: Annotated[
        Path, typer.Argument(help="A Hugging Face folder, a GGUF file, or an Orbax checkpoint.", show_default=False)
    ],
    agent: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=FILE",
            help='An agent and its JSON lines {"input": …, "output": …}; repeatable.',
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help="The folder to write; the same command again goes on with it.", show_default=False),
    ],
    validation: Annotated[
        list[str], typer.Option(metavar="NAME=FILE", help="An agent's examples that are not trained on; repeatable.")
    ] = [],  # noqa: B006  (read only)
    init: Annotated[
        Path | None,
        typer.Option(
            help="A folder with a PEFT folder per agent to start from, such as the OUT of another training.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        str, typer.Option(help="apart, or shared_a: all agents get the first one's A of v (and k), one A-group.")
    ] = "apart",
    rank: Annotated[int, typer.Option(help="Of the adapters.")] = 8,
    alpha: Annotated[float, typer.Option(help="Adapters count alpha / rank.")] = 16.0,
    targets: Annotated[str, typer.Option(help="Projections to adapt: q,k,v,o,gate,up,down, or all.")] = "q,v",
    steps: Annotated[int | None, typer.Option(help="How long, in steps.", show_default=False)] = None,
    epochs: Annotated[
        int | None, typer.Option(help="How long, in passes over the examples (3).", show_default=False)
    ] = None,
    learning_rate: Annotated[
        float,
        typer.Option(
            help="The highest. In as many steps 2e-3 took the embedded agents (r = 8 on q and v of a model of 135 M) "
            "further than 5e-4; a large model may want less."
        ),
    ] = 2e-3,
    warmup: Annotated[
        int | None, typer.Option(help="Steps until it is reached (a twentieth of all).", show_default=False)
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are clipped to this norm.")] = 1.0,
    tokens_per_step: Annotated[int, typer.Option(help="Slots of a batch, padding included.")] = 32_768,
    sequence_length: Annotated[
        int, typer.Option(help="Slots of a row; longer sequences get rows of twice, four times … as many.")
    ] = 2048,
    seed: Annotated[int, typer.Option(help="Of initial weights and the order of the examples.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of the base model; what is trained is float32.")] = "bfloat16",
    validate_every: Annotated[
        int | None, typer.Option(help="Steps between validations (a tenth of all).", show_default=False)
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between states on disk.")] = 200,
    attention: Annotated[
        str | None, typer.Option(help="cudnn or xla; by default cudnn where it runs.", show_default=False)
    ] = None,
    remat: Annotated[
        str | None,
        typer.Option(
            help="What the backward pass runs again: blocks (least memory) or dots (faster); by default what fits.",
            show_default=False,
        ),
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="data=N,model=M", help="How to use several devices; by default all for data.", show_default=False
        ),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The base's name in the PEFT folders; by default MODEL.", show_default=False)
    ] = None,
    json: options.Json = False,
) -> None:
    """Train LoRA agents: OUT/NAME is a PEFT folder with its losses, OUT/NAME.orbax the same for this package."""
    agents = options.name_path_pairs(agent, "--agent")
    held_out = options.name_path_pairs(validation, "--validation")
    from lragent_jax import compilation_cache
    from lragent_jax.models.adapter_bank import TARGETS
    from lragent_jax.training.options import TrainingOptions
    from lragent_jax.training.trainer import train as run

    names = TARGETS if targets == "all" else tuple(name.strip() for name in targets.split(","))
    settings: dict[str, Any] = {
        "kind": kind, "rank": rank, "alpha": alpha, "targets": names, "steps": steps, "epochs": epochs,
        "learning_rate": learning_rate, "warmup": warmup, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm,
        "tokens_per_step": tokens_per_step, "sequence_length": sequence_length, "seed": seed, "dtype": dtype,
        "validate_every": validate_every, "checkpoint_every": checkpoint_every, "attention": attention, "remat": remat,
    }  # fmt: skip
    checked = TrainingOptions(**settings)
    compilation_cache.enable()
    with _devices(mesh), progress_bar() as progress:
        results = run(
            model, agents, out,
            validation=held_out, options=checked, init=init, base_model=base_model, progress=now_and_then(progress),
        )  # fmt: skip
    if not json:
        _print(results, out)
    print(json_module.dumps({"out": str(out), "agents": results}))


@contextlib.contextmanager
def _devices(text: str | None) -> Iterator[None]:
    """The mesh that was asked for, or one of all devices; none where there is one device."""
    import jax
    from jax.sharding import AxisType

    sizes = _mesh_sizes(text) if text is not None else {"data": len(jax.devices())}
    count = 1
    for size in sizes.values():
        count *= size
    if count > len(jax.devices()):
        raise typer.BadParameter(f"there are {len(jax.devices())} devices, not {count}", param_hint="--mesh")
    if count == 1:
        yield
        return
    used = {name: size for name, size in sizes.items() if size > 1}
    shape, names = tuple(used.values()), tuple(used)
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names), devices=jax.devices()[:count])
    with jax.set_mesh(mesh):
        yield


def _mesh_sizes(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in _AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise typer.BadParameter(f"{text!r} is not of the form data=N,model=M", param_hint="--mesh")
        sizes[name] = int(size)
    return sizes


def now_and_then(progress: Progress) -> Progress:
    """Losses change with every step: a terminal gets a few a second, a log file a line every few seconds."""
    pause = 0.1 if stderr().is_terminal else 5.0
    shown_at = -pause

    def show(done: int, total: int, what: str) -> None:
        nonlocal shown_at
        if not total or done == total or time.monotonic() - shown_at >= pause:
            progress(done, total, what)
            shown_at = time.monotonic()

    return show


def _print(results: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("agent", "steps", "tokens/s", "padding", "loss", "held out", "right", "A-group")
    for name, result in results.items():
        validation, right = result["validation_loss"], result["validation_accuracy"]
        table.add_row(
            name, str(result["steps"]), f"{result['tokens_per_second']:,}", f"{result['padding_share']:.1%}",
            f"{result['train_loss']:.4f}", "" if validation is None else f"{validation:.4f}",
            "" if right is None else f"{right:.1%}", (result["a_group"] or "none")[:8],
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"{out}/NAME for PEFT, {out}/NAME.orbax; losses in {out}/NAME/losses.jsonl", highlight=False)
