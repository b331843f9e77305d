"""`lragent replay`: recorded trajectories through agents and sharing modes."""

from pathlib import Path
from typing import Annotated

import typer

from lragent_jax.cli import options
from lragent_jax.cli.console import labelled, progress_bar
from lragent_jax.sharing import SHARING_MODES


def replay(
    file: Annotated[
        Path | None,
        typer.Argument(help="Recorded trajectories in JSON; without it those of the package.", show_default=False),
    ] = None,
    model: options.EmbeddedModel = None,
    adapter: options.Adapters = [],  # noqa: B006  (read only)
    modes: Annotated[str, typer.Option(help="Sharing modes, separated by commas.")] = ",".join(SHARING_MODES),
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first trajectories of the file.", show_default=False)
    ] = None,
    role: Annotated[
        list[str],
        typer.Option(
            metavar="ROLE=AGENT",
            help="Who has the role plan, action or reflect; repeatable. An empty agent is the base model.",
        ),
    ] = [],  # noqa: B006
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Cut longer trajectories behind an output.", show_default=False)
    ] = None,
    recompute_layers: options.RecomputeLayers = None,
    dtype: options.Dtype = None,
    num_pages: options.NumPages = None,
    page_size: options.PageSize = None,
    tensor_parallel: options.TensorParallel = 1,
    json: options.Json = False,
) -> None:
    """Replay recorded trajectories under every sharing mode, and compare what it costs and changes."""
    given = options.name_path_pairs(adapter, "--adapter")
    sharing_modes, roles = options.sharing_modes(modes), options.role_agents(role)
    layers = options.recompute_layers(recompute_layers, sharing_modes)
    from lragent_jax import compilation_cache
    from lragent_jax.cli.replay_table import print_report
    from lragent_jax.embedded import example_trajectories
    from lragent_jax.engine import Engine
    from lragent_jax.react import read_trajectories
    from lragent_jax.replay import replay as run

    path, adapters = options.model_and_adapters(model, given)
    trajectories = (example_trajectories() if file is None else read_trajectories(file))[:limit]
    compilation_cache.enable()
    with progress_bar() as progress:
        progress(0, 0, "reading the model")
        engine = Engine.from_pretrained(
            path, adapters, dtype=dtype, sharing="full", num_pages=1, page_size=page_size, recompute_layers=layers,
            tensor_parallel=tensor_parallel, progress=labelled(progress, "reading the model"),
        )  # fmt: skip
        report = run(
            engine, trajectories, sharing_modes,
            roles=roles, max_tokens=max_tokens, num_pages=num_pages, progress=progress,
        )  # fmt: skip
    if not json:
        print_report(report)
    print(report.to_json())
