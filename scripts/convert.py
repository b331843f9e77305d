"""Converts a model to an Orbax checkpoint, and adapters with it, stacked into one A-group.

    python scripts/convert.py MODEL OUT [plan=FOLDER action=FOLDER reflect=FOLDER]

writes OUT/model and OUT/adapters/plan, …: what `Engine.from_pretrained` reads fastest, and what `base_lr` shares most.
Adapters are read and checked before the model, which takes longest. `lragent convert` does each part on its own.
"""

import argparse
import sys
from pathlib import Path

from lragent_jax.convert import convert_model, read_stacked, write_adapters
from lragent_jax.models.errors import LRAgentError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("adapters", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--force", action="store_true", help="replace what is there, if it is of the same kind")
    arguments = parser.parse_args()
    sources = _sources(parser, arguments.adapters)

    model, out, force = arguments.model, arguments.out / "adapters", arguments.force
    try:
        adapters = read_stacked(sources, out, model, force=force) if sources else {}
        convert_model(model, arguments.out / "model", dtype=arguments.dtype, force=force)
        print(arguments.out / "model")
        write_adapters(adapters, out, model, force=force)
    except LRAgentError as error:
        sys.exit(f"error: {error}")
    for name in adapters:
        print(out / name)


def _sources(parser: argparse.ArgumentParser, pairs: list[str]) -> dict[str, str]:
    sources: dict[str, str] = {}
    for pair in pairs:
        name, _, folder = pair.partition("=")
        if not (name and folder):
            parser.error(f"{pair!r} is not of the form NAME=FOLDER")
        if name in sources:
            parser.error(f"{name!r} is given twice")
        sources[name] = folder
    return sources


if __name__ == "__main__":
    main()
