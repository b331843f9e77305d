"""Trains the agents of one base model: from JSON lines to PEFT folders."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lragent_jax.models.adapter import Adapter
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import InputError
from lragent_jax.models.folder import read_config, read_model
from lragent_jax.models.llama import Params
from lragent_jax.models.weights import weight_dtype
from lragent_jax.tokenizer import Tokenizer, load_tokenizer
from lragent_jax.training.agent_run import AgentPlan, AgentRun, Progress
from lragent_jax.training.examples import file_hash, read_examples, tokenize
from lragent_jax.training.lora import Lora, from_adapter, initial_lora, shared_part, to_adapter, with_shared
from lragent_jax.training.mesh import current_mesh, num_data_parts, weight_shardings
from lragent_jax.training.options import TrainingOptions
from lragent_jax.training.packing import batch_shapes
from lragent_jax.training.programs import Programs
from lragent_jax.training.run_folder import RunFolder, check_agent_names
from lragent_jax.training.starting_adapters import read_starting_adapters

DataFiles = Mapping[str, str | Path]


def train(
    model: str | os.PathLike,
    agents: DataFiles,
    out: str | os.PathLike,
    *,
    validation: DataFiles | None = None,
    options: TrainingOptions | None = None,
    init: str | os.PathLike | None = None,
    base_model: str | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Trains a LoRA adapter per agent and returns the agents' results, which `OUT/<agent>/training.json` holds too.

    `model`: whatever `Engine.from_pretrained` reads, with a tokenizer. `agents`, `validation`: agent name to a file of
    JSON lines, `{"input": …, "output": …}`; the loss is on outputs alone. `init`: a folder with a PEFT folder per agent
    to start from in place of random matrices; of the kind "shared_a" the others start from their own B beside the first
    one's new A. `base_model`: the name that PEFT records for the base, `model` by default. Where `jax.set_mesh` has
    made a mesh current, rows are cut along its axis "data" and weights along "model".

    Writes `OUT/<agent>/` (what PEFT loads, and `losses.jsonl`) and `OUT/<agent>.orbax`. Called again with the same
    arguments it goes on where it was cut off, to the same losses, and trains nothing that is done.

    Raises `InputError` for options, names and data that cannot be trained with, `CheckpointError` for a model that
    cannot be read and a folder that holds something else or a training of other settings, all before any step is run;
    and `LRAgentError` where a loss is not finite.
    """
    options, validation = options or TrainingOptions(), validation or {}
    progress = progress or (lambda done, total, what: None)
    if options.kind == "joint":
        raise InputError("kind joint trains on whole trajectories, not on files of examples: use train_jointly")
    check_agent_names(list(agents))
    if unknown := [name for name in validation if name not in agents]:
        raise InputError(f"there are validation examples for {', '.join(unknown)}, who is not trained")
    folder, config = RunFolder(out), read_config(model)
    starting = {} if init is None else read_starting_adapters(init, agents, config, options)
    settings = _settings(options, agents, validation, starting, config)
    folder.check(settings)
    plans = _plans(model, config, agents, validation, options, num_data_parts(current_mesh()), progress)
    shapes = batch_shapes([packed for plan in plans for packed in plan.packed])
    settings |= {
        "token_ids": {plan.agent: plan.data_hash() for plan in plans},
        "rows_per_step": {str(length): shape.rows for length, shape in shapes.items()},
    }
    folder.check(settings)
    programs = begin(folder, settings, model, config, options, progress)

    def run(plan: AgentPlan, shared: Lora) -> dict[str, Any]:
        agent, start = plan.agent, starting.get(plan.agent)
        of_agent = AgentRun(
            programs, plan, shapes, options,
            losses=folder.losses(agent), checkpoints=folder.checkpoints(agent), progress=progress,
        )  # fmt: skip
        lora = initial_lora(config, options, agent) if start is None else from_adapter(start, options.scale)
        lora, figures = of_agent.run(*with_shared(lora, shared))
        adapter = to_adapter(lora, options.scale, agent)
        return folder.finish(agent, adapter, config, options.alpha, base_model or str(model), figures)

    return _in_turn(plans, run, folder, config, options)


def begin(
    folder: RunFolder,
    settings: dict[str, Any],
    model: str | os.PathLike,
    config: LlamaConfig,
    options: TrainingOptions,
    progress: Progress,
) -> Programs:
    """Reads the base onto the current mesh, and lets the folder say what is trained in it from now on."""
    dtype = weight_dtype(options.dtype)
    config, graphdef, params = read_model(
        model, dtype, weight_shardings(config, dtype, current_mesh()),
        lambda done, total, _: progress(done, total, "reading the model"),
    )  # fmt: skip
    folder.begin(settings | {"weights": _fingerprint(params)})
    return Programs(config, graphdef, params, options)


def _settings(
    options: TrainingOptions,
    agents: DataFiles,
    validation: DataFiles,
    starting: Mapping[str, Adapter],
    config: LlamaConfig,
) -> dict[str, Any]:
    """What decides the result, as far as it is known before anything is tokenised."""
    return options.settings() | {
        "agents": list(agents),
        "data": {name: file_hash(path) for name, path in agents.items()},
        "validation": {name: file_hash(path) for name, path in validation.items()},
        "init": {name: adapter.content_hash for name, adapter in starting.items()},
        "model": dataclasses.asdict(config),
    }


def _in_turn(
    plans: Sequence[AgentPlan],
    run: Callable[[AgentPlan, Lora], dict[str, Any]],
    folder: RunFolder,
    config: LlamaConfig,
    options: TrainingOptions,
) -> dict[str, dict[str, Any]]:
    """Runs what is not done yet; of the kind "shared_a" the others get what the first one learnt."""
    results: dict[str, dict[str, Any]] = {}
    shared: Lora = {}
    for plan in plans:
        results[plan.agent] = folder.finished(plan.agent) or run(plan, shared)
        if options.kind == "shared_a" and not shared:
            shared = shared_part(from_adapter(folder.adapter(plan.agent, config), options.scale))
    return results


def _plans(
    model: str | os.PathLike,
    config: LlamaConfig,
    agents: DataFiles,
    validation: DataFiles,
    options: TrainingOptions,
    row_multiple: int,
    progress: Progress,
) -> list[AgentPlan]:
    """All files are read before any is tokenised, so that a line that is wrong is told at once."""
    progress(0, 0, "reading the examples")
    examples, held_out = ({name: read_examples(path) for name, path in files.items()} for files in (agents, validation))
    tokenizer = text_tokenizer(model)
    progress(0, 0, "tokenising the examples")
    return [
        AgentPlan.make(
            agent,
            tokenize(examples[agent], tokenizer, config),
            tokenize(held_out.get(agent, []), tokenizer, config),
            options,
            row_multiple,
        )
        for agent in agents
    ]


def text_tokenizer(model: str | os.PathLike) -> Tokenizer:
    """The model's; `InputError` where there is none."""
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
