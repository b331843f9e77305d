"""Adapters that exist, as what a training starts from."""

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from lragent_jax.models.adapter import Adapter
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import InputError
from lragent_jax.models.peft import MODULES, read_peft
from lragent_jax.models.peft_config import PeftConfig, read_peft_config
from lragent_jax.models.problems import listing
from lragent_jax.training.options import TrainingOptions


def read_starting_adapters(
    folder: str | os.PathLike, agents: Iterable[str], config: LlamaConfig, options: TrainingOptions
) -> dict[str, Adapter]:
    """The adapter of every agent: `folder` holds a PEFT folder of its name, of the rank, alpha and targets asked for.

    Raises one `InputError` that lists those that are not there or are of another form, and what `read_peft` raises.
    """
    adapters, problems = {}, []
    for agent in agents:
        path = Path(folder) / agent
        if not path.is_dir():
            problems.append(f"{agent}: there is no folder {path}")
            continue
        adapters[agent] = read_peft(path, config)
        found = _differences(adapters[agent], read_peft_config(path), config, options)
        problems += [f"{agent}: {difference}" for difference in found]
    if problems:
        head = (
            f"{folder} cannot be started from; it must hold every agent, and rank, alpha and targets be those it has:"
        )
        raise InputError(listing(head, problems))
    return adapters


def _differences(adapter: Adapter, peft: PeftConfig, config: LlamaConfig, options: TrainingOptions) -> Iterator[str]:
    if adapter.targets != options.targets:
        yield f"targets are {','.join(adapter.targets)} there, {','.join(options.targets)} asked for"
    elif len(adapter.weights) != len(adapter.targets) * config.num_layers:
        yield "some layers are not adapted there"
    for (layer, target), pair in adapter.weights.items():
        rank = pair.lora_a.shape[1]
        alpha = rank * peft.scale(f"model.layers.{layer}.{MODULES[target]}")
        if rank != options.rank or not math.isclose(alpha, options.alpha):
            yield (
                f"{target} of layer {layer} has rank {rank} and alpha {alpha:g} there, asked for are {options.rank} "
                f"and {options.alpha:g}"
            )
            break
