"""Measures which layers agents must run for themselves in mode `droidspeak`, and prints one line of JSON.

    python scripts/critical_layers.py FILE --model MODEL --adapter plan=FOLDER --adapter action=FOLDER …

FILE holds recorded trajectories as `lragent replay` takes them; choose others than those that modes are compared on.
`recompute_layers` is what `EngineOptions` and `lragent replay --recompute-layers` take; `kl_by_layer` is the mean KL
from `none` in nats if that layer alone is shared. Longer trajectories are cut to --max-tokens: device memory grows
with layers times tokens times agents.
"""

import argparse
import json

from lragent_jax import compilation_cache
from lragent_jax.cli.console import labelled, progress_bar
from lragent_jax.models.adapter_checkpoint import read_adapter
from lragent_jax.models.errors import InputError
from lragent_jax.models.folder import read_config, read_model
from lragent_jax.options import engine_dtype
from lragent_jax.react import read_trajectories
from lragent_jax.recording import Recording
from lragent_jax.sensitivity import layer_drift, most_drifting
from lragent_jax.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--share", type=float, default=1 / 3, help="of all layers")
    parser.add_argument("--limit", type=int, default=8, help="trajectories")
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--dtype", help="bfloat16; float32 on a CPU")
    arguments = parser.parse_args()

    trajectories = read_trajectories(arguments.file)[: arguments.limit]
    config, tokenizer = read_config(arguments.model), load_tokenizer(arguments.model)
    if tokenizer is None:
        raise InputError(f"{arguments.model} came without a tokenizer, and trajectories are text")
    folders = dict(pair.split("=", 1) for pair in arguments.adapter)
    adapters = {name: read_adapter(folder, config) for name, folder in folders.items()}
    max_tokens = min(arguments.max_tokens, config.context_length)
    recordings = [Recording.tokenize(trajectory, tokenizer).cut(max_tokens) for trajectory in trajectories]
    compilation_cache.enable()
    with progress_bar() as progress:
        config, graphdef, params = read_model(
            arguments.model, engine_dtype(arguments.dtype), progress=labelled(progress, "reading the model")
        )
        drift = layer_drift(config, graphdef, params, adapters, recordings, progress=progress)
    layers = list(most_drifting(drift, arguments.share))
    print(json.dumps({"recompute_layers": layers, "kl_by_layer": [float(kl) for kl in drift]}))


if __name__ == "__main__":
    main()
