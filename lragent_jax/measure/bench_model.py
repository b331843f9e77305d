"""Random weights and agents of a well-known shape, made once for all engines of a benchmark."""

import dataclasses
import gc
import itertools
from typing import Any

import jax

from lragent_jax.engine import Engine
from lragent_jax.models.adapter import random_adapter
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.llama import random_params
from lragent_jax.sharing import SharingMode

TARGETS = ("q", "v")
_ROLES = ("plan", "action", "reflect")


class BenchModel:
    """Weights, and adapters of rank r on q and v: those of a trace first, then as many more as are asked for.

    `shared_a`: one A-group, or one for each agent.
    """

    def __init__(
        self, config: LlamaConfig, dtype: str, rank: int, *, num_agents: int = len(_ROLES), shared_a: bool = True
    ):
        self.config, self.rank, self.itemsize = config, rank, jax.numpy.dtype(dtype).itemsize
        more = (f"agent{i}" for i in itertools.count(len(_ROLES)))
        names = list(itertools.islice(itertools.chain(_ROLES, more), num_agents))
        self.adapters = {
            name: random_adapter(config, rank=rank, targets=TARGETS, seed=i, shared_a_seed=0 if shared_a else None)
            for i, name in enumerate(names)
        }
        self._graphdef, self.params = random_params(config, jax.numpy.dtype(dtype))
        self.weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))

    @property
    def agents(self) -> list[str]:
        return list(self.adapters)

    def engine(self, mode: SharingMode, context_length: int, **options: Any) -> Engine:
        """An engine over these weights for contexts of that length: page tables are as wide as these need them.

        Drop the last engine first where two do not fit.
        """
        gc.collect()
        config = dataclasses.replace(self.config, context_length=context_length)
        return Engine(config, self._graphdef, self.params, self.adapters, sharing=mode, **options)


def narrow(config: LlamaConfig) -> LlamaConfig:
    """One layer with the attention heads of `config` and next to nothing else.

    Page accounting is the same per layer, and so is every ratio between modes; it runs on anything, in seconds.
    """
    return dataclasses.replace(config, num_layers=1, width=64, mlp_width=64, vocab_size=256)
