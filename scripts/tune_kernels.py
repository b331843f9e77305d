"""Measures block sizes of the GPU kernels and writes those that beat the heuristic by 2 % as data for this device.

Regime: attention of one layer with the heads of Llama-3.1-8B, bfloat16, random data, as in bench_kernels.py. For every
shape the candidates are what the heuristic says and what differs from it in one field, then one that joins the fields
that helped. A candidate that does not compile, or whose result is not that of the `xla` implementation, is skipped and
says why. How many there are, and how long they will take, is said beforehand (`--dry-run`: only that). Entries of other
shapes in the file stay. The last line of standard output is one line of JSON.

    python scripts/tune_kernels.py --implementations pallas_mosaic_gpu --paths decode
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lragent_jax.kernels.lora_attention import lora_attention, pallas_triton, tuned
from lragent_jax.kernels.lora_attention.dispatch import IMPLEMENTATIONS
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu import decode as mosaic_decode
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu import prefill_config as mosaic_prefill
from lragent_jax.measure.attention import AttentionCase, Chained, Heads, RandomCaches, cycle, paged
from lragent_jax.measure.timing import DeviceSpeed, chain, measure_device, median_seconds

SECONDS_PER_CANDIDATE = 3  # on a machine with 16 cores, which compile side by side
MIN_GAIN = 1.02
MAX_RELATIVE_ERROR = 2e-2
CYCLED_BYTES = 200e6
CALLS_PER_TURN = {"prefill": 2, "decode": 16}


class Kernel(NamedTuple):
    """heuristic: block sizes for (case, heads). fields: what is tried in their place."""

    heuristic: Callable[[AttentionCase, Heads], Any]
    fields: dict[str, tuple[int, ...]]


def triton_heuristic(case: AttentionCase, heads: Heads) -> pallas_triton.BlockSizes:
    G = heads.N // heads.K
    shapes = (case.B, case.T, G, heads.H, heads.p, case.r_v, case.r_k, heads.itemsize)
    return pallas_triton.heuristic(*shapes, pallas_triton.shared_memory())


KERNELS = {
    ("pallas_mosaic_gpu", "prefill"): Kernel(
        lambda case, heads: mosaic_prefill.heuristic(),
        {"block_kv": (64, 128), "num_stages": (2, 3)},
    ),
    ("pallas_mosaic_gpu", "decode"): Kernel(
        lambda case, heads: mosaic_decode.heuristic(case.r_k, is_batch=case.B > 1),
        {"num_stages": (2, 3, 4, 5), "compute": (1, 2), "programs": (132, 264)},
    ),
    ("pallas_triton", "prefill"): Kernel(
        triton_heuristic,
        {"block_q": (64, 128), "block_kv": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
    ),
    ("pallas_triton", "decode"): Kernel(
        triton_heuristic,
        {"block_kv": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4, 5), "programs": (132, 264, 396)},
    ),
}


def cases(path: str, S: int) -> list[AttentionCase]:
    """The shapes worth a figure of their own."""
    if path == "prefill":  # many queries have low-rank keys and values expanded before, and read them as plain ones
        return [AttentionCase(S, T=min(S, 512)), AttentionCase(S, T=S).plain]
    alone = [AttentionCase(S, r_v=r_v, r_k=r_k) for r_v, r_k in ((16, 0), (0, 0), (16, 16))]
    return [*alone, *(AttentionCase(S, B=B) for B in (4, 8))]


def candidates(kernel: Kernel, case: AttentionCase, heads: Heads) -> list[Any]:
    """The heuristic's block sizes, then those that differ from them in one field and are valid."""
    first = kernel.heuristic(case, heads)
    found = [first]
    for field, values in kernel.fields.items():
        found += [changed for value in values if (changed := replaced(first, **{field: value})) not in (first, None)]
    return found


def replaced(sizes: Any, **fields: int) -> Any | None:
    """None where a dataclass does not take these values."""
    try:
        return dataclasses.replace(sizes, **fields)
    except ValueError:
        return None


def joined(seconds: dict[Any, float]) -> Any | None:
    """The first candidate with the best value of each field; None where that was measured."""
    first = next(iter(seconds))
    best = {}
    for sizes, taken in seconds.items():
        for field in dataclasses.fields(first):
            value = getattr(sizes, field.name)
            if value != getattr(first, field.name) and taken < best.get(field.name, (seconds[first], None))[0]:
                best[field.name] = (taken, value)
    together = replaced(first, **{name: value for name, (_, value) in best.items()})
    return None if together in seconds else together


class Tuner:
    """Times candidates of one (implementation, path) at a time."""

    def __init__(self, heads: Heads, speed: DeviceSpeed, chain_s: float, say: Callable[[str], None]):
        self.heads, self.speed, self.chain_s, self.say = heads, speed, chain_s, say
        self.caches = RandomCaches(heads)

    def calls(self, attention: Callable, case: AttentionCase) -> Chained:
        num_pages = -(-case.distinct_tokens // self.heads.p)
        return paged(attention, case, self.caches, num_pages, cycle(case, self.heads, CYCLED_BYTES))

    def lower(self, implementation: str, case: AttentionCase, sizes: Any) -> tuple[Chained, Any, int]:
        """What is called, the program, and how many calls it makes."""
        [chosen] = [one for one in IMPLEMENTATIONS if one.name == implementation]
        attention = functools.partial(
            chosen.load(), sm_scale=self.heads.H**-0.5, return_lse=False, block_sizes=sizes
        )  # fmt: skip
        calls = CALLS_PER_TURN["decode" if case.T == 1 else "prefill"]
        floor = self.speed.floor_s(case.floor_bytes(self.heads), case.flop(self.heads))
        turns = max(1, round(self.chain_s / (calls * floor)))
        chained = self.calls(attention, case)
        return chained, jax.jit(chain(chained.attend, calls, turns)).lower(*chained.arguments), 1 + calls * turns

    def measure(self, implementation: str, case: AttentionCase, tried: list[Any]) -> dict[Any, float]:
        """Seconds of one call with each of `tried` that compiles and is right."""
        plain = self.calls(functools.partial(lora_attention, implementation="xla"), case)
        want = np.asarray(jax.jit(plain.attend)(plain.q, plain.data[0], plain.shared), np.float32)
        seconds = {}
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            attempts = {sizes: self.attempt(sizes, self.lower, implementation, case, sizes) for sizes in tried}
            lowered = {sizes: one for sizes, one in attempts.items() if one is not None}
            compiling = {sizes: pool.submit(program.compile) for sizes, (_, program, _) in lowered.items()}
        for sizes, future in compiling.items():
            chained, _, calls = lowered[sizes]
            taken = self.attempt(sizes, self.time, future, chained, want)
            if taken is not None:
                seconds[sizes] = taken / calls
                self.say(f"    {sizes}: {seconds[sizes] * 1e6:.1f} µs")
        return seconds

    def time(self, future: concurrent.futures.Future, chained: Chained, want: np.ndarray) -> float:
        """Seconds of a program; ValueError where its first result is not `want`."""
        program = future.result()
        first, _ = program(*chained.arguments)
        error = np.linalg.norm(np.asarray(first, np.float32) - want) / np.linalg.norm(want)
        if not error < MAX_RELATIVE_ERROR:
            raise ValueError(f"the result is off by {error:.1e}")
        return median_seconds(lambda: program(*chained.arguments))

    def attempt(self, sizes: Any, call: Callable, *args):
        """What `call` returns; None where the kernel or its compiler refuses."""
        try:
            return call(*args)
        except (NotImplementedError, ValueError, RuntimeError) as reason:
            self.say(f"    {sizes}: skipped, {str(reason).strip().splitlines()[0][:200]}")
            return None

    def tune(self, implementation: str, path: str, case: AttentionCase) -> tuple[Any, float, float] | None:
        """The best block sizes, their seconds, and those of the heuristic (inf: it does not run)."""
        tried = candidates(KERNELS[implementation, path], case, self.heads)
        seconds = self.measure(implementation, case, tried)
        if tried[0] in seconds and (together := joined(seconds)) is not None:
            seconds |= self.measure(implementation, case, [together])
        if not seconds:
            return None
        best = min(seconds, key=seconds.__getitem__)
        return best, seconds[best], seconds.get(tried[0], float("inf"))


def entry_of(implementation: str, path: str, case: AttentionCase, heads: Heads, sizes: Any) -> tuned.Entry:
    shape = tuned.ShapeClass.of(
        path, rows=case.B * case.T, G=heads.N // heads.K, H=heads.H, p=heads.p, r_v=case.r_v, r_k=case.r_k
    )
    return tuned.Entry(implementation, path, shape, dataclasses.asdict(sizes))


def merged(
    old: tuple[tuned.Entry, ...], new: list[tuned.Entry], measured: list[tuned.Entry]
) -> tuple[tuned.Entry, ...]:
    """`old` without what was `measured` again, and `new`."""
    again = {(entry.implementation, entry.path, entry.shape) for entry in measured}
    kept = [entry for entry in old if (entry.implementation, entry.path, entry.shape) not in again]
    return (*kept, *new)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ",".join(dict.fromkeys(name for name, _ in KERNELS))
    parser.add_argument("--implementations", default=names, help=f"of {names}")
    parser.add_argument("--paths", default=",".join(tuned.PATHS), help=f"of {','.join(tuned.PATHS)}")
    parser.add_argument("--context", type=int, default=8192, help="tokens that are prefilled, or read by a decode step")
    parser.add_argument("--heads", type=int, nargs=3, default=(32, 8, 128), metavar=("N", "K", "H"))
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--chain", type=float, default=10e-3, help="seconds that one measurement lasts, about")
    parser.add_argument("--folder", type=Path, default=tuned.FOLDER, help="where the file is written")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be measured")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    N, K, H = arguments.heads
    heads = Heads(N, K, H, arguments.page_size)
    chosen = [
        key
        for key in KERNELS
        if key[0] in arguments.implementations.split(",") and key[1] in arguments.paths.split(",")
    ]
    work = [(*key, case) for key in chosen for case in cases(key[1], arguments.context)]
    numbers = [1 + len(candidates(KERNELS[name, path], case, heads)) for name, path, case in work]

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    device_kind = jax.devices()[0].device_kind
    say(f"{device_kind}: {sum(numbers)} candidates for {len(work)} shapes, "
        f"about {sum(numbers) * SECONDS_PER_CANDIDATE} s")  # fmt: skip
    if arguments.dry_run:
        print(json.dumps({"device_kind": device_kind, "shapes": len(work), "candidates": sum(numbers)}))
        return
    tuner = Tuner(heads, measure_device(), arguments.chain, say)
    started, done, better, measured, report = time.perf_counter(), 0, [], [], []
    for (name, path, case), number in zip(work, numbers, strict=True):
        say(f"{name} {path} {case}")
        found = tuner.tune(name, path, case)
        done += number
        left = (time.perf_counter() - started) / done * (sum(numbers) - done)
        if found is None:
            say(f"  nothing runs; {left:.0f} s left")
            continue
        sizes, seconds, before = found
        say(f"  best: {sizes}, {seconds * 1e6:.1f} µs; the heuristic's: {before * 1e6:.1f} µs; {left:.0f} s left")
        entry = entry_of(name, path, case, heads, sizes)
        measured.append(entry)
        better += [entry] if before / seconds > MIN_GAIN else []
        report.append({"name": name, "path": path, "case": str(case), "best": dataclasses.asdict(sizes),
                       "us": round(seconds * 1e6, 2), "heuristic_us": round(before * 1e6, 2)})  # fmt: skip
    file = arguments.folder / f"{tuned.slug(device_kind)}.json"
    old = tuned.read(file) if file.exists() else ()
    tuned.write(file, device_kind, merged(old, better, measured))
    print(json.dumps({"device_kind": device_kind, "file": str(file), "entries": len(better), "shapes": report}))


if __name__ == "__main__":
    main()
