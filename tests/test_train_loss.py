"""The loss: that of every sequence alone, exact in its gradient, whatever is packed or joined."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from text_models import CONFIG as TEXT_CONFIG
from text_models import tokenizer
from tolerances import assert_close
from training_data import lines

from lragent_jax.models import llama
from lragent_jax.training import loss as loss_module
from lragent_jax.training.examples import Example, TokenSequence, tokenize
from lragent_jax.training.lora import initial_lora, layer_pairs
from lragent_jax.training.loss import losses_and_hits, summed_loss, token_losses
from lragent_jax.training.options import TrainingOptions
from lragent_jax.training.packing import Packer, batch_shapes

CONFIG = dataclasses.replace(TEXT_CONFIG, num_layers=1)
OPTIONS = TrainingOptions(rank=2, targets=("q", "k", "v", "o", "gate", "up", "down"), dtype="float32")


@functools.cache
def params():
    return llama.random_params(CONFIG, "float32", seed=3)


def trained_lora():
    """Something whose B is not zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: leaf + 0.05 * rng.standard_normal(leaf.shape, np.float32), initial_lora(CONFIG, OPTIONS, "plan")
    )


def program(remat_policy=None):
    """(lora, batch) to (summed loss, its gradient); traced anew for every caller."""
    graphdef, weights = params()

    @jax.jit
    def run(lora, batch):
        def of(lora):
            model = nnx.merge(graphdef, weights)
            hidden = model.packed(batch.rows, layer_pairs(lora, 2.0, jnp.float32), saveable=remat_policy)
            return summed_loss(model, hidden, batch)

        return jax.value_and_grad(of)(lora)

    return run


@functools.cache
def usual_program():
    return program()


def losses_and_gradient(sequences: list[TokenSequence], run):
    """What `run` makes of all sequences, packed into rows of 64, in sum."""
    packer = Packer(sequences, sequence_length=64, tokens_per_step=128)
    steps = packer.epoch(None)
    shapes = batch_shapes([(packer, steps)])
    results = [run(trained_lora(), packer.batch(step, shapes[step.length])) for step in steps]
    return jax.tree.map(lambda *parts: sum(np.asarray(part, np.float64) for part in parts), *results)


@pytest.fixture(scope="module")
def joined() -> list[TokenSequence]:
    return tokenize([Example(line["input"], line["output"], "file") for line in lines()], tokenizer(), CONFIG)


@pytest.fixture(scope="module")
def separate() -> list[TokenSequence]:
    """The same lines, each a sequence."""
    return [tokenize([Example(line["input"], line["output"], "file")], tokenizer(), CONFIG)[0] for line in lines()]


@pytest.fixture(scope="module")
def packed(joined):
    return losses_and_gradient(joined, usual_program())


def assert_same(got, want) -> None:
    assert_close(got[0] / 100, want[0] / 100, "equal")
    for left, right in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        scale = np.abs(right).max()
        assert scale > 1e-3, "a gradient that is zero compares nothing"
        assert_close(left / scale, right / scale, "equal")


def one_by_one(sequences: list[TokenSequence]):
    """Each as if it were alone: through a plain forward pass and autodiff of log_softmax."""
    graphdef, weights = params()
    length = max(one.num_inputs for one in sequences)

    @jax.jit
    def run(lora, ids, targets, is_output):
        def of(lora):
            model = nnx.merge(graphdef, weights)
            rows = llama.PackedRows(
                tokens=ids[None], positions=jnp.arange(length)[None], segments=jnp.ones((1, length), jnp.int32)
            )
            scores = model.logits(model.packed(rows, layer_pairs(lora, 2.0, jnp.float32)))[0]
            likelihood = jnp.take_along_axis(jax.nn.log_softmax(scores), targets[:, None], axis=1)[:, 0]
            return -jnp.sum(jnp.where(is_output, likelihood, 0))

        return jax.value_and_grad(of)(lora)

    results = []
    for one in sequences:
        padding = (0, length - one.num_inputs)
        arrays = [np.pad(array, padding) for array in (one.ids[:-1], one.ids[1:], one.is_output[1:])]
        results.append(run(trained_lora(), *arrays))
    return jax.tree.map(lambda *parts: sum(np.asarray(part, np.float64) for part in parts), *results)


def test_packed_is_the_sum_of_unpacked(packed, joined):
    assert_same(packed, one_by_one(joined))


def test_joined_lines_are_the_sum_of_separate_ones(packed, separate):
    assert_same(packed, losses_and_gradient(separate, usual_program()))


def test_without_the_mask_between_sequences_it_is_not(packed, joined, monkeypatch):
    attend = llama.attend_packed
    forget_layers = llama.run_packed_block.clear_cache  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]
    forget_layers()  # they are traced once in a process
    with monkeypatch.context() as patch:
        patch.setattr(llama, "attend_packed", lambda q, k, v, mask, how: attend(q, k, v, mask | True, how))
        loss, _ = losses_and_gradient(joined, program())
    forget_layers()
    assert abs(loss - packed[0]) > 1e-2


def test_what_is_kept_for_the_backward_pass_changes_nothing(packed, joined):
    assert_same(losses_and_gradient(joined, program(jax.checkpoint_policies.dots_with_no_batch_dims_saveable)), packed)


def test_in_chunks_it_is_the_same(packed, joined, monkeypatch):
    monkeypatch.setattr(loss_module, "_SCORES_BYTES", 400 * 4 * 50)
    assert_same(losses_and_gradient(joined, program()), packed)


@pytest.mark.parametrize("tied", [True, False])
def test_losses_and_hits_of_a_head(tied, monkeypatch):
    """Against a plain softmax; the head that is not tied is stored the other way round."""
    monkeypatch.setattr(loss_module, "_SCORES_BYTES", 400 * 4 * 3)
    graphdef, weights = llama.random_params(dataclasses.replace(CONFIG, tied_embeddings=tied), "float32")
    model = nnx.merge(graphdef, weights)
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((2, 7, CONFIG.width)), jnp.float32)
    scores = np.asarray(model.logits(hidden))
    targets = rng.integers(0, CONFIG.vocab_size, (2, 5))
    targets[0, :2] = scores[0, [1, 3]].argmax(-1)
    positions = np.array([[1, 3, 4, 7, 8], [0, 1, 2, 5, 6]], np.int32)
    weights = (positions < 7).astype(np.float32)
    batch = loss_module.Batch(rows=None, loss_positions=positions, targets=targets, weights=weights)  # pyright: ignore[reportArgumentType]
    picked = np.take_along_axis(scores, np.minimum(positions, 6)[..., None], axis=1)
    want = -np.take_along_axis(np.asarray(jax.nn.log_softmax(picked)), targets[..., None], axis=2)[..., 0]
    loss, hits = map(jnp.sum, losses_and_hits(model, hidden, batch))
    assert_close(loss, (want * weights).sum(), "equal")
    assert hits == ((picked.argmax(-1) == targets) * weights).sum() >= 2
    assert_close(summed_loss(model, hidden, batch), loss, "equal")


def test_f16_losses_have_gradients_of_ordinary_size():
    """A mean over many tokens would vanish in f16: the sum is differentiated."""
    hidden = jnp.ones((1, 4, 8), jnp.float16)
    unembed = jnp.eye(16, 8, dtype=jnp.float16)
    gradient = jax.grad(lambda h: token_losses(h, unembed, jnp.zeros((1, 4), jnp.int32)).sum())(hidden)
    assert gradient.dtype == jnp.float16
    assert (jnp.abs(gradient) > 1e-2).all()
