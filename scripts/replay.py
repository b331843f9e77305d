"""Replays recorded ReAct trajectories under every sharing mode and prints one line of JSON.

    python scripts/replay.py FILE --model MODEL --adapter plan=FOLDER --adapter action=FOLDER --adapter reflect=FOLDER

Regime: teacher-forced, batch 1, each recorded output under the agent that produced it; no time includes a
compilation. The figures are those of `lragent_jax.replay_report.ModeReport`. `lragent replay` adds the table.
"""

import argparse

from lragent_jax import Engine
from lragent_jax.react import read_trajectories
from lragent_jax.replay import replay
from lragent_jax.sharing import SHARING_MODES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--modes", default=",".join(SHARING_MODES))
    parser.add_argument("--limit", type=int)
    parser.add_argument("--dtype", help="bfloat16; float32 on a CPU")
    arguments = parser.parse_args()

    trajectories = read_trajectories(arguments.file)[: arguments.limit]
    adapters = dict(pair.split("=", 1) for pair in arguments.adapter)
    # `replay` gives every mode caches of its own; those of this engine stay empty.
    engine = Engine.from_pretrained(arguments.model, adapters, dtype=arguments.dtype, num_pages=1)
    print(replay(engine, trajectories, arguments.modes.split(",")).to_json())


if __name__ == "__main__":
    main()
