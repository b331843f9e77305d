"""Compiles the attention kernels and the engine's programs for TPUs that are not there, and says what came out.

Regime: libtpu's own compiler against a description of a slice, on any machine with `pip install "jax[tpu]"`; nothing
runs. Kernels: every configuration of the heuristic. Programs: `prefill` of a chunk and `decode` of Llama-3.1-8B and 70B
under tensor parallelism, caches donated, adapters on q and v (or --targets). Per program: compile time, HBM of one
device against its capacity, VMEM of the kernels, collectives of a step by kind, operations that copy a cache. A
roofline on paper for LRAgent's trace closes it. Exits with 1 if anything did not compile, does not fit, or copies a
cache. The last line of standard output is one line of JSON.

    python scripts/compile_tpu.py --chips v5e,v6e --what kernels,roofline
"""

import argparse
import dataclasses
import json
import os
import sys
import time

# Whatever accelerators there are stay out of it: decided before JAX is imported.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from rich.console import Console
from rich.table import Table

from lragent_jax.measure.roofline import MODES, Roofline, predict
from lragent_jax.measure.tpu_chips import CHIPS, SLICES
from lragent_jax.measure.tpu_programs import KernelShape, Workload, heuristic_shapes, model_mesh, slice_devices
from lragent_jax.measure.tpu_report import report
from lragent_jax.models.config import LlamaConfig


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def outcome(what: str, lower, pools, hbm: int) -> dict:
    """The report of one program, or the compiler's reason; a program over HBM or VMEM is refused by the compiler."""
    started = time.perf_counter()
    try:
        compiled = lower().compile()
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        say(f"{what}: FAILED: {str(error).splitlines()[0][:300]}")
        return {"error": str(error)[:2000]}
    result = report(compiled, pools, hbm) | {"compile_s": time.perf_counter() - started}
    say(f"{what}: {result['compile_s']:.1f} s, {result['hbm_share']:.0%} of HBM, {result['cache_copies']} cache copies")
    return result


def compile_kernels(chip: str) -> dict[str, dict]:
    device = slice_devices(chip, "1x1x1" if chip in ("v5p", "tpu7x") else "1x1")[:1]
    results = {}
    for shape in heuristic_shapes():
        case = KernelShape(model_mesh(device), *shape)
        results[str(case)] = outcome(f"{chip} {case}", case.lower, case.pools(), CHIPS[chip].hbm)
    return results


def fitting_pages(workload: Workload, hbm: int) -> int:
    """Pages that fill HBM to nine tenths, beside the weights."""
    devices = workload.mesh.size
    config, itemsize = workload.config, 2
    page = workload.page_size * (
        config.base_cache_bytes_per_token(itemsize) // devices
        + config.low_rank_cache_bytes_per_token(workload.rank, itemsize)
    )
    linear = config.num_layers * sum(a * b for a, b in config.projection_shapes().values())
    weights = (linear + 2 * config.vocab_size * config.width) * itemsize // devices
    return int(0.9 * hbm - weights) // page


def compile_programs(chip: str, preset: str, arguments) -> dict[str, dict]:
    chips, devices = SLICES[preset][chip]
    config = LlamaConfig.preset(preset)
    if arguments.layers:
        config = dataclasses.replace(config, num_layers=arguments.layers)
    targets = tuple(target for target in arguments.targets.split(",") if target)
    workload = Workload(config, model_mesh(slice_devices(chip, chips)[:devices]), targets=targets)
    workload = dataclasses.replace(workload, pages=min(8192, fitting_pages(workload, CHIPS[chip].hbm)))
    return {
        program: outcome(
            f"{preset} {program} on {devices} devices of {chip}:{chips}, {workload.pages} pages",
            lambda program=program: workload.lower(program), workload.cache(), CHIPS[chip].hbm,
        ) | {"devices": devices, "pages": workload.pages}
        for program in ("prefill", "decode")
    }  # fmt: skip


def predictions(chip: str, preset: str, rank: int) -> dict[str, dict]:
    devices = SLICES[preset][chip][1]
    roofline = Roofline(CHIPS[chip], devices, LlamaConfig.preset(preset), rank)
    return {mode: predict(roofline, mode, chunk=8192) | {"devices": devices} for mode in MODES}


def print_tables(programs: dict, rooflines: dict) -> None:
    console = Console(width=150)
    table = Table(title="compiled programs, per device")
    memory = ("arguments GB", "temporaries MB", "HBM", "VMEM MB")
    for column in ("program", "devices", "compile s", *memory, "collectives of a step", "cache copies"):
        table.add_column(column, justify="right")
    for name, result in programs.items():
        if "error" in result:
            table.add_row(name, str(result["devices"]), "FAILED", *[""] * 6)
            continue
        kinds = ", ".join(f"{v['count']} {k} {v['bytes'] / 1e6:.2f} MB" for k, v in result["collectives"].items())
        table.add_row(
            name, str(result["devices"]), f"{result['compile_s']:.0f}", f"{result['arguments'] / 1e9:.2f}",
            f"{result['temporaries'] / 1e6:.1f}", f"{result['hbm_share']:.0%}",
            f"{max(result['vmem'].values(), default=0) / 1e6:.1f}", kinds or "none", str(result["cache_copies"]),
        )  # fmt: skip
    if programs:
        console.print(table)
    table = Table(title="roofline of the trace at 33,680 tokens (least possible, on paper)")
    for column in ("chip", "devices", "sharing", "prefilled", "TTFT s", "decode ms", "tokens/s"):
        table.add_column(column, justify="right")
    for name, modes in rooflines.items():
        for mode, r in modes.items():
            table.add_row(name, str(r["devices"]), mode, f"{r['prefilled_tokens']:,}", f"{r['ttft_s']:.3f}",
                          f"{r['decode_ms_per_token']:.2f}", f"{r['tokens_per_s']:,.0f}")  # fmt: skip
    if rooflines:
        console.print(table)


def failed(result: dict) -> bool:
    return "error" in result or result["hbm_share"] > 1 or result["cache_copies"] > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default=",".join(CHIPS), help="comma-separated")
    parser.add_argument("--presets", default=",".join(SLICES), help="comma-separated")
    parser.add_argument("--what", default="kernels,programs,roofline", help="comma-separated")
    parser.add_argument("--targets", default="q,v", help="projections that adapters adapt; empty for none")
    parser.add_argument("--layers", type=int, help="compile models of so many layers only")
    arguments = parser.parse_args()
    chips, presets, what = (value.split(",") for value in (arguments.chips, arguments.presets, arguments.what))

    kernels, programs, rooflines = {}, {}, {}
    for chip in chips:
        if "kernels" in what:
            kernels[chip] = compile_kernels(chip)
        for preset in (preset for preset in presets if chip in SLICES[preset]):
            if "programs" in what:
                for program, result in compile_programs(chip, preset, arguments).items():
                    programs[f"{chip} {preset} {program}"] = result
            if "roofline" in what:
                rooflines[f"{chip} {preset}"] = predictions(chip, preset, rank=16)
    print_tables(programs, rooflines)
    results = [*programs.values(), *(result for of_chip in kernels.values() for result in of_chip.values())]
    num_failed = sum(map(failed, results))
    print(f"{len(results) - num_failed} of {len(results)} programs compiled, fit and copy no cache")
    print(json.dumps({"jax": jax.__version__, "kernels": kernels, "programs": programs, "rooflines": rooflines}))
    sys.exit(num_failed > 0)


if __name__ == "__main__":
    main()
