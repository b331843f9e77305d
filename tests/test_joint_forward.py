"""Every token run by its own agent in one pass: the logits of agents that take turns on one cache, and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import CONFIG, tiny_engine, weights
from flax import nnx
from test_packed_rows import pack
from tolerances import assert_close

from lragent_jax.models import packed_rows
from lragent_jax.models.adapter import Adapter, random_adapter
from lragent_jax.models.adapter_bank import CACHED_TARGETS, LoraPair
from lragent_jax.models.packed_rows import PackedRows, attend_packed, attend_packed_split
from lragent_jax.training.trajectories import readers

AGENTS = ("plan", "action", "reflect")
ALL_BUT_K = ("q", "v", "o", "gate", "up", "down")
# Context, outputs that follow one another, an output of one token, an agent that comes back; context closes nothing.
PIECES = [(9, None), (5, 0), (3, None), (2, 0), (1, 1), (4, None), (6, 1), (3, 2), (1, 0)]


@functools.cache
def adapters(targets: tuple[str, ...]) -> dict[str, Adapter]:
    """One A-group, B as large as what training makes."""
    return {
        name: random_adapter(CONFIG, rank=4, targets=targets, seed=seed, shared_a_seed=9, scale=0.5)
        for seed, name in enumerate(AGENTS)
    }


def pairs_of(agents: dict[str, Adapter]) -> tuple[dict[str, LoraPair], ...]:
    """The matrices of all agents, A of v once."""
    pairs: tuple[dict[str, LoraPair], ...] = tuple({} for _ in range(CONFIG.num_layers))
    first = next(iter(agents.values()))
    for place in first.weights:
        lora_a, lora_b = (np.stack([agent.weights[place][side] for agent in agents.values()]) for side in (0, 1))
        layer, target = place
        pairs[layer][target] = LoraPair(jnp.asarray(lora_a[:1] if target in CACHED_TARGETS else lora_a), jnp.asarray(lora_b))
    return pairs


def trajectory(seed: int = 0) -> tuple[list[int], list[int | None]]:
    """(ids, who wrote each)"""
    writers = [writer for length, writer in PIECES for _ in range(length)]
    return np.random.default_rng(seed).integers(2, 128, len(writers)).tolist(), writers


@functools.cache
def program():
    graphdef, params = weights()

    @jax.jit
    def run(rows, pairs):
        model = nnx.merge(graphdef, params)
        return model.logits(model.packed(rows, pairs))

    return run


def joint_logits(adapter_ids, targets) -> np.ndarray:
    """Of one trajectory behind another one, and padding behind both; `adapter_ids` are those of its tokens."""
    ids, _ = trajectory()
    other, _ = trajectory(seed=1)
    rows = pack(72, [other, ids])
    by_token = np.zeros((1, 72), np.int32)
    by_token[0, len(other) : len(other) + len(ids)] = adapter_ids
    rows = PackedRows(rows.tokens, rows.positions, rows.segments, jnp.asarray(by_token))
    return np.asarray(program()(rows, pairs_of(adapters(targets))))[0, len(other) :][: len(ids)]


@functools.cache
def engine_logits(targets) -> np.ndarray:
    """What agents that take turns under `base_lr` score every output token with: rows before output tokens."""
    engine, (ids, _) = tiny_engine("base_lr", adapters(targets)), trajectory()
    rows, start = [], 0
    with engine.trajectory() as turns:
        for length, writer in PIECES:
            piece, start = ids[start : start + length], start + length
            if writer is None:
                turns.append(piece)
            else:
                rows += [*engine.score(turns, piece, AGENTS[writer])]
            stats = engine.cache_stats()
        assert stats.low_rank.pages_used == ("v" in targets) * stats.base.pages_used, "one copy of each for all"
    return np.stack(rows)


def before_outputs(logits: np.ndarray) -> np.ndarray:
    _, writers = trajectory()
    return logits[:-1][np.array([writer is not None for writer in writers[1:]])]


@pytest.mark.parametrize("targets", [("q", "v"), ALL_BUT_K, ("q", "o")], ids=",".join)
def test_logits_are_those_of_agents_that_take_turns_on_one_cache(targets):
    got = before_outputs(joint_logits(readers(trajectory()[1]), targets))
    assert_close(got, engine_logits(targets), "equal")
