"""Sampling parameters and the draw, against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lragent_jax.models.errors import InputError
from lragent_jax.sampling import MAX_STOP_IDS, is_stop, sample, sampling_arrays
from lragent_jax.sampling_params import SamplingParams

LOGITS = np.random.default_rng(0).normal(size=(1, 40)).astype(np.float32) * 2


def draws(params: SamplingParams, count: int = 400) -> np.ndarray:
    """Tokens drawn with the seeds 0 … count - 1, in one batch."""
    rows = [SamplingParams(**{**vars(params), "seed": seed}) for seed in range(count)]
    arrays = sampling_arrays(rows, [9] * count, (), count)
    return np.asarray(sample(jnp.tile(LOGITS, (count, 1)), arrays, jnp.zeros(count, jnp.int32)))


def test_greedy_takes_the_largest():
    assert (draws(SamplingParams()) == LOGITS.argmax()).all()


def test_temperature_draws_from_the_softmax():
    counts = np.bincount(draws(SamplingParams(temperature=0.7), 1500), minlength=40) / 1500
    want = np.exp(LOGITS[0] / 0.7)
    want /= want.sum()
    assert np.abs(counts - want).max() < 4 * np.sqrt(0.25 / 1500)


def test_top_k_keeps_the_k_largest():
    assert set(draws(SamplingParams(temperature=5.0, top_k=3))) == set(np.argsort(LOGITS[0])[-3:])


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    order = np.argsort(-LOGITS[0])
    probs = np.exp(LOGITS[0][order]) / np.exp(LOGITS[0]).sum()
    nucleus = set(order[: np.searchsorted(np.cumsum(probs), 0.6) + 1])
    assert set(draws(SamplingParams(temperature=1.0, top_p=0.6), 800)) == nucleus


def test_a_tiny_top_p_is_greedy():
    assert (draws(SamplingParams(temperature=2.0, top_p=1e-6)) == LOGITS.argmax()).all()


def test_the_draw_depends_on_seed_and_index_alone():
    params = [SamplingParams(temperature=1.0, seed=s) for s in (5, 6, 5)]
    index = jnp.array([3, 3, 3], jnp.int32)
    batch = sample(jnp.tile(LOGITS, (3, 1)), sampling_arrays(params, [9] * 3, (), 3), index)
    alone = sample(jnp.asarray(LOGITS), sampling_arrays(params[:1], [9], (), 1), index[:1])
    assert batch[0] == batch[2] == alone[0]
    other = [sample(jnp.asarray(LOGITS), sampling_arrays(params[:1], [9], (), 1), jnp.array([i])) for i in range(20)]
    assert len({int(token[0]) for token in other}) > 1


def test_greedy_and_sampled_rows_share_a_batch():
    params = [SamplingParams(), SamplingParams(temperature=3.0, seed=1)]
    tokens = sample(jnp.tile(LOGITS, (2, 1)), sampling_arrays(params, [9, 9], (), 2), jnp.zeros(2, jnp.int32))
    assert tokens[0] == LOGITS.argmax()


def test_stop_ids_are_those_of_the_row_and_eos():
    params = [SamplingParams(stop_token_ids=[3]), SamplingParams(ignore_eos=True)]
    arrays = jax.tree.map(jnp.asarray, sampling_arrays(params, [9, 9], (7,), 2))
    for token, want in ((3, [True, False]), (7, [True, False]), (0, [False, False])):
        assert is_stop(jnp.full(2, token, jnp.int32), arrays).tolist() == want


def test_too_many_stop_ids_are_refused():
    with pytest.raises(InputError, match=f"at most {MAX_STOP_IDS}"):
        sampling_arrays([SamplingParams(stop_token_ids=range(20))], [9], (), 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0}, {"max_new_tokens": 2.5}, {"temperature": -1}, {"temperature": float("nan")},
        {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}, {"seed": -1}, {"seed": 2**32}, {"stop": [""]}, {"stop": [3]},
        {"stop_token_ids": [-1]}, {"temperature": "hot"},
        {"stop": 5}, {"stop_token_ids": ["a"]}, {"stop_token_ids": [2**40]},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_parameters_are_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_one_stop_string_needs_no_list():
    assert SamplingParams(stop="\n").stop == ("\n",)
