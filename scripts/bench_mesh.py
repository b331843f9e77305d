"""One model on one device and cut for several: the same tokens, a decode step's time, and the all-reduces' share of it.

Regime: random weights with the shapes of Llama-3.1-8B, bfloat16, adapters of rank 8 on q and v, sharing `base_lr`, one
trajectory, greedy decoding. A decode step is what lies between two tokens of a call of the engine, host included; the
median over `--repeats` calls. The engine over one device comes first and is gone before the next is made. An
all-reduce's time is that of its kernel on the device that came to it last: what the others take longer is waiting.
XLA's own kernels for small ones are named after what XLA fused, so the operation that a kernel belongs to counts, too.
A trace without any says nothing about their share, and neither does this script then.

Two comparisons of tokens: of a few layers in float32, generated ones, up to the first whose two best scores lie within
1e-3 of each other (from there on either may come); of the whole model in bfloat16, the best token behind every token of
one recorded output, apart from those whose two best scores lie closer than bfloat16 tells apart. And a drawn output of
several devices is compared with what their own scores and the same random numbers give. The last line of standard
output is one line of JSON.

    python scripts/bench_mesh.py --devices 2
"""

import argparse
import collections
import dataclasses
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from lragent_jax import generation
from lragent_jax.devices import Devices, choose_devices
from lragent_jax.engine import Engine
from lragent_jax.models.adapter import random_adapter
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import InputError
from lragent_jax.models.llama import random_params
from lragent_jax.sampling import sample, sampling_arrays
from lragent_jax.sampling_params import SamplingParams
from lragent_jax.trajectory import Trajectory

ASKED_RATIO = 0.70
MARGIN = {"float32": 1e-3, "bfloat16": 0.05}
"""Between the two best scores; closer ones may change places."""

AGENTS = ("plan", "action", "reflect")

NOT_SEEN = "not seen in the trace"


class Setting(NamedTuple):
    """What runs, and the lengths in tokens: of the contexts, of a prefill chunk, and of what is decoded."""

    config: LlamaConfig
    dtype: str
    rank: int
    contexts: tuple[int, ...]
    chunk: int
    decoded: int
    repeats: int
    page_size: int
    implementation: str | None

    @property
    def num_pages(self) -> int:
        """All contexts stay while their repeats extend them."""
        longest = sum(self.contexts) + len(self.contexts) * (self.repeats + 4) * self.decoded
        return -(-longest // self.page_size) + 2 * len(self.contexts)


def make_engine(setting: Setting, devices: int) -> Engine:
    config = setting.config
    shardings = Devices.of(devices).weight_shardings(config, setting.dtype)
    graphdef, params = random_params(config, jax.numpy.dtype(setting.dtype), shardings=shardings)
    adapters = {
        agent: random_adapter(config, rank=setting.rank, targets=("q", "v"), seed=i, shared_a_seed=0)
        for i, agent in enumerate(AGENTS)
    }
    return Engine(
        config, graphdef, params, adapters, sharing="base_lr", tensor_parallel=devices, page_size=setting.page_size,
        num_pages=setting.num_pages, prefill_buckets=(setting.chunk,), decode_block=setting.decoded,
        implementation=setting.implementation, prefix_cache=False,
    )  # fmt: skip


def open_context(engine: Engine, length: int) -> Trajectory:
    ids = np.random.default_rng(length).integers(0, engine.config.vocab_size, length)
    return engine.trajectory().append(ids.tolist())


def decode(engine: Engine, trajectory: Trajectory, count: int) -> tuple[list[int], float]:
    """(tokens that join, milliseconds per token after the first)"""
    out = engine.generate(trajectory, "plan", SamplingParams(max_new_tokens=count, ignore_eos=True))
    return out.token_ids, 1e3 * (out.latency_s - out.ttft_s) / (count - 1)


# Times.


class Kernel(NamedTuple):
    """One kernel or copy that the profiler saw on one device, and the operation it belongs to ("" if unknown)."""

    name: str
    start_ns: float
    duration_ns: float
    operation: str = ""


def is_all_reduce(kernel: Kernel) -> bool:
    """Whether it is one by its own name, as NCCL's kernels are, or by its operation's; what it copies is no kernel.

    XLA's own are fusions that bear the name of JAX's operation: psum.
    """
    if re.match("mem(cpy|set)", kernel.name, re.IGNORECASE):
        return False
    return re.search(r"all[-_]?reduce|\bpsum", f"{kernel.name} {kernel.operation}", re.IGNORECASE) is not None


def all_reduce_ms(devices: Iterable[list[Kernel]]) -> tuple[float, float, int]:
    """(ms of all-reduces without waiting, ms of their kernels on the mean device, how many) of the traced devices.

    Where the profiler lost some, all of the device that spent the least count in place of each one's least.
    """
    per_device = [
        [kernel.duration_ns for kernel in sorted(kernels, key=lambda kernel: kernel.start_ns)
         if is_all_reduce(kernel)]
        for kernels in devices
    ]  # fmt: skip
    if not per_device or not per_device[0]:
        return 0.0, 0.0, 0
    totals = [sum(durations) for durations in per_device]
    complete = len({len(durations) for durations in per_device}) == 1
    least = np.min(per_device, axis=0).sum() if complete else min(totals)
    return least * 1e-6, statistics.mean(totals) * 1e-6, len(per_device[0])


def traced(engine: Engine, trajectory: Trajectory, count: int) -> list[list[Kernel]]:
    """The kernels of every device while `count` tokens are decoded; none where the profiler sees no device."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            decode(engine, trajectory, count)
        [file] = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_serialized_xspace(file.read_bytes())
    planes = [plane for plane in data.planes if re.match(r"/device:[GT]PU:\d+", plane.name)]
    return [
        [Kernel(event.name, event.start_ns, event.duration_ns,
                next((str(value) for name, value in event.stats if name == "hlo_op"), ""))
         for line in plane.lines if line.name.startswith("Stream") for event in line.events]
        for plane in planes
    ]  # fmt: skip


def of_a_step(short: list[list[Kernel]], long: list[list[Kernel]], num_steps: int) -> dict[str, Any]:
    """What a decode step runs: two traces of calls of which the longer has `num_steps` steps more.

    The first token of a call is sampled behind its prefill, whose all-reduces are in both.
    """
    waiting, kernels, count = (
        (b - a) / num_steps for a, b in zip(all_reduce_ms(short), all_reduce_ms(long), strict=True)
    )
    seen = count > 0
    return {
        "all_reduce_ms": waiting if seen else None,
        "all_reduce_kernel_ms": kernels if seen else None,
        "all_reduces": round(count, 2) if seen else NOT_SEEN,
        "kernels": [(len(b) - len(a)) / num_steps for a, b in zip(short, long, strict=True)],
    }


def most_frequent(devices: list[list[Kernel]]) -> list[list[tuple[str, str, int]]]:
    """(kernel, operation, how often) of every device, the most frequent first: to look where nothing was found.

    Without the numbers by which a compiler tells those of one kind apart.
    """

    def kind(name: str) -> str:
        return re.sub(r"[._]?\d+\b|_\d+(?=_)", "", name)[:60]

    return [
        [(*names, count) for names, count
         in collections.Counter((kind(kernel.name), kind(kernel.operation)) for kernel in kernels).most_common(40)]
        for kernels in devices
    ]  # fmt: skip


def measure(engine: Engine, setting: Setting, trace: bool) -> dict[str, Any]:
    """Per context: milliseconds of a decode step, and of its all-reduces."""
    results = {}
    for length in setting.contexts:
        with open_context(engine, length) as trajectory:
            decode(engine, trajectory, setting.decoded)  # compiles
            steps = [decode(engine, trajectory, setting.decoded)[1] for _ in range(setting.repeats)]
            result: dict[str, Any] = {"step_ms": statistics.median(steps)}
            if trace:
                short, long = (traced(engine, trajectory, count) for count in (2, setting.decoded))
                result |= of_a_step(short, long, setting.decoded - 2)
                if result["all_reduces"] == NOT_SEEN:
                    print(f"no all-reduces in a step; kernels: {most_frequent(long)}", file=sys.stderr, flush=True)
            results[str(length)] = result
    return results


# Tokens.


def top_two(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(best token, how far it is ahead) of every row."""
    best = np.sort(np.partition(logits, -2, axis=-1)[:, -2:], axis=-1)
    return logits.argmax(axis=-1), best[:, 1] - best[:, 0]


def compare_generated(one: tuple[list[int], np.ndarray], several: tuple[list[int], np.ndarray]) -> dict[str, Any]:
    """Tokens of two runs and the scores behind the first run's: equal up to the first tie of the first run."""
    margins = top_two(one[1])[1]
    ties = np.flatnonzero(margins <= MARGIN["float32"])
    counted = int(ties[0]) if len(ties) else len(one[0])
    return {
        "equal": one[0][:counted] == several[0][:counted],
        "compared": counted,
        "max_difference": float(np.abs(one[1][: counted + 1] - several[1][: counted + 1]).max()),
    }


def compare_scored(one: np.ndarray, several: np.ndarray) -> dict[str, Any]:
    """Scores [T, V] of two runs over the same tokens: the best of every row that is no tie."""
    (best, margin), (other, _) = top_two(one), top_two(several)
    clear = margin > MARGIN["bfloat16"]
    return {
        "equal": bool((best == other)[clear].all()),
        "compared": int(clear.sum()),
        "max_difference": float(np.abs(one - several).max()),
    }


def generate_and_score(engine: Engine, length: int, count: int) -> tuple[list[int], np.ndarray]:
    """Greedy tokens behind a context, and the scores that they were the best of."""
    with open_context(engine, length) as trajectory:
        ids, _ = decode(engine, trajectory, count)
    with open_context(engine, length) as trajectory:
        return ids, engine.score(trajectory, ids, "plan")


def drawn_as_scored(engine: Engine, length: int, count: int) -> dict[str, int]:
    """Of so many drawn tokens, how many scores of the same output and the same random numbers give, too.

    Scores come from a prefill, which rounds otherwise than decoding: a few may be others. Were they not drawn at all,
    or from other numbers, nearly all would be.
    """
    how = SamplingParams(max_new_tokens=count, temperature=1.0, seed=1, ignore_eos=True)
    with open_context(engine, length) as trajectory:
        ids = engine.generate(trajectory, "plan", how).token_ids
    logits = score(engine, length, ids)
    arrays = sampling_arrays([how] * count, [count] * count, (), count)
    again = jax.jit(sample)(logits, arrays, np.arange(count, dtype=np.int32))
    return {"as_scored": int((np.asarray(again) == ids).sum()), "of": count}


def score(engine: Engine, length: int, ids: list[int]) -> np.ndarray:
    with open_context(engine, length) as trajectory:
        return engine.score(trajectory, ids, "plan")


# What is shown.


def say(text: str, started: float) -> None:
    print(f"{time.perf_counter() - started:6.1f} s  {text}", file=sys.stderr, flush=True)


def check_in_float32(setting: Setting, layers: int, devices: int) -> dict[str, Any]:
    config = dataclasses.replace(setting.config, num_layers=layers)
    small = setting._replace(config=config, dtype="float32", contexts=setting.contexts[:1])
    runs = []
    for count in (1, devices):
        engine = make_engine(small, count)
        runs.append(generate_and_score(engine, small.contexts[0], small.decoded))
        del engine
    return compare_generated(*runs)


def all_reduce_share(row: dict[str, Any]) -> float | str:
    return NOT_SEEN if row["all_reduce_ms"] is None else row["all_reduce_ms"] / row["step_ms"]


def bench(setting: Setting, devices: int, check_layers: int) -> dict[str, Any]:
    started = time.perf_counter()
    tokens = {}
    if check_layers:
        tokens["float32"] = check_in_float32(setting, check_layers, devices)
        say(f"{check_layers} layers in float32 compared", started)
    times, scores, ids, drawn = {}, [], [], {}
    for count in (1, devices):
        engine = make_engine(setting, count)
        say(f"weights for {count} devices made", started)
        if count == 1:
            ids, logits = generate_and_score(engine, setting.contexts[0], setting.decoded)
        else:
            logits = score(engine, setting.contexts[0], ids)
            drawn = drawn_as_scored(engine, setting.contexts[0], setting.decoded)
        scores.append(logits)
        times[count] = measure(engine, setting, trace=count > 1)
        say(f"{count} devices measured", started)
        del engine
    tokens[setting.dtype] = compare_scored(*scores)
    contexts = {}
    for length, several in times[devices].items():
        one = times[1][length]["step_ms"]
        contexts[length] = {
            "one_ms": one, "several_ms": several["step_ms"], "ratio": several["step_ms"] / one,
            **{name: value for name, value in several.items() if name != "step_ms"},
            "all_reduce_share": all_reduce_share(several),
        }  # fmt: skip
    return {
        "devices": devices, "contexts": contexts, "tokens": tokens, "drawn": drawn,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


def show(report: dict[str, Any]) -> None:
    devices = report["devices"]
    table = Table(title=f"decode step of one row, {report['preset']}, {report['device']}", box=None)
    columns = ("context", "1 device, ms", f"{devices} devices, ms", "ratio", "asked",
               "all-reduces", "ms", "waiting", "share")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right")
    for length, row in report["contexts"].items():
        verdict = f"{row['ratio']:.3f}" + ("" if row["ratio"] <= ASKED_RATIO else " missed")
        if row["all_reduce_ms"] is None:
            all_reduces = (NOT_SEEN, "", "", "")
        else:
            waiting = row["all_reduce_kernel_ms"] - row["all_reduce_ms"]
            all_reduces = (f"{row['all_reduces']:.0f}", f"{row['all_reduce_ms']:.3f}", f"{waiting:.3f}",
                           f"{row['all_reduce_share']:.1%}")  # fmt: skip
        table.add_row(
            length, f"{row['one_ms']:.3f}", f"{row['several_ms']:.3f}", verdict, f"<= {ASKED_RATIO:.2f}", *all_reduces
        )
    for dtype, row in report["tokens"].items():
        said = "the same" if row["equal"] else "DIFFERENT"
        table.add_row(
            "tokens",
            dtype,
            f"{row['compared']} compared:",
            said,
            "",
            "",
            f"scores differ by {row['max_difference']:.1e}",
        )
    table.add_row("tokens", "drawn", f"{report['drawn']['of']} compared:", f"{report['drawn']['as_scored']} as scored")
    Console(width=140).print(table)


def compiler_option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="all of the preset's by default")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--contexts", default="1024,33680", help="tokens read before decoding, comma-separated")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of a prefill chunk")
    parser.add_argument("--decoded", type=int, default=32, help="tokens of a call, all in one block on the device")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--page-size", type=int, default=128, help="a pool of few pages has one width of page tables")
    parser.add_argument("--implementation", help="of attention; the first that fits by default")
    parser.add_argument("--check-layers", type=int, default=2, help="of the comparison in float32; 0: none")
    parser.add_argument(
        "--compiler-option",
        action="append",
        type=compiler_option,
        default=[],
        metavar="NAME=VALUE",
        help="of the decode program, on one device and on several; repeatable; a switch is True or False",
    )
    arguments = parser.parse_args()
    try:  # before the engine over one device, whose numbers nobody wants alone
        choose_devices(arguments.devices)
    except InputError as error:
        parser.error(f"--devices {arguments.devices}: {error}")
    options = dict(arguments.compiler_option)
    contexts = tuple(sorted(int(item) for item in arguments.contexts.split(",")))
    config = LlamaConfig.preset(arguments.preset)
    most = contexts[-1] + (arguments.repeats + 4) * arguments.decoded
    config = dataclasses.replace(config, context_length=most, num_layers=arguments.layers or config.num_layers)
    setting = Setting(config, arguments.dtype, arguments.rank, contexts, arguments.chunk, arguments.decoded,
                      arguments.repeats, arguments.page_size, arguments.implementation)  # fmt: skip
    with generation.decode.compiled_with(options):
        measured = bench(setting, arguments.devices, arguments.check_layers)
    report = {
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, "preset": arguments.preset,
        "layers": config.num_layers, "compiler_options": options, "asked_ratio": ASKED_RATIO, **measured,
    }  # fmt: skip
    show(report)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
