"""The similarity of V across agents, against what an engine caches for each of them."""

import itertools

import numpy as np
import pytest
import text_models
from tolerances import assert_close

from lragent_jax.models.errors import InputError
from lragent_jax.recording import Recording
from lragent_jax.study.agent_set import AgentSet
from lragent_jax.study.similarity import value_similarity

CONFIG = text_models.CONFIG
SHARED, APART = text_models.adapters(), text_models.adapters((1, 2, 3))
RECORDINGS = [Recording.tokenize(trajectory, text_models.tokenizer()) for trajectory in text_models.TRAJECTORIES]


def cached_parts(agents, recording: Recording) -> dict[str, list[list[np.ndarray]]]:
    """X W, X A and X A B [T, width] by agent and layer: under `base` pages hold the first two, and no agent's states
    are taken for another's where every agent reads a trajectory of its own."""
    ids = [token for part in recording.parts for token in part.ids]
    size, heads = CONFIG.head_dim, CONFIG.num_kv_heads
    found: dict[str, list[list[np.ndarray]]] = {"base": [], "low_rank": [], "adapter": []}
    for name, adapter in agents.items():
        engine = text_models.text_engine(agents, sharing="base", page_size=512)
        with engine.trajectory() as trajectory:
            engine.next_token_logits(trajectory.append(ids), name)
            arrays = engine._cache.arrays
            assert arrays.low_rank.v is not None
            base = [np.asarray(kv)[0, :, : len(ids), size:] for kv in arrays.base.kv]
            low_rank = [np.asarray(pool)[0, :, : len(ids)].T for pool in arrays.low_rank.v]
        found["base"].append([layer.transpose(1, 0, 2).reshape(-1, heads * size) for layer in base])
        found["low_rank"].append(low_rank)
        found["adapter"].append([x @ adapter.weights[i, "v"].lora_b for i, x in enumerate(low_rank)])
    return found


@pytest.mark.parametrize("agents", [SHARED, APART], ids=["shared A", "apart"])
def test_similarity_is_that_of_what_engines_cache(agents):
    sums, num_tokens = {part: np.zeros(CONFIG.num_layers) for part in ("base", "low_rank", "adapter")}, 0
    for recording in RECORDINGS:
        num_tokens += recording.num_tokens
        for part, by_agent in cached_parts(agents, recording).items():
            for layer in range(CONFIG.num_layers):
                unit = [x[layer] / np.linalg.norm(x[layer], axis=-1, keepdims=True) for x in by_agent]
                pairs = [np.sum(a * b, axis=-1) for a, b in itertools.combinations(unit, 2)]
                sums[part][layer] += np.mean(pairs, axis=0).sum()
    found = value_similarity(CONFIG, *text_models.params(), agents, RECORDINGS)
    for part, total in sums.items():
        assert_close(found[part], total / num_tokens, "equal")
    assert_close(found["base"][0], 1.0, "equal")  # all agents embed the same tokens
    assert np.all(found["adapter"] < 0.9)
    assert (found["low_rank"][0] > 0.99) == (agents is SHARED)


def test_stacked_agents_are_as_alike_as_they_were():
    stacked = AgentSet("apart", APART).stacked()
    found = [
        value_similarity(CONFIG, *text_models.params(), dict(each), RECORDINGS[:1])
        for each in (APART, stacked.adapters)
    ]
    for part in ("base", "adapter"):
        assert_close(found[0][part], found[1][part], "equal")


def test_agents_that_do_not_adapt_v_and_lonely_ones_are_refused():
    with pytest.raises(InputError, match="two agents or more"):
        value_similarity(CONFIG, *text_models.params(), {"plan": SHARED["plan"]}, RECORDINGS)
