"""Attention kernels beside their peers and their floors: the time of one call in prefill, in decode, with many agents.

Regime: one layer's attention with the shapes of Llama-3.1-8B (N = 32, K = 8, H = 128, bfloat16, pages of 64 tokens at
random places), random data. Calls run one after the other inside one program, each with the last one's output as its
queries, over as many caches as exceed 200 MB, so that none is read from the device's cache. What the calls of a decode
step have in common (the plan of who reads which pages) is computed once per 32 calls: the model has 32 layers. Medians
of 5 repeats. Before it is timed, the first result of every program is compared with the `xla` implementation: the norm
of the difference over the norm.

Peers, in the same run: cuDNN (without LoRA, contiguous; without a mask where T < S, JAX's being aligned top-left),
unfused (L B expanded into V by XLA, then cuDNN), and what JAX ships: the Pallas Triton `mha` (K and V repeated: it has
no GQA) and `gqa`, the Pallas Mosaic `attention` (float16). Where one is refused, its row says why. The last line of
standard output is one line of JSON.

    python scripts/bench_kernels.py --rows prefill,decode --plot kernels.png
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.table import Table

from lragent_jax.kernels.lora_attention import lora_attention
from lragent_jax.kernels.lora_attention.dispatch import IMPLEMENTATIONS
from lragent_jax.measure.attention import VALUE_SCALE, AttentionCase, Chained, Heads, RandomCaches, cycle, paged
from lragent_jax.measure.timing import DeviceSpeed, chain, measure_device, median_seconds

ROWS = ("prefill", "chunk", "decode", "group", "prefix", "keys", "scatter", "rank")
PEERS = ("cudnn", "unfused", "shipped_triton", "shipped_mosaic")


class Sizes(NamedTuple):
    """What the rows are measured at, and how long and over how many bytes a chain of calls goes."""

    heads: Heads
    prefill: tuple[int, ...]
    chunk: int
    chunk_contexts: tuple[int, ...]
    decode: tuple[int, ...]
    agents: tuple[int, ...]
    trajectories: int
    prefix: int
    tail: int
    ranks: tuple[int, int]
    decode_calls: int
    cycled_bytes: float
    chain_s: float

    @property
    def longest(self) -> int:
        return max(*self.prefill, *self.chunk_contexts, *self.decode)


PRESETS = {
    "llama-3.1-8b": Sizes(
        Heads(), (4096, 8192, 16_384), 512, (16_384, 65_536), (4096, 16_384, 65_536), (8, 16), 32, 4096, 1024, (8, 64),
        decode_calls=32, cycled_bytes=200e6, chain_s=20e-3,
    ),
    "toy": Sizes(
        Heads(4, 2, 16, 8, "float32"), (16,), 8, (32,), (16, 32), (2, 3), 3, 16, 8, (2, 4),
        decode_calls=2, cycled_bytes=2e4, chain_s=1e-5,
    ),
}  # fmt: skip


def rows_of(sizes: Sizes) -> dict[str, list[AttentionCase]]:
    """The cases of every group of rows. What a row is compared with is a case, too."""
    Case, long, middle = AttentionCase, sizes.decode[-1], sizes.prefill[len(sizes.prefill) // 2]
    few, many = sizes.agents
    decode, prefill = Case(long), Case(middle, T=middle)
    trajectories = Case(sizes.prefix + sizes.tail, B=sizes.trajectories, prefix=sizes.prefix)
    groups = [
        *(Case(long, B=few, groups=g) for g in (1, few)),
        *(Case(long, B=many, groups=g) for g in (1, many)),
    ]
    with_keys = [prefill, decode, Case(long, B=3), Case(long, B=few)]
    ranks = [dataclasses.replace(case, r_v=r) for case in (prefill, decode) for r in sizes.ranks]
    return {
        "prefill": [case for S in sizes.prefill for case in (Case(S, T=S), Case(S, T=S).plain)],
        "chunk": [Case(S, T=sizes.chunk) for S in sizes.chunk_contexts],
        "decode": [Case(S) for S in sizes.decode],
        "group": [decode, *groups],
        "prefix": [trajectories, dataclasses.replace(trajectories, share=False)],
        "keys": [*with_keys, *(dataclasses.replace(case, r_k=16) for case in with_keys)],
        "scatter": [case for base in (prefill, decode) for case in (base, dataclasses.replace(base, scattered=False))],
        "rank": ranks,
    }


def peers_of(row: str, case: AttentionCase) -> tuple[str, ...]:
    if row not in ("prefill", "chunk", "decode") or not case.r_v:
        return ()
    shipped = {"prefill": ("shipped_triton", "shipped_mosaic"), "decode": ("shipped_triton",)}
    return ("cudnn", *(() if row == "chunk" else ("unfused",)), *shipped.get(row, ()))


# Programs: what is called, on what.


def ours(name: str, case: AttentionCase, sizes: Sizes, caches: RandomCaches) -> Chained:
    """An implementation of ours."""
    num_pages = -(-max(sizes.longest, case.distinct_tokens) // sizes.heads.p)
    attention = functools.partial(lora_attention, implementation=name)
    return paged(attention, case, caches, num_pages, cycle(case, sizes.heads, sizes.cycled_bytes))


def contiguous(name: str, case: AttentionCase, sizes: Sizes, caches: RandomCaches) -> Chained:
    """A peer: k, v [B, S, K, H] as it wants them, low-rank values [B, S, r] and B [r, K, H] beside them."""
    heads, dtype = sizes.heads, "float16" if name == "shipped_mosaic" else sizes.heads.dtype
    repeated = name == "shipped_triton" and case.T > 1
    shape = (case.B, case.S, heads.N if repeated else heads.K, heads.H)
    # The shipped Mosaic kernel scales no scores.
    key_scale = heads.H**-0.5 if name == "shipped_mosaic" else 1.0
    data = []
    for i in range(cycle(case, heads, sizes.cycled_bytes)):
        k = caches.normal(2 * i + 1000, shape, key_scale, dtype)
        v = caches.normal(2 * i + 1001, shape, VALUE_SCALE, dtype)
        if name == "shipped_triton" and case.T == 1:  # it swaps them back and copies nothing
            k, v = (caches.normal(2 * i + j + 1002, (case.B, heads.K, case.S, heads.H)) for j in range(2))
        low_rank = lora_b = None
        if name == "unfused":
            low_rank = caches.normal(i + 3000, (case.B, case.S, case.r_v))
            lora_b = caches.normal(i + 4000, (case.r_v, heads.K, heads.H), VALUE_SCALE / 2 / case.r_v**0.5)
        data.append((k, v, low_rank, lora_b))
    attend = functools.partial(PEER_CALLS[name], causal=case.T == case.S)
    return Chained(attend, caches.queries(case, dtype), tuple(data))


def cudnn(q, data, _=None, *, causal: bool):
    k, v, _, _ = data
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal and q.shape[1] > 1, implementation="cudnn")


def unfused(q, data, _=None, *, causal: bool):
    k, v, low_rank, lora_b = data
    q, low_rank = lax.optimization_barrier((q, low_rank))  # or XLA would expand every cache once, before all calls
    v = (v + jnp.einsum("bsr,rkh->bskh", low_rank, lora_b)).astype(v.dtype)
    return cudnn(q, (k, v, None, None), causal=causal)


def shipped(name: str) -> Any:
    """A module of kernels that JAX ships; from 0.11 on it says that these are deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(f"jax.experimental.pallas.ops.gpu.{name}")


def shipped_triton(q, data, _=None, *, causal: bool):
    k, v, _, _ = data
    if q.shape[1] == 1:
        rows = q[:, 0], k.swapaxes(1, 2), v.swapaxes(1, 2)
        return shipped("decode_attention").gqa(*rows)[:, None].astype(q.dtype)
    return shipped("attention").mha(q, k, v, None, sm_scale=q.shape[-1] ** -0.5, causal=causal)


def shipped_mosaic(q, data, _=None, *, causal: bool):
    attention_mgpu = shipped("attention_mgpu")
    k, v, _, _ = data
    config = attention_mgpu.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=causal)
    return attention_mgpu.attention(q, k, v, config)


PEER_CALLS = {"cudnn": cudnn, "unfused": unfused, "shipped_triton": shipped_triton, "shipped_mosaic": shipped_mosaic}


# Measuring.


# With what implementations, JAX's kernels and compilers say that something does not run here.
REFUSALS = (NotImplementedError, ValueError, RuntimeError, AssertionError)


@dataclasses.dataclass
class Result:
    """name: of an implementation or a peer. seconds: of one call; None with the reason where it did not run."""

    name: str
    case: AttentionCase
    seconds: float | None = None
    relative_error: float | None = None
    reason: str | None = None

    def as_json(self, heads: Heads, speed: DeviceSpeed) -> dict[str, Any]:
        floor = speed.floor_s(self.case.floor_bytes(heads), self.case.flop(heads))
        row = {"name": self.name, "case": str(self.case), "floor_us": round(floor * 1e6, 2)}
        if self.seconds is None:
            return row | {"reason": self.reason}
        error = {} if self.relative_error is None else {"relative_error": float(f"{self.relative_error:.3g}")}
        tflops = self.case.flop(heads) / self.seconds / 1e12
        return row | {"us": round(self.seconds * 1e6, 2), "tflop_per_s": round(tflops, 1)} | error


def describe(reason: Exception) -> str:
    return f"{type(reason).__name__}: {str(reason).strip()}".splitlines()[0][:300]


class Bench:
    """Compiles and times programs, and keeps the results by (name, case)."""

    def __init__(self, sizes: Sizes, speed: DeviceSpeed, check: bool):
        self.sizes, self.speed, self.check = sizes, speed, check
        self.caches = RandomCaches(sizes.heads)
        self.results: dict[tuple[str, AttentionCase], Result] = {}

    def run(self, wanted: list[tuple[str, AttentionCase]]) -> None:
        """Everything `wanted` that has no result yet: compiled side by side, then timed one after the other."""
        wanted = [key for key in dict.fromkeys(wanted) if key not in self.results]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            lowered = {key: program for key in wanted if (program := self.lower(*key)) is not None}
            compiling = {key: pool.submit(program.compile) for key, (_, program) in lowered.items()}
            checked = dict.fromkeys(case for name, case in compiling if name not in PEERS and self.check)
            references = {case: pool.submit(self.reference, case) for case in checked}
        wants = {case: future.result() for case, future in references.items()}
        for key, (chained, _) in lowered.items():
            self.time(*key, chained, compiling[key], wants.get(key[1]) if key[0] not in PEERS else None)

    def lower(self, name: str, case: AttentionCase) -> tuple[Chained, jax.stages.Lowered] | None:
        try:
            make = contiguous if name in PEERS else ours
            chained = make(name, case, self.sizes, self.caches)
            program = jax.jit(chain(chained.attend, self.calls(case), self.turns(case)))
            return chained, program.lower(*chained.arguments)
        except REFUSALS as reason:
            self.results[name, case] = Result(name, case, reason=describe(reason))
            return None

    def calls(self, case: AttentionCase) -> int:
        return self.sizes.decode_calls if case.T == 1 else 4

    def turns(self, case: AttentionCase) -> int:
        """As many as the chain would need to last `chain_s` at its floor."""
        floor = self.speed.floor_s(case.floor_bytes(self.sizes.heads), case.flop(self.sizes.heads))
        return max(1, round(self.sizes.chain_s / (self.calls(case) * floor)))

    def reference(self, case: AttentionCase) -> np.ndarray:
        chained = ours("xla", case, self.sizes, self.caches)
        return np.asarray(jax.jit(chained.attend)(chained.q, chained.data[0], chained.shared), np.float32)

    def time(self, name: str, case: AttentionCase, chained: Chained, future, want: np.ndarray | None) -> None:
        result = self.results[name, case] = Result(name, case)
        try:
            program = future.result()
            first, _ = jax.block_until_ready(program(*chained.arguments))
        except REFUSALS as reason:
            result.reason = describe(reason)
            return
        got = np.asarray(first, np.float32)
        if want is not None:
            result.relative_error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
        if not np.isfinite(got).all():
            result.reason = "the result is not finite"
            return
        calls = 1 + self.calls(case) * self.turns(case)
        result.seconds = median_seconds(lambda: program(*chained.arguments)) / calls

    def seconds(self, name: str, case: AttentionCase) -> float | None:
        result = self.results.get((name, case))
        return result and result.seconds


# What has to be reached.


class Target(NamedTuple):
    """A ratio of times, or with `unit` a figure of its own: at most `limit`, or at least where `at_least`."""

    what: str
    name: str
    value: float
    limit: float
    unit: str = "x"
    at_least: bool = False

    @property
    def reached(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def of_limit(self) -> float:
        """1 where it is just reached, more where it is missed."""
        return self.limit / self.value if self.at_least else self.value / self.limit

    def as_json(self) -> dict[str, Any]:
        limit = {} if math.isinf(self.limit) else {"at least" if self.at_least else "at most": self.limit}
        return {"what": self.what, "name": self.name, "value": round(self.value, 4), "unit": self.unit, **limit}


def targets(bench: Bench, names: list[str]) -> list[Target]:
    """Every target whose cases were measured, for every implementation of ours."""
    found = []
    for name in names:
        for what, limit, case, other, other_case in comparisons(bench.sizes):
            ours = bench.seconds(name, case)
            theirs = bench.seconds(other or name, other_case)
            if ours and theirs and (other != "shipped_triton" or name == "pallas_triton"):
                faster = other == "unfused"
                value = theirs / ours if faster else ours / theirs
                found.append(Target(what, name, value, limit, at_least=faster))
        for case, limit_us in decode_limits(bench.sizes):
            if seconds := bench.seconds(name, case):
                found.append(Target(f"decode, {case}", name, seconds * 1e6, limit_us, unit="µs"))
        longest = AttentionCase(bench.sizes.decode[-1])
        if seconds := bench.seconds(name, longest):
            bandwidth = longest.floor_bytes(bench.sizes.heads) / seconds / bench.speed.bytes_per_s
            found.append(Target("decode, share of copy bandwidth", name, bandwidth, 0.88, unit="", at_least=True))
    return found


def decode_limits(sizes: Sizes) -> list[tuple[AttentionCase, float]]:
    return [(AttentionCase(S), limit) for S, limit in ((4096, 15.0), (16_384, 32.0)) if S in sizes.decode]


Comparison = tuple[str, float, AttentionCase, str | None, AttentionCase]


def comparisons(sizes: Sizes) -> list[Comparison]:
    """(what, limit, case, name of the peer or None for the same implementation, its case)."""
    replace, found = dataclasses.replace, []
    for S in sizes.prefill:
        case = AttentionCase(S, T=S)
        found += [
            (f"prefill {S} to cuDNN plain", 1.05, case, "cudnn", case),
            (f"prefill {S} to itself without adapter", 1.06, case, None, case.plain),
            (f"prefill {S} to shipped Triton", 1.10, case, "shipped_triton", case),
        ]
    for S in sizes.chunk_contexts:
        case = AttentionCase(S, T=sizes.chunk)
        found.append((f"chunk of {sizes.chunk} at {S} to cuDNN plain", 1.07, case, "cudnn", case))
    rows = rows_of(sizes)
    one = AttentionCase(sizes.decode[-1])
    found.append(("decode, times faster than unfused", 1.9, one, "unfused", one))
    for case, limit in zip(rows["group"][1:], (1.10, 1.10, 1.25, 1.25), strict=True):
        found.append((f"{case.B} agents, {case.groups} groups, to one agent", limit, case, None, one))
    shared, apart = rows["prefix"]
    found.append((f"{shared.B} trajectories on one prefix to no sharing", 0.35, shared, None, apart))
    for case in rows["keys"][:4]:
        limit = 1.35 if case.T > 1 else 1.25 if case.B == 1 else math.inf
        what = "prefill" if case.T > 1 else f"decode, {case.B} agents"
        found.append((f"low-rank keys on top: {what}", limit, replace(case, r_k=16), None, case))
    for case, other in zip(rows["scatter"][::2], rows["scatter"][1::2], strict=True):
        found.append((f"scattered to contiguous: {'prefill' if case.T > 1 else 'decode'}", 1.03, case, None, other))
    for (low, high), limit in zip((rows["rank"][:2], rows["rank"][2:]), (1.22, 1.06), strict=True):
        what = "prefill" if low.T > 1 else "decode"
        found.append((f"r = {high.r_v} to r = {low.r_v}: {what}", limit, high, None, low))
    return found


# What is shown.


def show(bench: Bench, found: list[Target]) -> None:
    console = Console(width=120)
    table = Table(title=f"{jax.devices()[0].device_kind}: one call", box=None)
    for column in ("case", "implementation", "µs", "x floor", "TFLOP/s", "error"):
        table.add_column(column, justify="left" if column in ("case", "implementation") else "right")
    for result in sorted(bench.results.values(), key=lambda result: (-result.case.T, str(result.case))):
        row = result.as_json(bench.sizes.heads, bench.speed)
        if "us" not in row:
            table.add_row(row["case"], row["name"], "-", "", "", str(row["reason"])[:32])
            continue
        error = f"{row['relative_error']:.1e}" if "relative_error" in row else ""
        ratio = f"{row['us'] / row['floor_us']:.2f}" if row["floor_us"] else ""
        table.add_row(row["case"], row["name"], f"{row['us']:.1f}", ratio, f"{row['tflop_per_s']:.0f}", error)
    console.print(table)
    table = Table(title="targets", box=None)
    for column in ("what", "implementation", "reached", "asked", ""):
        table.add_column(column, justify="right" if column in ("reached", "asked") else "left")
    for target in found:
        asked = "" if math.isinf(target.limit) else f"{'≥' if target.at_least else '≤'} {target.limit:g}"
        table.add_row(
            target.what, target.name, f"{target.value:.3f} {target.unit}", asked, "" if target.reached else "missed"
        )
    console.print(table)


def plot(file: str, found: list[Target]) -> None:
    """A bar per target: how far it is from its limit (1: just reached)."""
    pyplot = importlib.import_module("matplotlib.pyplot")
    found = [target for target in found if not math.isinf(target.limit)]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.25 * len(found)), layout="constrained")
    axes.barh(
        [f"{target.what} ({target.name})" for target in found],
        [target.of_limit for target in found],
        color=["tab:green" if target.reached else "tab:red" for target in found],
    )
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("of what is asked (up to 1: reached)")
    figure.savefig(file, dpi=150)


def choices(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """An argument's type: comma-separated names out of `known`."""

    def parse(text: str) -> list[str]:
        names = text.split(",") if text else []
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return names

    return parse


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = tuple(implementation.name for implementation in IMPLEMENTATIONS)
    fast = [one.name for one in IMPLEMENTATIONS if jax.default_backend() in one.platforms and one.name != "xla"]
    parser.add_argument("--preset", choices=PRESETS, default="llama-3.1-8b")
    parser.add_argument("--rows", type=choices(ROWS), default=list(ROWS), help=f"of {','.join(ROWS)}")
    parser.add_argument("--implementations", type=choices(known), default=fast or ["xla"], help=f"of {','.join(known)}")
    parser.add_argument("--peers", type=choices(PEERS), default=list(PEERS), help=f"of {','.join(PEERS)}; may be empty")
    parser.add_argument("--skip-checks", action="store_true", help="do not compare with the xla implementation")
    parser.add_argument("--plot", metavar="FILE", help="draw the targets (needs matplotlib)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:6.1f} s  {text}", file=sys.stderr, flush=True)

    speed, sizes = measure_device(), PRESETS[arguments.preset]
    say(f"{jax.devices()[0].device_kind}: {speed.bytes_per_s / 1e9:.0f} GB/s, {speed.flop_per_s / 1e9:.0f} GFLOP/s")
    bench = Bench(sizes, speed, check=not arguments.skip_checks)
    for row in arguments.rows:
        cases = rows_of(sizes)[row]
        wanted = [(name, case) for case in cases for name in arguments.implementations]
        wanted += [(peer, case) for case in cases for peer in peers_of(row, case) if peer in arguments.peers]
        bench.run(wanted)
        say(f"{row}: done")
    found = targets(bench, arguments.implementations)
    show(bench, found)
    if arguments.plot:
        plot(arguments.plot, found)
    print(json.dumps({
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, "preset": arguments.preset, **speed._asdict(),
        "rows": [result.as_json(sizes.heads, speed) for result in bench.results.values()],
        "targets": [target.as_json() for target in found],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
