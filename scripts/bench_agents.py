"""Several agents over one Llama: what sharing saves, beside floors, other modes, and what a user would run instead.

Regimes, one or several to a run; random weights and adapters (r = 8 on q and v) of a well-known shape, bfloat16:

* `--trace C`: LRAgent's ReAct trace (arXiv 2602.01053, Table 12), 912 + 4 C tokens, 17 calls, batch 1, greedy, logits
  of the last position only; every mode over the same weights, every run from a cold cache, medians over `--repeats`.
  Modes whose caches fit side by side take turns.
  Under `base_lr` one trajectory by itself, too: decode steps on short and long contexts, from blocks of `--steps`
  tokens without a look of the host, and prefills of 4,096 and 8,192 tokens. A mode that does not fit prints the
  bytes that it would need, and is left out.
* `--batch N`: N trajectories under `base_lr` with a common beginning, decoded together.
* `--memory`: cache bytes by number of agents, and trajectories that can be open, from the engine's own page accounting
  over one layer of the model's heads; a CPU will do.
* `--peers`: transformers + PEFT in a process of its own, before JAX takes the device's memory.
* `--ready`: how soon a fresh process answers a request, default options but for small pools; twice, with no compiled
  programs on disk and with those of the first time.

`--profile` adds when the device idles in a decode block. Floors are bytes over the copy bandwidth and FLOP over the
bf16 matmul rate, both measured here. Runs in which anything was compiled do not count; JAX's compilation cache is on.
`--out` merges the results into a file, `--plot` draws from that file alone. The last line of standard output is one
line of JSON.

    python scripts/bench_agents.py --trace 8192 --peers --profile --out docs/agents.json --plot docs
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from lragent_jax import compilation_cache
from lragent_jax.figures import can_plot
from lragent_jax.measure import bench_plots, bench_results
from lragent_jax.measure.batch_bench import measure_batch
from lragent_jax.measure.bench_model import BenchModel
from lragent_jax.measure.bench_results import Results
from lragent_jax.measure.bench_setting import BenchSetting, say
from lragent_jax.measure.memory_bench import measure_memory
from lragent_jax.measure.page_budget import device_bytes
from lragent_jax.measure.ready import PHASES, measure_ready
from lragent_jax.measure.targets import MAX, targets
from lragent_jax.measure.timing import measure_device
from lragent_jax.measure.trace_bench import PEER_CONTEXT, PEER_PREFILLS, measure_trace
from lragent_jax.models.config import LlamaConfig
from lragent_jax.sharing import SHARING_MODES, SharingMode


def set_memory_fraction(fraction: float) -> None:
    """What JAX takes of the device's memory, read when it first looks at the device; the user's own choice stays."""
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name of the same
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(fraction))


def run_peers(arguments: argparse.Namespace) -> Results:
    lengths = ",".join(map(str, PEER_PREFILLS)) if arguments.peer_prefill is None else arguments.peer_prefill
    command = [
        arguments.peer_python, "-m", "lragent_jax.measure.torch_peer", "--preset", arguments.preset,
        "--rank", str(arguments.rank), "--dtype", arguments.dtype, "--prefill", lengths,
        "--context", str(arguments.peer_context), *(["--no-compile"] if arguments.no_compile_peer else []),
    ]  # fmt: skip
    say("transformers + PEFT, in a process of their own …")
    # Relative to this script, so that an interpreter without this package can be given.
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    figures = json.loads(done.stdout.splitlines()[-1])
    say(f"transformers + PEFT: {figures}")
    return figures


def make_setting(arguments: argparse.Namespace) -> BenchSetting:
    """The device is looked at here for the first time."""
    config = LlamaConfig.preset(arguments.preset)
    if arguments.layers is not None:
        config = dataclasses.replace(config, num_layers=arguments.layers)
    speed = measure_device()
    say(f"{jax.devices()[0].device_kind}: {speed.bytes_per_s / 1e9:.0f} GB/s, {speed.flop_per_s / 1e9:.0f} GFLOP/s")
    return BenchSetting(
        config=config, rank=arguments.rank, dtype=arguments.dtype, itemsize=jax.numpy.dtype(arguments.dtype).itemsize,
        page_size=arguments.page_size, repeats=arguments.repeats, steps=arguments.steps, speed=speed,
        device_bytes=device_bytes(), profile=arguments.profile, implementation=arguments.implementation,
    )  # fmt: skip


def run_regimes(arguments: argparse.Namespace, keep: Callable[[Results], None]) -> None:
    """Hands `keep` what was found, regime by regime, of a trace modes by modes: a run that is cut off loses little."""
    if arguments.peers:
        keep({"peers": run_peers(arguments)})
    if arguments.ready:
        say("an engine from the start of its process on, twice …")
        layers = [] if arguments.layers is None else ["--layers", str(arguments.layers)]
        shapes = ["--preset", arguments.preset, "--rank", str(arguments.rank), "--dtype", arguments.dtype, *layers]
        keep({"ready": {"preset": arguments.preset, "dtype": arguments.dtype} | measure_ready(shapes)})
    if not (arguments.trace or arguments.batch or arguments.memory):
        return
    setting = make_setting(arguments)
    about: dict[str, Any] = {
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, "preset": arguments.preset,
        "dtype": arguments.dtype, "rank": arguments.rank, "page_size": arguments.page_size,
        "repeats": arguments.repeats, **setting.speed._asdict(),
    }  # fmt: skip
    if arguments.memory:
        keep({"memory": about | measure_memory(setting, arguments.agents)})
    if arguments.trace or arguments.batch:
        model = BenchModel(setting.config, setting.dtype, setting.rank)
        for chunk in arguments.trace:
            found = measure_trace(
                model, setting, chunk, arguments.modes, arguments.prefill_buckets, not arguments.no_solo,
                beside=arguments.trace,
            )  # fmt: skip
            for result in found:
                keep(_profile_apart(result) | {"trace": {str(chunk): about | result}})
        if arguments.batch:
            result = measure_batch(model, setting, arguments.batch, arguments.prefix, arguments.context)
            keep(_profile_apart(result) | {"batch": about | result})


def _profile_apart(result: Results) -> Results:
    """Takes the profiles out of a regime's results: they are kept side by side."""
    return {"profile": profiles} if (profiles := result.pop("profile", {})) else {}


def trace_table(trace: Results) -> Table:
    table = Table(title=f"{trace['preset']}, {trace['total_tokens']:,} tokens, {trace['device']}")
    columns = ("prefilled", "cache MB", "TTFT s", "floor", "decode ms", "floor", "tokens/s", "compiling s")
    for column in ("mode", *columns):
        table.add_column(column, justify="right")
    for mode, r in trace["modes"].items():
        if "bytes_needed" in r:
            table.add_row(mode, f"needs {r['bytes_needed'] / 1e9:.1f} GB", f"has {r['bytes_limit'] / 1e9:.1f} GB")
            continue
        floors = [f"{r[name]:.{digits}f}" if name in r else "" for name, digits in
                  (("ttft_floor_s", 3), ("decode_floor_ms", 2))]  # fmt: skip
        table.add_row(
            mode, f"{r['prefilled_tokens']:,.0f}", f"{r['cache_bytes'] / 1e6:.1f}", f"{r['ttft_s']:.3f}", floors[0],
            f"{r['decode_ms_per_token']:.2f}", floors[1], f"{r['tokens_per_s']:.0f}", f"{r['compile_s']:.0f}",
        )  # fmt: skip
    return table


def step_table(steps: Results) -> Table:
    """Decode steps by name: what they are steps of, in how many ms."""
    table = Table(title="decode steps, without a look of the host")
    for column in ("of", "rows", "mean context", "ms", "floor", "x floor"):
        table.add_column(column, justify="right")
    for name, step in steps.items():
        table.add_row(
            name, str(step["rows"]), f"{step['context']:,.0f}", f"{step['ms']:.3f}", f"{step['floor_ms']:.3f}",
            f"{step['ms'] / step['floor_ms']:.3f}",
        )  # fmt: skip
    return table


def memory_table(memory: Results) -> Table:
    counts = list(memory["cache_bytes"]["none"])
    table = Table(title=f"cache bytes of one layer, {memory['tokens']:,} tokens, by number of agents")
    for column in ("mode", *counts):
        table.add_column(column, justify="right")
    for mode, by_agents in memory["cache_bytes"].items():
        table.add_row(mode, *(f"{by_agents[count]:,}" for count in counts))
    return table


def ready_table(ready: Results) -> Table:
    warm = ready["warm"]
    table = Table(title=f"{ready['preset']}, {warm['num_programs']} programs, {warm['device']}, {warm['cores']} cores")
    for column in ("compiled programs", *(phase.removesuffix("_s") for phase in PHASES), "ready s"):
        table.add_column(column, justify="right")
    for name in ("cold", "warm"):
        table.add_row(name, *(f"{ready[name][phase]:.1f}" for phase in (*PHASES, "ready_s")))
    return table


def target_table(results: Results) -> Table:
    table = Table(title="asked and reached")
    for column in ("what", "asked", "reached", ""):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in targets(results):
        sign = "≤" if row.bound == MAX else "≥"
        table.add_row(row.what, f"{sign} {row.asked:.4g}", f"{row.reached:.4g}", "" if row.met else "missed")
    return table


def show(found: Results, together: Results) -> None:
    console = Console(width=120)
    for trace in found.get("trace", {}).values():
        console.print(trace_table(trace))
        if "decode_steps" in trace:
            console.print(step_table(trace["decode_steps"]))
    if "ms" in found.get("batch", {}):
        console.print(step_table({"the batch": found["batch"]}))
    if "memory" in found:
        console.print(memory_table(found["memory"]))
    if "ready" in found:
        console.print(ready_table(found["ready"]))
    console.print(target_table(together))


def chosen_modes(text: str) -> list[SharingMode]:
    """In the order of `SHARING_MODES`, so that those that share programs follow each other."""
    names = text.split(",")
    if unknown := sorted(set(names) - set(SHARING_MODES)):
        raise argparse.ArgumentTypeError(f"no mode is called {unknown[0]}; there are: {', '.join(SHARING_MODES)}")
    return [mode for mode in SHARING_MODES if mode in names]


def integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--trace", type=integers, default=[], metavar="C", help="tokens read per turn, comma-separated for several")
    add("--batch", type=int, default=0, metavar="N", help="trajectories that are decoded together, 64 say")
    add("--memory", action="store_true", help="cache bytes by agents, and how many trajectories fit")
    add("--peers", action="store_true", help="transformers + PEFT on the same shapes")
    add("--ready", action="store_true", help="how soon a fresh process answers, cold and warm")
    add("--profile", action="store_true", help="when the device idles in a decode block")
    add("--out", type=Path, help="JSON file to merge the results into")
    add("--plot", type=Path, metavar="FOLDER", help="draw agents-*.png from what --out holds; needs matplotlib")
    add("--preset", default="llama-3.1-8b")
    add("--layers", type=int, help="all of the preset's by default")
    add("--rank", type=int, default=8)
    add("--dtype", default="bfloat16")
    add("--page-size", type=int, default=64)
    add("--modes", type=chosen_modes, default="none,full,base,base_lr,pre_lr", help="of the trace, comma-separated")
    add("--repeats", type=int, default=3)
    add("--steps", type=int, default=64, help="of a decode block")
    add("--prefill-buckets", type=integers, help="chunk lengths; by default some that suit the trace")
    add("--no-solo", action="store_true", help="leave out one trajectory by itself")
    add("--implementation", help="of attention; the first that fits by default")
    add("--prefix", type=int, default=2048, help="common tokens of the batch")
    add("--context", type=int, default=4096, help="tokens of each context of the batch")
    add("--agents", type=integers, default="1,2,3,4,8,16", help="how many agents --memory counts the bytes of")
    add("--peer-python", default=sys.executable, help="an interpreter that has torch, transformers and peft")
    add("--peer-prefill", help=f"lengths for the peers, {','.join(map(str, PEER_PREFILLS))} by default")
    add("--peer-context", type=int, default=PEER_CONTEXT, help="tokens on which the peers decode")
    add("--no-compile-peer", action="store_true", help="leave out the peer with torch.compile")
    add("--memory-fraction", type=float, default=0.95, help="of the device's memory, for JAX")
    add("--no-compilation-cache", action="store_true", help="compile everything anew")
    arguments = parser.parse_args()
    if arguments.plot and not arguments.out:
        parser.error("--plot draws what --out holds: name the file")
    if arguments.plot and not can_plot():
        parser.error("--plot needs matplotlib, which is not installed")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    set_memory_fraction(arguments.memory_fraction)
    if not arguments.no_compilation_cache:
        compilation_cache.enable()
    found: Results = {}
    together: Results = bench_results.read(arguments.out) if arguments.out else {}

    def keep(some: Results) -> None:
        nonlocal found, together
        found, together = (bench_results.merged(results, some) for results in (found, together))
        if arguments.out:
            bench_results.write(arguments.out, together)

    run_regimes(arguments, keep)
    show(found, together)
    if arguments.plot:
        for path in bench_plots.write_plots(together, arguments.plot):
            say(f"wrote {path}")
    print(json.dumps(found | {"targets": [row.as_json() for row in targets(together)]}))


if __name__ == "__main__":
    main()
