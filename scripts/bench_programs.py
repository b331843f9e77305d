"""The engine's compiled programs under other compiler options, and with `kernels/row_matmul` or not, side by side.

Regime: random weights with the shapes of Llama-3.1-8B, bfloat16, adapters of rank 8 on q and v, sharing `base_lr`, one
trajectory, greedy decoding, the host included, medians over `--repeats` calls, eight times as many of few tokens. Three
things that a call is made of: milliseconds per step of a decode block (`--steps` of them) on a short context; the time
to the first token of a few tokens behind a context, which is small work in many kernels; and that of a whole chunk.
Figures stand beside those of the first variant, which is how the engine comes. Each is compiled from nothing. One that
the compiler refuses says so. `same tokens` counts those of a greedy and of a sampled output that are the first
variant's, up to the first that is not: with the same kernels it should be all of them.

Candidates (`--variant NAME` takes some of them):

* `graphs in prefill`: XLA can put what it launches into CUDA graphs, and brings them up to date when an argument has
  moved, which is once in every call of a prefill and once in a block of steps. Prefill comes without.
* `no graphs`: decode without them, too: every kernel is launched by itself.
* `sampling in a graph`: whether a row samples or takes the likeliest token is decided in a graph. Otherwise the host
  looks, in every step.
* `loop in a graph`: a block's loop is put into a graph with its body and that decision. Then the host looks at nothing
  until the block is over.
* `kernels outside graphs`: XLA's own kernels are put into graphs, ours are not: they go into one by being captured anew
  whenever an argument has moved.
* `cublasLt in prefill`: products by cublasLt, which can add to what is there.
* `fusions by cuDNN in prefill`: cuDNN may do a product together with what stands around it, where that is faster.
* `xla products`: a step's products and what stands around them by XLA's operations, where kernels of our own do them.
* `row products of 16`: by those kernels for up to 16 rows, so that a few tokens take them, too.

The last line of standard output is one line of JSON.

    python scripts/bench_programs.py
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from lragent_jax import generation
from lragent_jax.device_jit import NO_CUDA_GRAPHS
from lragent_jax.engine import Engine
from lragent_jax.kernels.row_matmul import dispatch as row_matmul
from lragent_jax.measure.bench_model import BenchModel
from lragent_jax.measure.trace_run import Figures, clean_runs, decode_step, exactly, prefill_seconds, random_ids
from lragent_jax.models.config import LlamaConfig
from lragent_jax.sampling_params import SamplingParams

GRAPHS = {"xla_gpu_graph_min_graph_size": "5"}  # as XLA does it, left alone
LOOP_IN_A_GRAPH = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,WHILE",
}
SAMPLING_IN_A_GRAPH = {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL"}
CUBLASLT = {"xla_gpu_enable_cublaslt": "True"}
CUDNN_FUSIONS = {"xla_gpu_cudnn_gemm_fusion_level": "3"}
KERNELS_OUTSIDE = {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN"}

FEW_PER_REPEAT = 8  # these calls are short, and differ from each other by a tenth


class Variant(NamedTuple):
    """Compiler options of the two programs, and for how many rows they may take `kernels/row_matmul`."""

    prefill: Mapping[str, str] = {}
    decode: Mapping[str, str] = {}
    most_rows: int = row_matmul.MOST_ROWS_BY_DEFAULT


AS_IT_COMES = "as it comes"
VARIANTS = {
    AS_IT_COMES: Variant(),
    "graphs in prefill": Variant(prefill=GRAPHS),
    "no graphs": Variant(decode=NO_CUDA_GRAPHS),
    "sampling in a graph": Variant(decode=SAMPLING_IN_A_GRAPH),
    "loop in a graph": Variant(decode=LOOP_IN_A_GRAPH),
    "kernels outside graphs": Variant(decode=KERNELS_OUTSIDE),
    "cublasLt in prefill": Variant(prefill=CUBLASLT),
    "fusions by cuDNN in prefill": Variant(prefill=CUDNN_FUSIONS),
    "xla products": Variant(most_rows=0),
    "row products of 16": Variant(most_rows=16),
}


class Sizes(NamedTuple):
    """Tokens: of a decode block, of the context behind which few tokens come, of those, and of a whole chunk."""

    steps: int
    context: int
    few: int
    chunk: int
    repeats: int
    page_size: int

    @property
    def longest(self) -> int:
        """What a trajectory grows to while it is measured."""
        calls = (FEW_PER_REPEAT * self.repeats + 8) * (self.few + 1), (self.repeats + 8) * (self.steps + 1)
        return max(self.context, self.chunk) + max(calls)


@contextlib.contextmanager
def applied(variant: Variant) -> Iterator[None]:
    """What is compiled meanwhile is compiled so, and nothing is taken over from before: neither programs nor traces."""
    with contextlib.ExitStack() as stack:
        jax.clear_caches()
        stack.callback(jax.clear_caches)
        for program, options in ((generation.prefill, variant.prefill), (generation.decode, variant.decode)):
            if options:
                stack.enter_context(program.compiled_with(options))
        stack.callback(setattr, row_matmul, "MOST_ROWS_BY_DEFAULT", row_matmul.MOST_ROWS_BY_DEFAULT)
        row_matmul.MOST_ROWS_BY_DEFAULT = variant.most_rows
        yield


def outputs(engine: Engine, agent: str, num_tokens: int) -> list[list[int]]:
    """A greedy one, and one that is drawn, behind the same prompt."""
    drawn = SamplingParams(max_new_tokens=num_tokens, temperature=1.0, seed=0, ignore_eos=True)
    return [engine.generate(random_ids(engine, 24), agent, how).token_ids for how in (exactly(num_tokens), drawn)]


def num_same(found: list[list[int]], expected: list[list[int]]) -> list[int]:
    """Of each output the tokens before the first that differs."""
    pairs = [zip(*both, strict=True) for both in zip(found, expected, strict=True)]
    return [len(list(itertools.takewhile(lambda both: both[0] == both[1], pair))) for pair in pairs]


def measure(model: BenchModel, sizes: Sizes) -> tuple[Figures, list[list[int]]]:
    """Milliseconds of a decode step, of few tokens and of a chunk, and seconds that compiling took, of a new engine.

    And its `outputs`.
    """
    pages = -(-sizes.longest // sizes.page_size) + 2
    engine = model.engine(
        "base_lr", sizes.longest, num_pages=pages, num_low_rank_pages=pages, page_size=sizes.page_size,
        prefill_buckets=sorted({16, sizes.chunk}), decode_block=sizes.steps, prefix_cache=False,
    )  # fmt: skip
    times = engine.warmup(scoring=False)
    agent = model.agents[0]
    found, tokens = {"compile_s": times.lower_s + times.compile_s}, outputs(engine, agent, sizes.steps)

    with engine.trajectory() as trajectory:
        trajectory.append(random_ids(engine, sizes.few))
        found["step_ms"] = decode_step(engine, [trajectory], [agent], sizes.steps, sizes.repeats)["ms"]
    with engine.trajectory() as trajectory:
        trajectory.append(random_ids(engine, sizes.context))
        engine.generate(trajectory, agent, exactly(1))

        def few() -> Figures:
            trajectory.append(random_ids(engine, sizes.few))
            return {"few_ms": 1e3 * engine.generate(trajectory, agent, exactly(1)).ttft_s}

        found |= clean_runs(few, FEW_PER_REPEAT * sizes.repeats).medians
    return found | {"chunk_ms": 1e3 * prefill_seconds(engine, agent, sizes.chunk, sizes.repeats)}, tokens


def run(model: BenchModel, sizes: Sizes, names: list[str]) -> dict[str, Any]:
    """The figures of every variant, or why there are none."""
    results: dict[str, Any] = {}
    expected: list[list[int]] | None = None
    for name in names:
        print(f"{name}: compiling and running", file=sys.stderr, flush=True)
        try:
            with applied(VARIANTS[name]):
                found, tokens = measure(model, sizes)
            if expected is None:
                expected = tokens
            results[name] = found | {"same_tokens": num_same(tokens, expected)}
        except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
            results[name] = {"refused": str(error).splitlines()[0]}
    return results


def show(results: dict[str, Any]) -> None:
    """A table: figures, and how many times those of the first variant that has some."""
    columns = {"step_ms": "decode step", "few_ms": "a few tokens", "chunk_ms": "a chunk", "compile_s": "compiling, s"}
    title = "milliseconds, and times those of the first that ran"
    table = Table("variant", *columns.values(), "same tokens", title=title)
    first = next((figures for figures in results.values() if "step_ms" in figures), None)
    for name, figures in results.items():
        if "refused" in figures or first is None:
            table.add_row(name, figures.get("refused", ""))
            continue
        times = [f"{figures[key]:.3f} ({figures[key] / (first[key] or 1):.3f})" for key in columns]
        table.add_row(name, *times, " and ".join(map(str, figures["same_tokens"])))
    Console(stderr=True, width=140).print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--variant", action="append", choices=[*VARIANTS], help="may be repeated (default: all)")
    parser.add_argument("--preset", default="llama-3.1-8b", help="shapes of the model")
    parser.add_argument("--layers", type=int, help="so many of them")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=64, help="of a decode block")
    parser.add_argument("--context", type=int, default=4096, help="tokens behind which a few come")
    parser.add_argument("--few", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    config = LlamaConfig.preset(arguments.preset)
    if arguments.layers is not None:
        config = dataclasses.replace(config, num_layers=arguments.layers)
    sizes = Sizes(
        arguments.steps, arguments.context, arguments.few, arguments.chunk, arguments.repeats, arguments.page_size
    )  # fmt: skip
    results = run(BenchModel(config, arguments.dtype, arguments.rank), sizes, arguments.variant or [*VARIANTS])
    show(results)
    device = jax.devices()[0].device_kind
    print(json.dumps({"device": device, "jax": jax.__version__, "sizes": sizes._asdict(), "variants": results}))


if __name__ == "__main__":
    main()
