"""Where the time of one decode step and of one prefill chunk goes: every operation beside its floor.

Regime: random weights with the shapes of Llama-3.1-8B, bfloat16, one layer's operations each in a program of its own
that calls it many times in a row, over copies of its weights that exceed 200 MB; then the whole pass, all layers in one
program, next to their sum. A floor is bytes over the copy bandwidth or FLOP over the matmul rate, whichever is longer,
both measured here. Adapters (rank 16 on q and v) differ from row to row; in decode the rows are agents of one
trajectory. Below come other ways to do the same: the projections with A in one matrix against matmuls of their own, and
the expanding of mixed rows by a gather of B against one product with all adapters' B under a mask. With `--trace` the
profiler's kernels of the whole pass are listed, too. Last come the products of decode steps of 1 and of 8 rows, each
with what stands around it: as XLA does them, and by the kernel of `row_matmul`, which models use where its default says
so; first their relative errors against f32, then their times. The last line of standard output is one line of JSON.

    python scripts/profile_step.py --batch 8 --context 16384 --chunk 1024
    python scripts/profile_step.py --batch 0 --chunk 0 --product-rows 1 8
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.table import Table

from lragent_jax import generation
from lragent_jax.kernels import page_write
from lragent_jax.kernels.row_matmul import Norm
from lragent_jax.measure.device_trace import traced_kernels
from lragent_jax.measure.fused_products import (
    Shared,
    by_kernel,
    by_xla,
    comparisons,
    kept,
    linear,
    products_table,
    rms_norm,
)
from lragent_jax.measure.timing import DeviceSpeed, chain, measure_device, median_seconds
from lragent_jax.models import cache_view
from lragent_jax.models.adapter_bank import AdapterBank, LoraPair, lora_delta, shrink
from lragent_jax.models.cache_view import BaseCache, LayerCache, LowRankCache, PageTable
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.llama import random_params
from lragent_jax.models.rope import inverse_frequencies, rotation

CALLS = 8  # in a turn of a chain
WRITTEN_PAGES = 64  # of the pools that page writes are timed on: as the loop's state they are copied once


class Pass(NamedTuple):
    """One forward pass: B rows of T new tokens at the end of a context of S, each with its own adapter of rank r."""

    config: LlamaConfig
    B: int
    T: int
    S: int
    r: int
    p: int
    dtype: str
    implementation: str | None
    cycled_bytes: float

    @property
    def tokens(self) -> int:
        return self.B * self.T

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    @property
    def causal_pairs(self) -> float:
        return self.B * (self.T * (self.S - self.T) + self.T * (self.T + 1) / 2)


class Operation(NamedTuple):
    """function(x, weights, shared) gives the next x. per_pass: how often a pass does it. num_bytes, flop: at least."""

    name: str
    function: Callable
    x: Any
    weights: tuple
    num_bytes: float
    flop: float
    per_pass: int
    shared: Any = None


class Random:
    """Random arrays on the device."""

    def __init__(self, dtype: str):
        self.dtype, self.made = dtype, 0

    def __call__(self, *shape: int, scale: float | None = None) -> jax.Array:
        self.made += 1
        scale = (shape[-2] if len(shape) > 1 else 1) ** -0.5 if scale is None else scale
        return jax.random.normal(jax.random.key(self.made), shape, self.dtype) * jnp.asarray(scale, self.dtype)

    def copies(self, setting: Pass, *shapes: tuple[int, ...]) -> tuple:
        """Sets of arrays of `shapes`, as many as exceed the bytes to cycle through; 16 at most."""
        size = sum(np.prod(shape) for shape in shapes) * setting.itemsize
        count = min(16, 1 + int(setting.cycled_bytes // size))
        return tuple(tuple(self(*shape) for shape in shapes) for _ in range(count))


def table_of(setting: Pass, num_pages: int) -> PageTable:
    """All rows read and write the pages of one trajectory, in one A-group; the first row writes."""
    B, W = setting.B, -(-setting.S // setting.p)
    order = np.random.default_rng(0).permutation(num_pages)[:W] if num_pages >= W else np.arange(W) % num_pages
    pages = np.tile(order.astype(np.int32), (B, 1))
    row = np.full(B, setting.S, np.int32)
    write_from = np.where(np.arange(B) == 0, 0, generation.NEVER).astype(np.int32)
    zeros = np.zeros((1, B), np.int32)
    fields = {
        "q_starts": row - setting.T, "kv_lens": row, "base": pages, "base_write_from": write_from,
        "low_rank": pages[None], "low_rank_write_from": write_from[None], "group_ids": zeros, "read_slots": zeros[0],
    }  # fmt: skip
    return PageTable(**{name: jnp.asarray(array) for name, array in fields.items()}, recomputed=None)


# Operations, each as models/ has it.


def norms(x, weights, _):
    return rms_norm(x, Norm(weights[0], 1e-5))


def plain_projections(x, weights, _):
    q, k, v = (linear(x, kernel) for kernel in weights[:3])
    return kept(q, k, v)


def separate_projections(x, weights, shared):
    """q with its adapter, k, v, and v's low-rank half: what a layer computes."""
    w_q, w_k, w_v, a_q, b_q, a_v = weights
    group_of, ids = shared
    q = linear(x, w_q) + lora_delta(x, LoraPair(a_q, b_q), group_of, ids)
    return kept(q, linear(x, w_k), linear(x, w_v), shrink(x, a_v[group_of[ids]]))


def joined_projections(x, weights, shared, expand):
    """The same by one matrix [W_q | W_k | W_v | A_q | A_v] (one A-group), then the expanding of q."""
    w, b_q = weights
    r = b_q.shape[1]
    D = x.shape[-1]
    y = linear(x, w)
    q, k_v, low_rank_q, low_rank_v = jnp.split(y, [D, w.shape[1] - 2 * r, w.shape[1] - r], axis=-1)
    return kept(q + expand(low_rank_q, b_q, shared[1]), k_v, low_rank_v)


def gathered_expand(low_rank, lora_b, ids):
    return jnp.einsum("btr,bro->bto", low_rank, lora_b[ids])


def masked_expand(low_rank, lora_b, ids):
    """One product with all adapters' B, stacked; a row's numbers stand in its own adapter's place, zeros elsewhere."""
    A, r, out = lora_b.shape
    own = ids[:, None, None, None] == jnp.arange(A)[:, None]
    placed = jnp.where(own, low_rank[:, :, None], 0).reshape(*low_rank.shape[:2], A * r)
    return jnp.einsum("btx,xo->bto", placed, lora_b.reshape(A * r, out))


def rotate_and_write(setting: Pass):
    def function(state, new, shared):
        q, kv, low_rank_v = state
        k, v, low_rank = new
        rope, table = shared
        projections, cache = page_write.Projections(q, k, v), LayerCache(kv, low_rank_v, None)
        q, cache = cache_view.rotate_and_write(
            projections, page_write.Rotation(*rope), page_write.LowRank(v=low_rank), cache, table,
            setting.implementation,
        )  # fmt: skip
        return q, cache.kv, cache.low_rank_v

    return function


def attend(setting: Pass):
    def function(q, layer, shared):
        kv, low_rank_v, b_v = layer
        table, ids = shared
        if setting.T > 1:  # or XLA would expand a low-rank cache once for all calls that read it
            q, base = lax.optimization_barrier((q, table.base))
            table = dataclasses.replace(table, base=base)
        pairs = {"v": LoraPair(jnp.zeros((1, 1, b_v.shape[1]), b_v.dtype), b_v)}
        cache = LayerCache(kv, low_rank_v, None)
        return cache_view.attend(q, cache, pairs, table, ids, np.zeros(0, np.float32), setting.implementation)

    return function


def mlp(x, weights, _):
    gate, up, down = weights
    return linear(jax.nn.silu(linear(x, gate)) * linear(x, up), down)


def output_projection(x, weights, _):
    return linear(x, weights[0])


def lm_head(x, weights, _):
    """Of the rows' last tokens, scores in f32. Some of them are the next input."""
    logits = jnp.einsum("btd,dv->btv", x, weights[0], preferred_element_type=jnp.float32)
    return lax.optimization_barrier(logits)[..., : x.shape[-1]].astype(x.dtype)


def matmul_cost(setting: Pass, tokens: int, *shapes: tuple[int, int]) -> tuple[float, float]:
    """(bytes, FLOP) of products of so many tokens with matrices of these shapes."""
    weights = sum(i * o for i, o in shapes)
    moved = sum(tokens * (i + o) for i, o in shapes)
    return (weights + moved) * setting.itemsize, 2.0 * tokens * weights


def dense_operations(setting: Pass, random: Random) -> list[Operation]:
    config, (B, T, L) = setting.config, (setting.B, setting.T, setting.config.num_layers)
    D, V, M = config.width, config.vocab_size, setting.tokens
    shapes = config.projection_shapes()
    x, last = (random(B, tokens, D, scale=1.0) for tokens in (T, 1))
    mlp_shapes, o_shape = [shapes[name] for name in ("gate", "up", "down")], shapes["o"]
    return [
        Operation("norms", norms, x, ((random(D, scale=1.0),),), 2 * M * D * setting.itemsize, 0, 2 * L),
        Operation("o projection", output_projection, x, random.copies(setting, o_shape),
                  *matmul_cost(setting, M, o_shape), L),
        Operation("MLP", mlp, x, random.copies(setting, *mlp_shapes), *matmul_cost(setting, M, *mlp_shapes), L),
        Operation("lm head", lm_head, last, random.copies(setting, (D, V)), *matmul_cost(setting, B, (D, V)), 1),
    ]  # fmt: skip


def projection_operations(setting: Pass, random: Random) -> tuple[Operation, list[Operation]]:
    """What a layer does between its norm and rope, and other ways to do it or parts of it."""
    config, r, L = setting.config, setting.r, setting.config.num_layers
    D, A, M = config.width, 1 + setting.B, setting.tokens
    q, k, v = (config.projection_shapes()[name] for name in ("q", "k", "v"))
    x, low = random(setting.B, setting.T, D, scale=1.0), random(setting.B, setting.T, r, scale=1.0)
    a, b = (1, D, r), (A, r, q[1])
    joined = (D, q[1] + k[1] + v[1] + 2 * r)
    shared = (jnp.zeros(A, jnp.int32), jnp.arange(1, A, dtype=jnp.int32))
    plain, whole = matmul_cost(setting, M, q, k, v), matmul_cost(setting, M, joined)
    expanding = expand_cost(setting)
    whole = whole[0] + expanding[0], whole[1] + expanding[1]

    def one_matrix(expand):
        return lambda x, weights, shared: joined_projections(x, weights, shared, expand)

    def alone(expand):  # a slice of the result is the next input
        return lambda low, weights, shared: lax.optimization_barrier(expand(low, weights[0], shared[1]))[..., :r]

    def projections(name, function, weights):
        return Operation(f"q, k, v, adapters: {name}", function, x, weights, *whole, L, shared)

    together, expands = random.copies(setting, joined, b), random.copies(setting, b)
    today = random.copies(setting, q, k, v, a, b, a)
    return projections("separate matmuls (today)", separate_projections, today), [
        Operation("q, k, v without adapters", plain_projections, x, random.copies(setting, q, k, v), *plain, L),
        projections("one matrix, B gathered", one_matrix(gathered_expand), together),
        projections("one matrix, B masked", one_matrix(masked_expand), together),
        Operation("expand alone, B gathered", alone(gathered_expand), low, expands, *expanding, L, shared),
        Operation("expand alone, B masked", alone(masked_expand), low, expands, *expanding, L, shared),
    ]


def expand_cost(setting: Pass) -> tuple[float, float]:
    """Every row's B read once, its numbers and results moved once."""
    out = setting.config.num_heads * setting.config.head_dim
    moved = setting.B * setting.r * out + setting.tokens * (setting.r + out)
    return moved * setting.itemsize, 2.0 * setting.tokens * setting.r * out


def cache_operations(setting: Pass, random: Random) -> list[Operation]:
    config, (B, T, L) = setting.config, (setting.B, setting.T, setting.config.num_layers)
    N, K, H, r, p, M = config.num_heads, config.num_kv_heads, config.head_dim, setting.r, setting.p, setting.tokens
    q, k = random(B, T, N, H, scale=1.0), random(B, T, K, H, scale=1.0)
    rope = rotation(table_of(setting, 2).positions(T), inverse_frequencies(config))
    pages = -(-setting.S // p)
    token_bytes = (2 * K * H + r) * setting.itemsize
    written = ((k, k, random(1, B, T, r, scale=1.0)),)
    layers = random.copies(setting, (pages, K, p, 2 * H), (pages, r, p), (1 + B, r, K * H))
    ids = jnp.arange(1, 1 + B, dtype=jnp.int32)
    return [
        Operation("rope and page writes", rotate_and_write(setting),
                  (q, random(WRITTEN_PAGES, K, p, 2 * H), random(WRITTEN_PAGES, r, p)), written,
                  2 * (M * N * H * setting.itemsize + T * token_bytes), 0, L, (rope, table_of(setting, WRITTEN_PAGES))),
        Operation("attention", attend(setting), q, layers,
                  setting.S * token_bytes + 2 * M * N * H * setting.itemsize, 4 * setting.causal_pairs * N * H, L,
                  (table_of(setting, pages), ids)),
    ]  # fmt: skip


def seconds_of(operation: Operation, speed: DeviceSpeed, chain_s: float) -> float:
    floor = max(3e-6, speed.floor_s(operation.num_bytes, operation.flop))
    turns = max(1, round(chain_s / (CALLS * floor)))
    program = jax.jit(chain(operation.function, CALLS, turns))
    return median_seconds(lambda: program(operation.x, operation.weights, operation.shared)) / (1 + CALLS * turns)


# The whole pass.


def whole_pass(setting: Pass) -> Callable[[], jax.Array]:
    """One call of the program that the engine calls for a prefill chunk, what the host sends already on the device.

    A decode step is one of a single token.
    """
    config, dtype, A = setting.config, jnp.dtype(setting.dtype), 1 + setting.B
    graphdef, params = random_params(config, dtype)
    random = Random(setting.dtype)

    def pair(target):
        i, o = config.projection_shapes()[target]
        return LoraPair(random(1, i, setting.r), random(A, setting.r, o))

    layers = tuple({target: pair(target) for target in ("q", "v")} for _ in range(config.num_layers))
    bank = AdapterBank(layers, {target: jnp.zeros(A, jnp.int32) for target in ("q", "v")})
    pages = -(-setting.S // setting.p)

    def pools(*shape):
        return tuple(random(pages, *shape, scale=1.0) for _ in range(config.num_layers))

    kv = pools(config.num_kv_heads, setting.p, 2 * config.head_dim)
    cache = generation.Cache(BaseCache(kv), LowRankCache(pools(setting.r, setting.p), None))
    table = table_of(setting, pages)
    ids, tokens = jnp.arange(1, A, dtype=jnp.int32), jnp.ones((setting.B, setting.T), jnp.int32)
    state = [cache]

    def run() -> jax.Array:
        logits, _, state[0] = generation.prefill(
            graphdef, params, bank, state[0], tokens, ids, table,
            last_only=generation.has_last_only(setting.T), implementation=setting.implementation,
        )  # fmt: skip
        return logits

    return run


def kernel_seconds(run: Callable[[], jax.Array]) -> list[tuple[str, float]]:
    """Seconds of the kinds of kernels that took longest in one `run`, as the profiler saw them; none on a CPU."""
    jax.block_until_ready(run())
    seconds: dict[str, float] = {}
    for kernel in traced_kernels(run):
        name = re.sub(r"[._]?\d+$", "", kernel.name)[:60]
        seconds[name] = seconds.get(name, 0.0) + (kernel.stop - kernel.start) * 1e-9
    return sorted(seconds.items(), key=lambda item: -item[1])[:12]


# The products of a decode step, by two ways.


def measure_products(setting: Pass, speed: DeviceSpeed, chain_s: float) -> list[dict[str, Any]]:
    """Those of setting.B rows: errors first, then times, the kernel's only where it is right and refuses nothing."""
    B, D, random = setting.B, setting.config.width, Random(setting.dtype)
    shared = Shared(random(D, scale=1.0), random(B, D, scale=1.0))
    reports, reasons = [], []
    for one in comparisons(setting.config):
        num_bytes, flop = one.cost(B, setting.itemsize)
        two_sets = setting._replace(cycled_bytes=max(setting.cycled_bytes, num_bytes))  # at least
        x, weights = random(B, one.products[0].width, scale=1.0), random.copies(two_sets, *one.shapes)
        if len(one.products) == 1:
            checked = one.products[0].check(x, weights[0], shared)
            reason = checked["kernel_not_timed"]
            reasons += [reason] if reason else []
        else:  # the ones before
            checked, reason = {}, reasons[0] if reasons else None
        ways = {"xla_us": by_xla} if reason else {"xla_us": by_xla, "kernel_us": by_kernel}
        operations = {
            key: Operation(one.name, one.repeated(way), x, weights, num_bytes, flop, setting.config.num_layers, shared)
            for key, way in ways.items()
        }
        times = {key: seconds_of(operation, speed, chain_s) for key, operation in operations.items()}
        times["floor_us"] = speed.floor_s(num_bytes, flop)
        reports.append({"name": one.name, "rows": B} | {key: round(s * 1e6, 4) for key, s in times.items()}
                       | checked | {"kernel_not_timed": reason})  # fmt: skip
    return reports


# What is shown.


def measure(setting: Pass, speed: DeviceSpeed, chain_s: float, trace: bool) -> dict[str, Any]:
    random = Random(setting.dtype)
    of_layer, others = projection_operations(setting, random)
    operations = [*dense_operations(setting, random), of_layer, *cache_operations(setting, random)]

    def measured(operation: Operation) -> dict[str, Any]:
        seconds = seconds_of(operation, speed, chain_s)
        floor = speed.floor_s(operation.num_bytes, operation.flop)
        figures = {"us": seconds * 1e6, "floor_us": floor * 1e6, "ms_per_pass": seconds * 1e3 * operation.per_pass}
        return {"name": operation.name} | {name: round(value, 4) for name, value in figures.items()}

    rows, other_ways = [measured(one) for one in operations], [measured(one) for one in others]
    del random, of_layer, others, operations
    run = whole_pass(setting)
    whole = median_seconds(run, runs=1 if setting.T > 1 else 5)
    kernels = kernel_seconds(run) if trace else []
    return {
        "B": setting.B, "T": setting.T, "S": setting.S, "operations": rows, "other_ways": other_ways,
        "sum_ms": round(sum(row["ms_per_pass"] for row in rows), 3), "whole_ms": round(whole * 1e3, 3),
        "kernels_ms": {name: round(seconds * 1e3, 3) for name, seconds in kernels},
    }  # fmt: skip


def show(report: dict[str, Any]) -> None:
    title = (
        f"B={report['B']} T={report['T']} S={report['S']}: {report['whole_ms']} ms, operations {report['sum_ms']} ms"
    )
    table = Table(title=title, box=None)
    for column in ("operation", "µs", "floor µs", "x floor", "ms per pass", "share"):
        table.add_column(column, justify="left" if column == "operation" else "right")
    for row in (*report["operations"], *report["other_ways"]):
        shown = row in report["operations"]
        ratio = f"{row['us'] / row['floor_us']:.2f}" if row["floor_us"] else ""
        share = f"{row['ms_per_pass'] / report['sum_ms']:.1%}" if shown and report["sum_ms"] else ""
        name = row["name"] if shown else f"  or: {row['name']}"
        table.add_row(name, f"{row['us']:.1f}", f"{row['floor_us']:.1f}", ratio, f"{row['ms_per_pass']:.3f}", share)
    for name, milliseconds in report["kernels_ms"].items():
        table.add_row(f"  kernel: {name}", "", "", "", f"{milliseconds:.3f}", "")
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="of the whole pass; all of the preset's by default")
    parser.add_argument("--batch", type=int, default=8, help="agents in the decode step; 0: no such pass")
    parser.add_argument("--context", type=int, default=16_384)
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of the prefill chunk; 0: no such pass")
    parser.add_argument(
        "--product-rows",
        type=int,
        nargs="*",
        default=[1, 8],
        metavar="ROWS",
        help="of the decode steps whose products XLA and row_matmul's kernel do; none: no such table",
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--implementation", help="of attention; the first that fits by default")
    parser.add_argument("--cycle", type=float, default=200e6, help="bytes of weights or caches to cycle through")
    parser.add_argument("--chain", type=float, default=10e-3, help="seconds that one measurement lasts, about")
    parser.add_argument("--trace", action="store_true", help="list the kernels that the profiler sees, too")
    arguments = parser.parse_args()
    config = LlamaConfig.preset(arguments.preset)
    if arguments.layers is not None:
        config = dataclasses.replace(config, num_layers=arguments.layers)
    speed = measure_device()
    print(f"{jax.devices()[0].device_kind}: {speed.bytes_per_s / 1e9:.0f} GB/s, {speed.flop_per_s / 1e9:.0f} GFLOP/s",
          file=sys.stderr, flush=True)  # fmt: skip

    def setting(B, T):
        return Pass(config, B, T, arguments.context, arguments.rank, arguments.page_size, arguments.dtype,
                    arguments.implementation, arguments.cycle)  # fmt: skip

    passes, products = [], []
    for B, T in ((arguments.batch, 1), (1, arguments.chunk)):
        if B and T:
            passes.append(measure(setting(B, T), speed, arguments.chain, arguments.trace))
            show(passes[-1])
    for B in arguments.product_rows:
        products += measure_products(setting(B, 1), speed, arguments.chain)
    if products:
        Console(width=120).print(products_table(products))
    print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "preset": arguments.preset,
                      **speed._asdict(), "passes": passes, "products": products}))  # fmt: skip


if __name__ == "__main__":
    main()
