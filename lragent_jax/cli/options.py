"""Options that several commands take."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from lragent_jax.sharing import SHARING_MODES, SharingMode

Model = Annotated[
    Path, typer.Option(help="A Hugging Face folder, a GGUF file, or an Orbax checkpoint of ours.", show_default=False)
]
OptionalModel = Annotated[
    Path | None, typer.Option("--model", help="The model that the adapters belong to.", show_default=False)
]
EmbeddedModel = Annotated[
    Path | None,
    typer.Option(
        "--model",
        help="A Hugging Face folder, a GGUF file, or an Orbax checkpoint of ours; without it the embedded model and, "
        "unless --adapter names others, its trained agents plan, action and reflect.",
        show_default=False,
    ),
]
Adapters = Annotated[
    list[str],
    typer.Option("--adapter", metavar="NAME=FOLDER", help="An agent and its PEFT or Orbax folder; repeatable."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Of weights and caches: bfloat16, float16 or float32; by default float32 on a CPU, bfloat16 elsewhere.",
        show_default=False,
    ),
]
NumPages = Annotated[
    int | None, typer.Option(help="Pages of the base cache; by default as many as the run needs.", show_default=False)
]
PageSize = Annotated[int | None, typer.Option(help="Tokens per page (default 64, on TPU 128).", show_default=False)]
TensorParallel = Annotated[
    int, typer.Option("--tensor-parallel", min=1, metavar="N", help="Cut weights and kv heads for so many devices.")
]
RecomputeLayers = Annotated[
    str | None,
    typer.Option(
        metavar="LAYER,LAYER,…",
        help="The layers that every agent runs for itself in mode droidspeak (default: the first third).",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON and nothing else.")]


def name_path_pairs(pairs: Sequence[str], option: str) -> dict[str, Path]:
    """`NAME=FOLDER` arguments by name; a usage error for anything else, or a name that comes twice."""
    return {name: Path(value) for name, value in _pairs(pairs, option, "NAME=FOLDER", empty_allowed=False).items()}


def role_agents(pairs: Sequence[str]) -> dict[str, str | None]:
    """`ROLE=AGENT` arguments by role; an empty agent is the base model."""
    return {role: agent or None for role, agent in _pairs(pairs, "--role", "ROLE=AGENT", empty_allowed=True).items()}


def model_and_adapters(model: Path | None, adapters: Mapping[str, Path]) -> tuple[Path, dict[str, Path]]:
    """What `EmbeddedModel` and `Adapters` came to. Agents of the embedded model belong to no other."""
    if model is not None:
        return model, dict(adapters)
    from lragent_jax.embedded import adapter_folders, find_model

    return find_model(), dict(adapters or adapter_folders())


def sharing_modes(text: str) -> list[SharingMode]:
    """Comma-separated modes, each once; a usage error for an unknown one."""
    return list(dict.fromkeys(sharing_mode(name.strip(), "--modes") for name in text.split(",")))


def sharing_mode(name: str, option: str = "--sharing") -> SharingMode:
    for mode in SHARING_MODES:
        if name == mode:
            return mode
    raise typer.BadParameter(f"unknown sharing mode {name!r}; there are: {', '.join(SHARING_MODES)}", param_hint=option)


def recompute_layers(text: str | None, modes: Sequence[SharingMode]) -> list[int] | None:
    """Comma-separated layers; a usage error for anything else, or where they would change nothing."""
    option = "--recompute-layers"
    if text is None:
        return None
    if "droidspeak" not in modes:
        raise typer.BadParameter("only mode droidspeak runs layers again; choose it, too", param_hint=option)
    return integers(text, option)


def integers(text: str, option: str) -> list[int]:
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of numbers with commas between", param_hint=option) from None


def _pairs(pairs: Sequence[str], option: str, form: str, empty_allowed: bool) -> dict[str, str]:
    parsed: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals or not (value or empty_allowed):
            raise typer.BadParameter(f"{pair!r} is not of the form {form}", param_hint=option)
        if name in parsed:
            raise typer.BadParameter(f"{name!r} is given twice", param_hint=option)
        parsed[name] = value
    return parsed
