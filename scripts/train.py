"""Trains plan, action and reflect for one base model, in one of the kinds that the study compares.

    python scripts/train.py MODEL DATA OUT [--validation DATA] [--init OUT] [--kind shared_a] [--targets q,v] [--rank 8]

DATA holds plan.jsonl, action.jsonl and reflect.jsonl, and for --kind joint trajectories.jsonl, as `lragent world`
writes them; --init goes on from the adapters of another OUT. Further options are the fields of `TrainingOptions`.
`lragent train` takes agents of any names.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from lragent_jax import compilation_cache
from lragent_jax.cli.console import progress_bar
from lragent_jax.cli.train import now_and_then
from lragent_jax.react import ROLES
from lragent_jax.training.joint_trainer import train_jointly
from lragent_jax.training.options import TrainingOptions
from lragent_jax.training.trainer import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--validation", type=Path)
    parser.add_argument("--init", type=Path)
    for field in dataclasses.fields(TrainingOptions):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=_number_or_text)
    arguments = vars(parser.parse_args())

    model, data, out, validation, init = (
        arguments.pop(name) for name in ("model", "data", "out", "validation", "init")
    )
    settings = {name: value for name, value in arguments.items() if value is not None}
    if "targets" in settings:
        settings["targets"] = tuple(settings["targets"].split(","))
    options = TrainingOptions(**settings)
    compilation_cache.enable()
    with progress_bar() as progress:
        beside: dict[str, Any] = {"options": options, "init": init, "progress": now_and_then(progress)}
        if options.kind == "joint":
            held_out = validation and validation / "trajectories.jsonl"
            results = train_jointly(model, data / "trajectories.jsonl", out, validation=held_out, **beside)
        else:
            files, held_out = (
                {role: folder / f"{role}.jsonl" for role in ROLES} if folder else {} for folder in (data, validation)
            )
            results = train(model, files, out, validation=held_out, **beside)
    print(json.dumps(results))


def _number_or_text(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


if __name__ == "__main__":
    main()
