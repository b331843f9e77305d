"""Measures what each sharing mode costs in accuracy, on a world that the agents have not seen.

    python scripts/study.py --adapters shared_a=FOLDER --adapters apart=FOLDER --adapters all=FOLDER --out RESULTS.json
    python scripts/study.py --reduced --out RESULTS.json     (the embedded agents; a quarter of an hour on two cores)
    python scripts/study.py --report --out RESULTS.json --docs docs

Every FOLDER holds the adapters plan, action and reflect. Regime: greedy, static batches of episodes that the agents run
freely, tools answering; KL, top-1 agreement and likelihood are teacher-forced, one trajectory at a time. Everything
that is finished is in RESULTS.json, and the same command goes on from there. `--report` writes tables and plots from
that file alone. Several devices share a study by measuring different `--modes`, `--kinds` or `--parts`, each into a
file of its own, which `--merge FILE …` then puts together in RESULTS.json. Agents that were trained anew are others:
`--drop KIND …` forgets what RESULTS.json has of the old ones. The last line on standard output is JSON.

Recorded trajectories, in the form of `lragent replay`, are trained on and measured on in two steps:

    python scripts/study.py --write-recorded FILE.json --out FOLDER
    (lragent train …: plan, action and reflect from FOLDER, --kind shared_a)
    python scripts/study.py --recorded FILE.json --recorded-adapters ADAPTERS --parts recorded --out RESULTS.json
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lragent_jax import compilation_cache
from lragent_jax.cli.console import labelled, progress_bar
from lragent_jax.embedded import ADAPTERS, find_model
from lragent_jax.models.errors import InputError, LRAgentError
from lragent_jax.models.folder import read_config
from lragent_jax.react import read_trajectories
from lragent_jax.sharing import SHARING_MODES
from lragent_jax.study import recorded
from lragent_jax.study.agent_set import MAIN_KIND, RECORDED_KIND, read_agents
from lragent_jax.study.deadline import Deadline
from lragent_jax.study.plan import FULL, REDUCED, REDUCED_MODES, STUDY_PARTS
from lragent_jax.study.report import write_report
from lragent_jax.study.results import Results
from lragent_jax.study.study import RecordedStudy, Study
from lragent_jax.study.workbench import BenchOptions, Workbench
from lragent_jax.tokenizer import load_tokenizer


def main(argv: list[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    try:
        if arguments.merge:
            outcome = _merge(arguments)
        elif arguments.drop:
            outcome = _drop(arguments)
        elif arguments.report:
            outcome = {"written": [str(path) for path in write_report(Results.existing(arguments.out), arguments.docs)]}
        elif arguments.write_recorded:
            outcome = _write_recorded(arguments)
        else:
            outcome = _measure(arguments)
    except LRAgentError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(outcome))


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    deadline = Deadline(arguments.deadline)
    model = arguments.model or find_model()
    default_modes = REDUCED_MODES if arguments.reduced else SHARING_MODES
    parts = _names(arguments.parts, STUDY_PARTS)
    modes = _names(arguments.modes or ",".join(default_modes), SHARING_MODES)
    config, scale = read_config(model), REDUCED if arguments.reduced else FULL
    if arguments.questions:
        scale = scale.with_questions(arguments.questions)
    folders = dict(_pair(pair) for pair in arguments.adapters)
    if not folders and not arguments.recorded_adapters:
        folders = {MAIN_KIND: ADAPTERS}
    chosen = _names(arguments.kinds, tuple(folders)) if arguments.kinds else list(folders)
    if arguments.main not in folders and arguments.main != MAIN_KIND:
        raise InputError(f"--main {arguments.main} is none of the --adapters: {', '.join(folders) or 'none'}")
    sets = [read_agents(name, folders[name], config, arguments.main) for name in chosen]
    recorded_study = None
    if bool(arguments.recorded_adapters) != bool(arguments.recorded):
        raise InputError("--recorded and --recorded-adapters belong together: give both or neither")
    if arguments.recorded_adapters:
        agents = read_agents(RECORDED_KIND, arguments.recorded_adapters, config)
        recorded_study = RecordedStudy(agents, read_trajectories(arguments.recorded))
    results = Results(arguments.out, fresh=arguments.fresh)
    buckets = tuple(map(int, arguments.prefill_buckets.split(","))) if arguments.prefill_buckets else None
    options = BenchOptions.fitting(
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        pool_gigabytes=arguments.pool_gigabytes,
        page_size=arguments.page_size,
        prefill_buckets=buckets,
        prefill_batch_size=arguments.prefill_batch_size,
        decode_block=arguments.decode_block,
        implementation=arguments.implementation,
    )
    compilation_cache.enable()
    with progress_bar() as progress:
        bench = Workbench(model, options, scale.longest, labelled(progress, "reading the model"))
        study = Study(
            bench, sets, results, scale,
            modes=modes, seed=arguments.seed, recorded=recorded_study, deadline=deadline, progress=progress,
        )  # fmt: skip
        finished = study.run(parts)
    return {"finished": finished, "cells": {part: len(cells) for part, cells in results.data["cells"].items()}}


def _merge(arguments: argparse.Namespace) -> dict[str, Any]:
    others = [Results.existing(other) for other in arguments.merge]  # all of them, before one is merged
    results = Results(arguments.out, fresh=arguments.fresh)
    for other in others:
        results.merge(other)
    return {"cells": {part: len(cells) for part, cells in results.data["cells"].items()}}


def _drop(arguments: argparse.Namespace) -> dict[str, Any]:
    results = Results.existing(arguments.out)
    results.drop(arguments.drop)
    return {"kinds": list(results.data["kinds"])}


def _write_recorded(arguments: argparse.Namespace) -> dict[str, Any]:
    model = arguments.model or find_model()
    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        raise InputError(f"{model} has no tokenizer to count tokens with")
    training, held_out = recorded.split(read_trajectories(arguments.write_recorded))
    room = read_config(model).context_length
    lines = recorded.write_examples(training, Path(arguments.out), tokenizer, room)
    return {"training": len(training), "held_out": len(held_out), "lines": lines}


def _names(text: str, known: tuple[Any, ...]) -> list[Any]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"unknown: {', '.join(unknown)}; there are: {', '.join(known) or 'none'}")
    return list(dict.fromkeys(names))


def _pair(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise InputError(f"{text!r} is not of the form KIND=FOLDER")
    return name, Path(folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the results, or the folder of --write-recorded")
    parser.add_argument("--model", type=Path, help="by default the demo's, SmolLM2-135M-Instruct")
    parser.add_argument(
        "--adapters",
        action="append",
        default=[],
        metavar="KIND=FOLDER",
        help="repeatable; by default the agents of the package",
    )
    parser.add_argument("--recorded", type=Path, metavar="FILE")
    parser.add_argument("--recorded-adapters", type=Path, metavar="FOLDER")
    parser.add_argument("--parts", default=",".join(STUDY_PARTS), help="in this order")
    parser.add_argument(
        "--main", default=MAIN_KIND, metavar="KIND", help="gets all lengths and questions (%(default)s)"
    )
    parser.add_argument("--kinds", help="some of the --adapters, separated by commas")
    parser.add_argument("--modes", help="by default all; four with --reduced")
    parser.add_argument(
        "--deadline", type=float, metavar="SECONDS", help="start nothing that takes longer than is left"
    )
    parser.add_argument("--reduced", action="store_true", help="50 questions of mixed hops at 250 and 500 tokens")
    parser.add_argument("--questions", type=int, metavar="N", help="at most N in every cell")
    parser.add_argument("--seed", type=int, default=0, help="of the questions")
    parser.add_argument("--fresh", action="store_true", help="start RESULTS.json anew")
    parser.add_argument("--dtype", help="of weights and caches (bfloat16; float32 on a CPU)")
    parser.add_argument("--batch-size", type=int, help="episodes at a time (64; 32 on a CPU)")
    parser.add_argument("--pool-gigabytes", type=float, help="what the caches may take (40; 6 on a CPU)")
    parser.add_argument("--page-size", type=int, help="tokens per page (64; 128 on a TPU)")
    parser.add_argument("--prefill-buckets", help="chunk lengths (256,1024; 16,128 on a CPU)")
    parser.add_argument("--prefill-batch-size", type=int, help="episodes of a prefill program (4; 8 on a CPU)")
    parser.add_argument("--decode-block", type=int, help="tokens between two looks of the host (12; 1 on a CPU)")
    parser.add_argument("--implementation", help="of lora_attention")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="add the cells of these results")
    parser.add_argument("--drop", nargs="+", metavar="KIND", help="forget the results of these kinds of agents")
    parser.add_argument("--report", action="store_true", help="write tables and plots from the results")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where --report writes")
    parser.add_argument("--write-recorded", type=Path, metavar="FILE", help="write examples to train on")
    return parser


if __name__ == "__main__":
    main()
