"""One tiny model and the calls that must come out the same on one device, on several, and in several processes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lragent_jax import generation
from lragent_jax.engine import Engine
from lragent_jax.models.adapter import random_adapter
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.llama import abstract_params

generation.LEAST_LAST_ONLY = 16  # also where no fixture does it: these processes are not pytest's

CONFIG = LlamaConfig(
    num_layers=1, width=64, mlp_width=128, num_heads=8, num_kv_heads=4, head_dim=8, vocab_size=256, context_length=128
)
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
A_SEEDS = {"plan": 9, "action": 9, "reflect": 8}  # two A-groups
ADAPTERS = {
    agent: random_adapter(CONFIG, rank=4, targets=TARGETS, seed=i, shared_a_seed=seed, scale=0.3)
    for i, (agent, seed) in enumerate(A_SEEDS.items())
}


@functools.cache
def weights():
    graphdef, abstract = abstract_params(CONFIG, jnp.float32)
    rng = np.random.default_rng(0)  # drawn by NumPy, which compiles nothing
    return graphdef, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), abstract)


def engine_of(sharing: str, **options) -> Engine:
    options = {"page_size": 8, "num_pages": 24, "prefill_buckets": (16,), "decode_block": 4} | options
    return Engine(CONFIG, *weights(), ADAPTERS, sharing=sharing, **options)


def generated(engine: Engine) -> list[int]:
    """The tokens after three agents' turns, one of which samples."""
    with engine.trajectory().append(list(range(5, 24))) as trajectory:
        for agent in ("plan", "reflect"):
            engine.generate(trajectory, agent, max_new_tokens=5, ignore_eos=True)
        engine.generate(trajectory, "action", max_new_tokens=3, ignore_eos=True, temperature=0.8, seed=3)
        return trajectory.token_ids


def scored(engine: Engine) -> np.ndarray:
    """The logits of two agents' turns."""
    with engine.trajectory().append(list(range(5, 24))) as trajectory:
        turns = [engine.score(trajectory, ids, agent) for agent, ids in (("plan", [7, 9, 11]), ("reflect", [8, 6]))]
    return np.concatenate(turns)
