"""One ReAct trace through three agents under several sharing modes: TTFT, throughput, cache bytes, beside their floors.

Regime: one trajectory, batch 1, random weights and random token ids of a well-known shape, greedy decoding, logits of
the last position only. The calls are those of LRAgent (arXiv 2602.01053, Table 12): each agent first reads what it
has not read, then decodes. Programs are compiled by one untimed trace per mode; figures are medians over `--repeats`.
Floors are bytes over the copy bandwidth and FLOP over the bf16 matmul rate, both measured here. The last line of
standard output is one line of JSON.

    python scripts/bench_trace.py --preset llama-3.1-8b --chunk 1024 --modes none,base_lr
"""

import argparse
import json
import re
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from lragent_jax import generation
from lragent_jax.engine import Engine
from lragent_jax.measure.timing import DeviceSpeed, measure_device
from lragent_jax.models.config import LlamaConfig
from lragent_jax.sampling import sampling_arrays
from lragent_jax.sampling_params import SamplingParams
from lragent_jax.sharing import SHARING_MODES


def trace(chunk: int) -> list[tuple[str, int, int]]:
    """(agent, new tokens, decoded tokens) of the 17 calls; `chunk` tokens are read in each of the four turns."""
    turn = [("plan", chunk, 32), ("plan", 8, 8), ("action", 8, 8)]
    opening = [("plan", 512, 32), ("plan", 8, 8), ("action", 8, 8)]
    return [*opening, *(turn * 4), ("reflect", 32, 32), ("reflect", 8, 8)]


def run_trace(engine: Engine, calls: list[tuple[str, int, int]]) -> dict[str, float]:
    """The trace once, on fresh ids."""
    rng = np.random.default_rng(0)
    outputs = []
    with engine.trajectory() as trajectory:
        for agent, num_new, num_decoded in calls:
            trajectory.append(rng.integers(0, engine.config.vocab_size, num_new))
            params = SamplingParams(max_new_tokens=num_decoded, ignore_eos=True)
            outputs.append(engine.generate(trajectory, agent, params))
        total_tokens, cache_bytes = len(trajectory), engine.cache_stats().bytes_used
    latency = sum(out.latency_s for out in outputs)
    decoding = latency - sum(out.ttft_s for out in outputs)
    return {
        "total_tokens": total_tokens,
        "prefilled_tokens": sum(out.num_prefilled_tokens for out in outputs),
        "cached_tokens": sum(out.num_cached_tokens for out in outputs),
        "cache_bytes": cache_bytes,
        "ttft_s": sum(out.ttft_s for out in outputs),
        "decode_ms_per_token": 1e3 * decoding / sum(len(out.token_ids) - 1 for out in outputs),
        "tokens_per_s": total_tokens / latency,
    }


def floors(config: LlamaConfig, params, result: dict, device: DeviceSpeed) -> dict[str, float]:
    """The least time that the work of a mode can take: prefill by FLOP, a decode step by bytes at half the context."""
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    linear = config.num_layers * sum(a * b for a, b in config.projection_shapes().values())
    mean_context = result["total_tokens"] / 2
    per_token = 2 * linear + 4 * config.num_layers * config.num_heads * config.head_dim * mean_context
    embedding = 0 if config.tied_embeddings else config.vocab_size * config.width * 2  # one row of it is read
    kv = config.base_cache_bytes_per_token(2) * mean_context
    return {
        "ttft_floor_s": result["prefilled_tokens"] * per_token / device.flop_per_s,
        "decode_floor_ms": 1e3 * (weights - embedding + kv) / device.bytes_per_s,
    }


def pool_copies(engine: Engine) -> dict[str, int]:
    """How many ops of the compiled programs copy a whole page pool: there must be none."""
    executor, cache = engine._executor, engine._cache.arrays
    table = executor.blank_table(batch=1)
    ids = np.zeros(1, np.int32)
    common = (executor.graphdef, executor.params, executor.registry.bank, cache)
    tokens = np.zeros((1, executor.prefill_buckets[-1]), np.int32)
    prefill = generation.prefill.lower(*common, tokens, ids, table).compile()
    sampling = sampling_arrays([], [], (), 1)
    state = generation.first_token(jnp.zeros((1, engine.config.vocab_size)), sampling)
    decode = generation.decode.lower(
        *common, state, sampling, ids, table, np.int32(1), block=executor.decode_block
    ).compile()
    shapes = {re.escape(",".join(map(str, pool.shape))) for pool in jax.tree.leaves(cache)}
    pattern = re.compile(rf"\[(?:{'|'.join(shapes)})\]\S* (?:copy|copy-start|transpose)\(")
    programs = {"prefill": prefill, "decode": decode}
    return {name: len(pattern.findall(program.as_text() or "")) for name, program in programs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-3.1-8b")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens read per turn (C of the paper's table)")
    parser.add_argument("--modes", default="none,base_lr", help=f"comma-separated, of {','.join(SHARING_MODES)}")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-copies", action="store_true", help="do not look for pool copies in the programs")
    arguments = parser.parse_args()
    calls = trace(arguments.chunk)
    total = sum(new + decoded for _, new, decoded in calls)
    options = {"page_size": arguments.page_size, "num_pages": 3 * -(-total // arguments.page_size) + 16}
    options |= {"prefix_cache": False}  # every run from a cold cache

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    device = measure_device()
    say(f"{jax.devices()[0].device_kind}: {device.bytes_per_s / 1e9:.0f} GB/s, "
        f"{device.flop_per_s / 1e9:.0f} GFLOP/s")  # fmt: skip
    started = time.perf_counter()
    first = Engine.from_preset(
        arguments.preset, rank=arguments.rank, dtype=arguments.dtype, sharing="full", page_size=8, num_pages=1
    )
    say(f"weights made in {time.perf_counter() - started:.1f} s")
    results = {}
    for mode in arguments.modes.split(","):
        engine = first.with_sharing(mode, **options)
        started = time.perf_counter()
        run_trace(engine, calls)
        compile_s = time.perf_counter() - started
        say(f"{mode}: first trace, compilation included, {compile_s:.1f} s")
        runs = [run_trace(engine, calls) for _ in range(arguments.repeats)]
        result: dict[str, Any] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        result |= floors(engine.config, first._executor.params, result, device) | {"first_trace_s": compile_s}
        result["pool_copies"] = None if arguments.skip_copies else pool_copies(engine)
        results[mode] = result
        del engine

    table = Table(title=f"{arguments.preset}, {total} tokens, {jax.devices()[0].device_kind}")
    columns = ("prefilled", "cache MB", "TTFT s", "floor", "decode ms", "floor", "tokens/s", "pool copies")
    for column in ("mode", *columns):
        table.add_column(column, justify="right")
    for mode, r in results.items():
        copies = "?" if r["pool_copies"] is None else str(sum(r["pool_copies"].values()))
        table.add_row(
            mode, str(r["prefilled_tokens"]), f"{r['cache_bytes'] / 1e6:.1f}", f"{r['ttft_s']:.3f}",
            f"{r['ttft_floor_s']:.3f}", f"{r['decode_ms_per_token']:.2f}", f"{r['decode_floor_ms']:.2f}",
            f"{r['tokens_per_s']:.0f}", copies,
        )  # fmt: skip
    Console(width=120).print(table)
    print(json.dumps({"device": jax.devices()[0].device_kind, "preset": arguments.preset, "total_tokens": total,
                      **device._asdict(), "modes": results}))  # fmt: skip


if __name__ == "__main__":
    main()
