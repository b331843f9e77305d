"""Compiles the attention kernels and the engine's programs for TPUs that are not there, and says what came out.

Regime: libtpu's own compiler against a description of a slice, on any machine with `pip install "jax[tpu]"`; nothing
runs. Kernels: every configuration of the heuristic. Programs: `prefill` of a chunk and `decode` of Llama-3.1-8B and 70B
under tensor parallelism, and of Llama-3.2-1B, caches donated, adapters on q and v (or --targets). Per program: compile
time, HBM of one device against its capacity, VMEM of the kernels, collectives of a step by kind, operations that copy a
cache. Collectives: those of one layer with adapters on all projections against those without. A roofline on paper for
LRAgent's trace closes it. Exits with 1 if anything did not compile or fit, copies a cache, has temporaries as large as
one, or pads its arguments, or if adapters add a collective. The last line of standard output is one line of JSON.

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
from lragent_jax.measure.tpu_report import collectives, faults, report
from lragent_jax.models.adapter_bank import TARGETS
from lragent_jax.models.config import LlamaConfig


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def failure(what: str, reason: str) -> dict:
    say(f"{what}: FAILED: {reason.splitlines()[0][:300]}")
    return {"error": reason[:2000]}


def outcome(what: str, lower, arguments, caches, hbm: int) -> dict:
    """The report of one program, or the compiler's reason; a program over HBM or VMEM is refused by the compiler."""
    started = time.perf_counter()
    try:
        compiled = lower().compile()
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        return failure(what, str(error))
    result = report(compiled, arguments, caches, hbm) | {"compile_s": time.perf_counter() - started}
    if found := faults(result):
        return result | failure(what, "; ".join(found))
    say(f"{what}: {result['compile_s']:.1f} s, {result['hbm_share']:.0%} of HBM, {result['temporaries']:,} B temporary")
    return result


def compile_kernels(chip: str) -> dict[str, dict]:
    device = slice_devices(chip, "1x1x1" if chip in ("v5p", "tpu7x") else "1x1")[:1]
    results = {}
    for shape in heuristic_shapes():
        case = KernelShape(model_mesh(device), *shape)
        results[str(case)] = outcome(f"{chip} {case}", case.lower, case.arguments(), case.caches(), CHIPS[chip].hbm)
    return results


def weight_bytes(config: LlamaConfig, itemsize: int = 2) -> int:
    linear = config.num_layers * sum(a * b for a, b in config.projection_shapes().values())
    tables = 1 if config.tied_embeddings else 2
    return (linear + tables * config.vocab_size * config.width) * itemsize


def fitting_pages(workload: Workload, hbm: int) -> int:
    """Pages that fill HBM to nine tenths, beside the weights."""
    devices = workload.mesh.size
    config, itemsize = workload.config, 2
    page = workload.page_size * (
        config.base_cache_bytes_per_token(itemsize) // devices
        + config.low_rank_cache_bytes_per_token(workload.rank, itemsize)
    )
    return int(0.9 * hbm - weight_bytes(config, itemsize) // devices) // page


def why_not(chip: str, preset: str) -> str:
    """Why `SLICES` has no slice of this chip for this model."""
    config, hbm = LlamaConfig.preset(preset), CHIPS[chip].hbm
    most = config.num_kv_heads
    share = weight_bytes(config) // most
    return f"{most} kv heads, so {most} devices at most, {share:,} bytes of weights on each, and each has {hbm:,}"


def compile_programs(chip: str, preset: str, arguments) -> dict[str, dict]:
    config = LlamaConfig.preset(preset)
    if chip not in SLICES[preset]:
        return {"prefill, decode": failure(f"{preset} on {chip}", why_not(chip, preset)) | {"devices": 0}}
    chips, devices = SLICES[preset][chip]
    if arguments.layers:
        config = dataclasses.replace(config, num_layers=arguments.layers)
    targets = tuple(target for target in arguments.targets.split(",") if target)
    workload = Workload(config, model_mesh(slice_devices(chip, chips)[:devices]), targets=targets)
    workload = dataclasses.replace(workload, pages=min(8192, fitting_pages(workload, CHIPS[chip].hbm)))
    return {
        program: outcome(
            f"{preset} {program} on {devices} devices of {chip}:{chips}, {workload.pages} pages",
            lambda program=program: workload.lower(program),
            workload.arguments(program), workload.caches(), CHIPS[chip].hbm,
        ) | {"devices": devices, "pages": workload.pages}
        for program in ("prefill", "decode")
    }  # fmt: skip


def compare_collectives(chip: str, preset: str) -> dict[str, dict]:
    """One layer with adapters on every projection against one without. Its vocabulary is cut: sampling takes long."""
    chips, devices = SLICES[preset][chip]
    config = dataclasses.replace(LlamaConfig.preset(preset), num_layers=1, vocab_size=1024)
    plain = Workload(config, model_mesh(slice_devices(chip, chips)[:devices]), targets=(), pages=1024)
    results = {}
    for program in ("prefill", "decode"):
        without, adapted = (
            collectives(workload.lower(program).compile())
            for workload in (plain, dataclasses.replace(plain, targets=TARGETS))
        )
        what = f"collectives of a layer of {preset} in {program} on {devices} devices of {chip}"
        say(f"{what}: {adapted}")
        results[program] = {"without": without, "adapted": adapted}
        if adapted != without:
            results[program] |= failure(what, f"with adapters {adapted}, without {without}")
    return results


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default=",".join(CHIPS), help="comma-separated")
    parser.add_argument("--presets", help="comma-separated; unless named, each on the chips that hold it")
    parser.add_argument("--what", default="kernels,programs,collectives,roofline", help="comma-separated")
    parser.add_argument("--targets", default="q,v", help="projections that adapters adapt; empty for none")
    parser.add_argument("--layers", type=int, help="compile models of so many layers only")
    arguments = parser.parse_args()
    chips, what = arguments.chips.split(","), arguments.what.split(",")
    presets = arguments.presets.split(",") if arguments.presets else list(SLICES)

    kernels, programs, compared, rooflines = {}, {}, {}, {}
    for chip in chips:
        if "kernels" in what:
            kernels |= {f"{chip} {shape}": result for shape, result in compile_kernels(chip).items()}
        for preset in presets:
            held = chip in SLICES[preset]
            if "programs" in what and (held or arguments.presets):
                for program, result in compile_programs(chip, preset, arguments).items():
                    programs[f"{chip} {preset} {program}"] = result
            if "collectives" in what and held and SLICES[preset][chip][1] > 1:
                for program, result in compare_collectives(chip, preset).items():
                    compared[f"{chip} {preset} {program}"] = result
            if "roofline" in what and held:
                rooflines[f"{chip} {preset}"] = predictions(chip, preset, rank=16)
    print_tables(programs, rooflines)
    results = [*kernels.values(), *programs.values(), *compared.values()]
    num_failed = sum("error" in result for result in results)
    print(f"{len(results) - num_failed} of {len(results)} hold what they must")
    groups = {"kernels": kernels, "programs": programs, "collectives": compared, "rooflines": rooflines}
    print(json.dumps({"jax": jax.__version__} | groups))
    sys.exit(num_failed > 0)


if __name__ == "__main__":
    main()
