"""How soon a fresh process answers: an engine of random weights, warmed up, and one request; phase by phase.

A program of its own, that starts as a user's does: `python -m lragent_jax.measure.ready`. Options of the engine are
the default ones but for the size of its pools. The last line of standard output is one line of JSON: seconds by phase,
`ready_s` from the start of the process to the end of warm-up, the programs that warm-up built, how many of those were
found traced on disk, and of all programs of the process, helpers included, how many were compiled and how many fetched.
"""

import argparse
import collections
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import jax
from jax import monitoring

from lragent_jax import compilation_cache, exported_programs
from lragent_jax.measure.bench_model import BenchModel
from lragent_jax.measure.bench_results import Results
from lragent_jax.measure.bench_setting import say
from lragent_jax.measure.trace_run import exactly, random_ids
from lragent_jax.models.config import LlamaConfig

PHASES = ("import_s", "device_s", "weights_s", "engine_s", "lower_s", "compile_s", "run_s", "request_s")
"""`compile_s`: from when the last program was lowered; most have been compiled, or read from the cache, by then."""

PAGES = 256


def measure_ready(arguments: Sequence[str]) -> Results:
    """Figures of a process whose cache of compiled programs is empty ("cold"), and of the next one ("warm").

    `arguments`: of this program, but for the cache folder. The device has to be free: ask before JAX takes it.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm"):
            command = [sys.executable, "-m", "lragent_jax.measure.ready", *arguments, "--cache", folder]
            # The folder is the child's to choose, and it keeps every program.
            environment = {key: value for key, value in os.environ.items() if key not in _CACHE_VARIABLES}
            done = subprocess.run(
                [*command, "--started", repr(time.time())], stdout=subprocess.PIPE, text=True, check=True,
                env=environment,
            )  # fmt: skip
            found[name] = json.loads(done.stdout.splitlines()[-1])
            say(f"{name}: ready in {found[name]['ready_s']:.1f} s, {found[name]['num_programs']} programs")
    return found


_CACHE_VARIABLES = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


def main() -> None:
    now = time.time()  # behind the imports
    arguments = parse_arguments()
    started = arguments.started or now
    phases = {"import_s": now - started}

    def ends(phase: str) -> None:
        phases[phase] = time.time() - started - sum(phases.values())

    events: collections.Counter[str] = collections.Counter()
    monitoring.register_event_listener(lambda event, **about: events.update([event]))
    compilation_cache.enable(arguments.cache)
    jax.block_until_ready(jax.numpy.zeros(()))
    ends("device_s")
    config = LlamaConfig.preset(arguments.preset)
    if arguments.layers is not None:
        config = dataclasses.replace(config, num_layers=arguments.layers)
    model = BenchModel(config, arguments.dtype, arguments.rank)
    jax.block_until_ready(model.params)
    ends("weights_s")
    engine = model.engine(
        arguments.mode, config.context_length, num_pages=arguments.pages, prefill_buckets=arguments.prefill_buckets
    )
    ends("engine_s")
    warmup = engine.warmup(arguments.max_batch_size, scoring=arguments.scoring)
    ready = time.time() - started
    phases |= {"lower_s": warmup.lower_s, "compile_s": warmup.compile_s, "run_s": warmup.run_s}
    output = engine.generate(random_ids(engine, 100), model.agents[0], exactly(8))
    exported = exported_programs.kept()
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "cores": os.cpu_count()}
    sizes = {
        "mode": arguments.mode, "max_batch_size": arguments.max_batch_size, "num_programs": warmup.num_programs,
        "num_exported": exported.num_read if exported else 0,
        "num_compiled": events["/jax/compilation_cache/cache_misses"],
        "num_fetched": events["/jax/compilation_cache/cache_hits"],
    }  # fmt: skip
    seconds = phases | {"request_s": output.latency_s, "ready_s": ready}
    print(json.dumps(about | sizes | {name: round(value, 3) for name, value in seconds.items()}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", default="llama-3.1-8b")
    add("--layers", type=int, help="all of the preset's by default")
    add("--rank", type=int, default=8)
    add("--dtype", default="bfloat16")
    add("--mode", default="base_lr", help="how agents share the cache")
    add("--pages", type=int, default=PAGES)
    add("--max-batch-size", type=int, default=1, help="rows of the largest batch to warm up for")
    add("--prefill-buckets", type=lambda text: [int(n) for n in text.split(",")], help="chunk lengths; default ones")
    add("--no-scoring", dest="scoring", action="store_false", help="leave out what only scoring takes")
    add("--cache", help="folder of compiled programs, the user's by default")
    add("--started", type=float, help="when the process was started, in seconds since 1970")
    return parser.parse_args()


if __name__ == "__main__":
    main()
