"""Converts a model to an Orbax checkpoint, and adapters with it, stacked into one A-group.

    python scripts/convert.py MODEL OUT [plan=FOLDER action=FOLDER reflect=FOLDER]

writes OUT/model and OUT/adapters/plan, …: what `Engine.from_pretrained` reads fastest, and what `base_lr` shares most.
`lragent convert` does each part on its own.
"""

import argparse
from pathlib import Path

from lragent_jax.convert import convert_model, stack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("adapters", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()

    convert_model(arguments.model, arguments.out / "model", dtype=arguments.dtype)
    print(arguments.out / "model")
    if arguments.adapters:
        adapters = dict(pair.split("=", 1) for pair in arguments.adapters)
        for name in stack(adapters, arguments.out / "adapters", arguments.model):
            print(arguments.out / "adapters" / name)


if __name__ == "__main__":
    main()
