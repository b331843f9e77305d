"""The compiled step: what it changes, what it leaves alone, and how few programs there are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_train_loss import CONFIG
from tolerances import assert_close

from lragent_jax.models import llama
from lragent_jax.training.examples import TokenSequence
from lragent_jax.training.lora import Lora, initial_lora, layer_pairs, shared_part, with_shared
from lragent_jax.training.loss import summed_loss
from lragent_jax.training.options import TrainingOptions
from lragent_jax.training.packing import Batch, BatchShape, Packer, batch_shapes
from lragent_jax.training.programs import Programs

OPTIONS = TrainingOptions(
    rank=2, alpha=3, targets=("q", "v"), dtype="float32", attention="xla", tokens_per_step=64, sequence_length=64,
    weight_decay=0.3, max_grad_norm=0.5,
)  # fmt: skip
RATE = 0.01


@functools.cache
def programs() -> Programs:
    return Programs(CONFIG, *llama.random_params(CONFIG, "float32", seed=3), OPTIONS)


def some_lora(agent: str) -> Lora:
    """B is not zero, and A holds zeros of both signs."""
    lora = initial_lora(CONFIG, OPTIONS, agent)
    rng = np.random.default_rng(1)
    for matrices in lora.values():
        lora_a = np.array(matrices["lora_a"])
        lora_a[0, :2, 0] = 0.0, -0.0
        lora_b = rng.standard_normal(matrices["lora_b"].shape).astype(np.float32)
        matrices |= {"lora_a": lora_a, "lora_b": lora_b}
    return lora


@functools.cache
def batches() -> list[Batch]:
    rng = np.random.default_rng(0)
    sequences = [TokenSequence(rng.integers(2, 99, 40).astype(np.int32), np.arange(40) > 20) for _ in range(3)]
    packer = Packer(sequences, sequence_length=64, tokens_per_step=64)
    steps = packer.epoch(None)
    [shape] = batch_shapes([(packer, steps)]).values()
    return [packer.batch(step, shape) for step in steps]


def run_steps(lora: Lora, shared: Lora):
    """(final state, gradient norms) after a step per batch."""
    lora, trained = with_shared(lora, shared)
    state, shape = programs().initial_state(lora), shape_of(batches()[0])
    programs().compile(state, trained, [shape], [])
    norms = []
    for batch in batches():
        state, metrics = programs().step(shape, trained, state, batch, RATE)
        norms.append(float(metrics.gradient_norm))
    return state, norms


def shape_of(batch: Batch) -> BatchShape:
    rows, length = batch.rows.tokens.shape
    return BatchShape(rows, length, batch.targets.shape[1])


@functools.cache
def gradient_by_hand():
    graphdef, params = llama.random_params(CONFIG, "float32", seed=3)

    def loss(lora, batch):
        model = nnx.merge(graphdef, params)
        hidden = model.packed(batch.rows, layer_pairs(lora, OPTIONS.scale, jnp.float32))
        return summed_loss(model, hidden, batch) / batch.weights.sum()

    return jax.jit(jax.grad(loss))


def by_hand(trainable: Lora, frozen: Lora):
    """(trained matrices, gradient norms) with optax's own AdamW, which never hears of what is frozen."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(OPTIONS.max_grad_norm), optax.adamw(RATE, weight_decay=OPTIONS.weight_decay)
    )
    state, norms, matrices = optimizer.init(trainable), [], trainable
    for batch in batches():
        of_all = gradient_by_hand()({target: matrices[target] | frozen.get(target, {}) for target in matrices}, batch)
        gradient = {target: {name: of_all[target][name] for name in of} for target, of in matrices.items()}
        norms.append(np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(gradient))))
        updates, state = optimizer.update(gradient, state, matrices)
        matrices = jax.tree.map(jnp.add, matrices, updates)
    return matrices, norms


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_step_is_adamw_of_what_is_trained_and_of_nothing_else(is_shared):
    mine, shared = some_lora("action"), shared_part(some_lora("plan")) if is_shared else {}
    trainable = {t: {n: a for n, a in m.items() if n not in shared.get(t, {})} for t, m in mine.items()}
    want, want_norms = by_hand(trainable, shared)
    state, norms = run_steps(mine, shared)
    assert min(norms) > OPTIONS.max_grad_norm, "nothing was clipped"
    assert_close(norms, want_norms, "equal")
    for target, matrices in want.items():
        for name, matrix in matrices.items():
            assert_close(state.lora[target][name], matrix, "equal")
    if is_shared:
        got = np.asarray(state.lora["v"]["lora_a"])
        assert got.tobytes() == shared["v"]["lora_a"].tobytes() != mine["v"]["lora_a"].tobytes()
    assert len(programs()._compiled) == 1, "what is trained must not be a part of the program"


def test_the_matrices_that_came_in_are_kept():
    """States are used up by steps; what agents share is not."""
    want = shared_part(some_lora("plan"))
    shared = jax.tree.map(jnp.asarray, want)
    for agent in ("action", "reflect"):
        state, _ = run_steps(some_lora(agent), shared)
        assert np.asarray(state.lora["v"]["lora_a"]).tobytes() == np.asarray(want["v"]["lora_a"]).tobytes()
    assert not shared["v"]["lora_a"].is_deleted()
