"""Trains the agents of one base model: from JSON lines to PEFT folders."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lragent_jax.models.errors import InputError
from lragent_jax.models.folder import read_config, read_model
from lragent_jax.models.llama import Params
from lragent_jax.models.weights import weight_dtype
from lragent_jax.tokenizer import Tokenizer, load_tokenizer
from lragent_jax.training.agent_run import AgentPlan, AgentRun, Progress
from lragent_jax.training.examples import file_hash, read_examples, tokenize
from lragent_jax.training.lora import Lora, initial_lora, shared_part, to_adapter, without
from lragent_jax.training.mesh import current_mesh, num_data_parts, weight_shardings
from lragent_jax.training.options import TrainingOptions
from lragent_jax.training.packing import batch_shapes
from lragent_jax.training.programs import Programs
from lragent_jax.training.run_folder import RunFolder, check_agent_names

DataFiles = Mapping[str, str | Path]


def train(
    model: str | os.PathLike,
    agents: DataFiles,
    out: str | os.PathLike,
    *,
    validation: DataFiles | None = None,
    options: TrainingOptions | None = None,
    base_model: str | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Trains a LoRA adapter per agent and returns the agents' results, which `OUT/<agent>/training.json` holds too.

    `model`: whatever `Engine.from_pretrained` reads, with a tokenizer. `agents`, `validation`: agent name to a file of
    JSON lines, `{"input": …, "output": …}`; the loss is on outputs alone. `base_model`: the name that PEFT records for
    the base, `model` by default. Where `jax.set_mesh` has made a mesh current, rows are cut along its axis "data" and
    weights along "model".

    Writes `OUT/<agent>/` (what PEFT loads, and `losses.jsonl`) and `OUT/<agent>.orbax`. Called again with the same
    arguments it goes on where it was cut off, to the same losses, and trains nothing that is done.

    Raises `InputError` for options, names and data that cannot be trained with, `CheckpointError` for a model that
    cannot be read and a folder that holds something else or a training of other settings, all before any step is run;
    and `LRAgentError` where a loss is not finite.
    """
    options, validation = options or TrainingOptions(), validation or {}
    progress = progress or (lambda done, total, what: None)
    check_agent_names(list(agents))
    if unknown := [name for name in validation if name not in agents]:
        raise InputError(f"there are validation examples for {', '.join(unknown)}, who is not trained")
    folder, config = RunFolder(out), read_config(model)
    progress(0, 0, "reading the examples")
    examples, held_out = ({name: read_examples(path) for name, path in files.items()} for files in (agents, validation))
    settings = options.settings() | {
        "agents": list(agents),
        "data": {name: file_hash(path) for name, path in agents.items()},
        "validation": {name: file_hash(path) for name, path in validation.items()},
        "model": dataclasses.asdict(config),
    }
    folder.check(settings)
    tokenizer, mesh = _tokenizer(model), current_mesh()
    plans = [
        AgentPlan.make(
            agent,
            tokenize(examples[agent], tokenizer, config),
            tokenize(held_out.get(agent, []), tokenizer, config),
            options,
            num_data_parts(mesh),
        )
        for agent in agents
    ]
    shapes = batch_shapes([packed for plan in plans for packed in plan.packed])
    dtype = weight_dtype(options.dtype)
    config, graphdef, params = read_model(
        model, dtype, weight_shardings(config, dtype, mesh),
        lambda done, total, _: progress(done, total, "reading the model"),
    )  # fmt: skip
    folder.begin(settings | {"weights": _fingerprint(params)})
    programs = Programs(config, graphdef, params, options)
    results: dict[str, dict[str, Any]] = {}
    shared: Lora = {}
    for plan in plans:
        result = folder.finished(plan.agent)
        if result is None:
            run = AgentRun(
                programs, plan, shapes, options,
                losses=folder.losses(plan.agent), checkpoints=folder.checkpoints(plan.agent), progress=progress,
            )  # fmt: skip
            trained, figures = run.run(without(initial_lora(config, options, plan.agent), shared), shared)
            adapter = to_adapter(trained, options.scale, plan.agent)
            result = folder.finish(plan.agent, adapter, config, options.alpha, base_model or str(model), figures)
        results[plan.agent] = result
        if options.kind == "shared_a" and not shared:
            shared = shared_part(folder.adapter(plan.agent, config))
    return results


def _tokenizer(model: str | os.PathLike) -> Tokenizer:
    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        raise InputError(f"{model} came without a tokenizer: the text of the examples cannot be read")
    return tokenizer


def _fingerprint(params: Params) -> str:
    """Of some of every weight: enough to tell two models of one shape apart."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf[:1]).astype(np.float32).tobytes())
    return digest.hexdigest()
