"""Trains the agents of one base model at once, for the cache that they will share: from trajectories to PEFT folders.

An agent that is trained on contexts which it runs alone meets other ones where the cache is shared: the keys and values
of most tokens were left there by others. Here every token is run by the agent that runs it then, and the gradient of an
agent's loss reaches what others wrote into the cache, too.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lragent_jax.models.adapter import Adapter
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import InputError
from lragent_jax.models.folder import read_config
from lragent_jax.training.agent_run import Progress
from lragent_jax.training.examples import file_hash
from lragent_jax.training.joint_run import JointPlan, JointRun
from lragent_jax.training.lora import Lora, from_adapter, initial_lora, of_agent, to_adapter, together
from lragent_jax.training.mesh import current_mesh, num_data_parts
from lragent_jax.training.options import TrainingOptions
from lragent_jax.training.packing import batch_shapes
from lragent_jax.training.run_folder import RunFolder, check_agent_names
from lragent_jax.training.starting_adapters import read_starting_adapters
from lragent_jax.training.trainer import begin, text_tokenizer
from lragent_jax.training.trajectories import Trajectory, agents_of, read_trajectories, tokenize_trajectories

_CHECKPOINTS = "joint"


def train_jointly(
    model: str | os.PathLike,
    trajectories: str | Path,
    out: str | os.PathLike,
    *,
    validation: str | Path | None = None,
    options: TrainingOptions | None = None,
    init: str | os.PathLike | None = None,
    base_model: str | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Trains a LoRA adapter for every agent that wrote in `trajectories`; they come out as one A-group.

    `trajectories`, `validation`: files of JSON lines as `read_trajectories` takes them. The loss is on what agents
    wrote and are taught, each token's under the keys and values that mode `base_lr` holds; a share of the trajectories
    (`separate_share`) is run by one agent alone, as in mode `none`. `init`: a folder with a PEFT folder per agent to
    start from, all of one A-group. All else, what is written, going on after a kill, meshes and errors, as of `train`;
    but there is one `OUT/losses.jsonl`, which holds what validation finds of every agent, too.
    """
    options = options or TrainingOptions(kind="joint")
    progress = progress or (lambda done, total, what: None)
    if options.kind != "joint":
        raise InputError(f"kind {options.kind} does not train on trajectories: ask for kind joint, or use train")
    folder, config = RunFolder(out), read_config(model)
    progress(0, 0, "reading the trajectories")
    training, held_out = read_trajectories(trajectories), read_trajectories(validation) if validation else []
    agents = agents_of(training)
    check_agent_names(agents)
    if unknown := [agent for agent in agents_of(held_out) if agent not in agents]:
        raise InputError(f"there are validation outputs of {', '.join(unknown)}, who is not trained")
    starting = {} if init is None else _starting(init, agents, config, options)
    settings = options.settings() | {
        "agents": agents,
        "data": file_hash(trajectories),
        "validation": None if validation is None else file_hash(validation),
        "init": {name: adapter.content_hash for name, adapter in starting.items()},
        "model": dataclasses.asdict(config),
    }
    folder.check(settings)
    progress(0, 0, "tokenising the trajectories")
    plan = _plan(model, config, agents, training, held_out, options, num_data_parts(current_mesh()))
    shapes = batch_shapes(plan.packed)
    settings |= {
        "token_ids": plan.data_hash(),
        "rows_per_step": {str(length): shape.rows for length, shape in shapes.items()},
    }
    folder.check(settings)
    programs = begin(folder, settings, model, config, options, progress)
    finished = {agent: result for agent in agents if (result := folder.finished(agent)) is not None}
    if len(finished) == len(agents):
        return finished
    run = JointRun(
        programs, plan, shapes, options,
        losses=folder.losses(None), checkpoints=folder.checkpoints(_CHECKPOINTS), progress=progress,
    )  # fmt: skip
    lora, results = run.run_jointly(_initial(config, options, agents, starting))
    written = {}
    for number, agent in enumerate(agents):
        adapter = to_adapter(of_agent(lora, number), options.scale, agent)
        written[agent] = folder.finish(agent, adapter, config, options.alpha, base_model or str(model), results[agent])
    folder.clear_checkpoints(_CHECKPOINTS)
    return written


def _starting(
    init: str | os.PathLike, agents: Sequence[str], config: LlamaConfig, options: TrainingOptions
) -> dict[str, Adapter]:
    adapters = read_starting_adapters(init, agents, config, options)
    if len({adapter.a_group_hash for adapter in adapters.values()}) > 1:
        raise InputError(f"{init} cannot be started from: its agents are not one A-group, as those of shared_a are")
    return adapters


def _initial(
    config: LlamaConfig, options: TrainingOptions, agents: Sequence[str], starting: Mapping[str, Adapter]
) -> Lora:
    return together([
        from_adapter(starting[agent], options.scale) if starting else initial_lora(config, options, agent)
        for agent in agents
    ])  # fmt: skip


def _plan(
    model: str | os.PathLike,
    config: LlamaConfig,
    agents: Sequence[str],
    training: Sequence[Trajectory],
    held_out: Sequence[Trajectory],
    options: TrainingOptions,
    row_multiple: int,
) -> JointPlan:
    tokenizer = text_tokenizer(model)
    sequences, validation = (tokenize_trajectories(some, agents, tokenizer, config) for some in (training, held_out))
    return JointPlan.of_trajectories(agents, sequences, validation, options, row_multiple)
