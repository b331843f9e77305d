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
# Context that the next or the same agent reads, outputs that follow one another, outputs of one token.
PIECES = [(9, None), (5, 0), (3, None), (2, 1), (1, 0), (4, None), (6, 1), (2, None), (4, 1), (3, 2), (1, 0)]


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
        pairs[layer][target] = LoraPair(
            jnp.asarray(lora_a[:1] if target in CACHED_TARGETS else lora_a), jnp.asarray(lora_b)
        )
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
    rows = pack(88, [other, ids])
    by_token = np.zeros((1, 88), np.int32)
    by_token[0, len(other) : len(other) + len(ids)] = adapter_ids
    rows = PackedRows(rows.tokens, rows.positions, rows.segments, jnp.asarray(by_token))
    return np.asarray(program()(rows, pairs_of(adapters(targets))))[0, len(other) :][: len(ids)]


@functools.cache
def engine_logits(targets) -> np.ndarray:
    """What agents that take turns under `base_lr` score every output token with: rows before output tokens."""
    engine, (ids, _) = tiny_engine("base_lr", adapters(targets)), trajectory()
    rows, start, turns = [], 0, engine.trajectory()
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


@pytest.mark.parametrize("targets", [ALL_BUT_K, ("q", "o")], ids=",".join)
def test_logits_are_those_of_agents_that_take_turns_on_one_cache(targets):
    got = before_outputs(joint_logits(readers(trajectory()[1]), targets))
    assert_close(got, engine_logits(targets), "equal")


def test_who_runs_a_token_matters():
    """A token given to somebody else is noticed: the one drawn last, to its writer; context, to who wrote before it."""
    right, want = readers(trajectory()[1]), engine_logits(ALL_BUT_K)
    _, writers = trajectory()
    drawn_last, context = right.copy(), right.copy()
    for at in range(1, len(writers)):
        if writers[at] is not None:
            drawn_last[at] = writers[at]
        else:
            context[at] = context[at - 1] if writers[at - 1] is None else writers[at - 1]
    for wrong in (drawn_last, context):
        assert 0 < (wrong != right).sum() < 8
        with pytest.raises(AssertionError, match="off by"):
            assert_close(before_outputs(joint_logits(wrong, ALL_BUT_K)), want, "equal")


def test_who_runs_what_in_a_trajectory():
    #             context      plan      context  action reflect context
    writers = [None, None, None, 0, 0, 0, None, None, 1, 2, 2, None, None]
    assert readers(writers).tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
    assert readers([None, 1]).tolist() == [1, 1]


@pytest.mark.parametrize("agent", [0, 2])
def test_one_agent_for_all_tokens_is_that_agent_alone(agent):
    ids, _ = trajectory()
    engine = tiny_engine("none", adapters(ALL_BUT_K))
    with engine.trajectory().append(ids[:1]) as alone:
        want = engine.score(alone, ids[1:], AGENTS[agent])
    assert_close(joint_logits(np.full(len(ids), agent), ALL_BUT_K)[:-1], want, "equal")


def test_k_is_refused():
    with pytest.raises(ValueError, match="k cannot be one of the targets"):
        joint_logits(0, ("q", "k", "v"))


def test_wide_values_and_two_attentions_are_one(monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v, low_rank = (
        jnp.asarray(rng.standard_normal((2, 24, *dims)), jnp.float32) for dims in ((6, 8), (2, 8), (2, 8), (12,))
    )
    mask = pack(24, [[5] * 10, [5] * 9], [[5] * 24]).mask()
    scores = np.einsum("btkgh,bskh->bkgts", q.reshape(2, 24, 2, 3, 8), k) / np.sqrt(8)
    allowed = np.tril(np.asarray(mask))[:, :, None]
    probs = np.exp(np.where(allowed, scores, -np.inf) - scores.max())
    probs /= probs.sum(-1, keepdims=True)
    want = np.einsum("bkgts,bskh->btkgh", probs, v), np.einsum("bkgts,bsr->btkgr", probs, low_rank)
    for widest in (128, 19):
        monkeypatch.setattr(packed_rows, "_MAX_HEAD_DIM", widest)
        got = attend_packed_split(q, k, v, low_rank, mask, None)
        for one, expected in zip(got, want, strict=True):
            assert_close(one, expected.reshape(one.shape), "equal")
    np.testing.assert_array_equal(got[0], attend_packed(q, k, v, mask, None))


# A slow and independent formulation: for every agent the values that it reads are written out.


def expanded_forward(params_by_name, pairs, ids, adapter_ids):
    """Hidden states [T, D] of one sequence: attention by agent with V = X W + (X A) B_agent, rows picked afterwards."""
    heads = lambda x: x.reshape(len(ids), -1, CONFIG.head_dim)  # noqa: E731

    def own(x, pair):
        """x A_i B_i of every agent, rows picked by token."""
        if pair is None:
            return 0.0
        of_all = jnp.stack([x @ a @ b for a, b in zip(pair.lora_a, pair.lora_b, strict=True)])
        return of_all[adapter_ids, jnp.arange(len(ids))]

    def norm(x, scale):
        return scale * x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + CONFIG.norm_eps)

    cos, sin = angles(len(ids))
    x = params_by_name["embed"][ids]
    allowed = jnp.tril(jnp.ones((len(ids), len(ids)), bool))
    for of_layer, pair in zip(params_by_name["layers"], pairs, strict=True):
        h = norm(x, of_layer["attention_norm"])
        q = rotated(heads(h @ of_layer["q"] + own(h, pair.get("q"))), cos, sin)
        k = jnp.repeat(rotated(heads(h @ of_layer["k"]), cos, sin), CONFIG.num_heads // CONFIG.num_kv_heads, 1)
        scores = jnp.where(allowed, jnp.einsum("tnh,snh->nts", q, k) * CONFIG.head_dim**-0.5, -jnp.inf)
        probs = jax.nn.softmax(scores, -1)
        by_agent = []
        for lora_b in pair["v"].lora_b:
            v = heads(h @ of_layer["v"] + h @ pair["v"].lora_a[0] @ lora_b)
            v = jnp.repeat(v, CONFIG.num_heads // CONFIG.num_kv_heads, 1)
            by_agent.append(jnp.einsum("nts,snh->tnh", probs, v).reshape(len(ids), -1))
        attended = jnp.stack(by_agent)[adapter_ids, jnp.arange(len(ids))]
        x = x + attended @ of_layer["o"] + own(attended, pair.get("o"))
        h = norm(x, of_layer["mlp_norm"])
        gate = h @ of_layer["gate"] + own(h, pair.get("gate"))
        hidden = jax.nn.silu(gate) * (h @ of_layer["up"] + own(h, pair.get("up")))
        x = x + hidden @ of_layer["down"] + own(hidden, pair.get("down"))
    return norm(x, params_by_name["norm"])


def angles(length: int):
    """cos and sin [T, 1, H/2] of plain rotary embedding."""
    half = CONFIG.head_dim // 2
    angle = np.arange(length)[:, None] * CONFIG.rope_theta ** (-np.arange(half) / half)
    return jnp.asarray(np.cos(angle)[:, None], jnp.float32), jnp.asarray(np.sin(angle)[:, None], jnp.float32)


def rotated(x, cos, sin):
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1)


def by_name() -> dict:
    graphdef, params = weights()
    model = nnx.merge(graphdef, params)
    layers = []
    for block in model.layers:
        linear = {name: getattr(block.attention, name) for name in "qkvo"} | {
            name: getattr(block.mlp, name) for name in ("gate", "up", "down")
        }
        norms = {name: getattr(block, name).scale[...] for name in ("attention_norm", "mlp_norm")}
        layers.append({name: one.kernel[...] for name, one in linear.items()} | norms)
    return {"embed": model.embed[...], "layers": layers, "norm": model.norm.scale[...]}


def test_gradients_reach_what_every_agent_wrote():
    """Of a loss on one agent's outputs alone, in the matrices of all: others filled the cache that it reads."""
    targets = ("q", "v", "o", "up")
    ids, writers = trajectory()
    agents = readers(writers)
    graphdef, params = weights()
    weight = np.random.default_rng(3).standard_normal((len(ids), CONFIG.width)).astype(np.float32)
    weight[agents != 2] = 0
    rows = pack(len(ids), [ids])
    rows = PackedRows(rows.tokens, rows.positions, rows.segments, jnp.asarray(agents[None], jnp.int32))
    pairs = pairs_of(adapters(targets))

    def fast(pairs):
        return jnp.sum(nnx.merge(graphdef, params).packed(rows, pairs)[0] * weight)

    def slow(pairs):
        return jnp.sum(expanded_forward(by_name(), pairs, jnp.asarray(ids), jnp.asarray(agents)) * weight)

    got, want = jax.jit(jax.grad(fast))(pairs), jax.jit(jax.grad(slow))(pairs)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want))
    jax.tree.map(lambda one, other: assert_close(one / scale, other / scale, "equal"), got, want)
    of_others = [float(jnp.abs(of_layer[target].lora_b[:2]).max()) for of_layer in got[:1] for target in targets]
    assert min(of_others) / scale > 1e-3, "agents are trained for those who read what they write, too"
