"""How far distributions moved, against the definition written out."""

import math

import numpy as np
import pytest

from lragent_jax.drift import Drift


def logits(num_positions: int, seed: int, size: float = 3.0) -> np.ndarray:
    return size * np.random.default_rng(seed).standard_normal((num_positions, 11)).astype(np.float32)


def by_definition(reference: np.ndarray, other: np.ndarray) -> float:
    total = 0.0
    for p_row, q_row in zip(reference.tolist(), other.tolist(), strict=True):
        p_sum, q_sum = sum(map(math.exp, p_row)), sum(map(math.exp, q_row))
        for p, q in zip(p_row, q_row, strict=True):
            total += math.exp(p) / p_sum * ((p - math.log(p_sum)) - (q - math.log(q_sum)))
    return total / len(reference)


def test_it_is_the_mean_over_all_positions_that_were_added():
    reference, other = logits(70, seed=1), logits(70, seed=2)  # more than it looks at together
    drift = Drift()
    for start, stop in ((0, 1), (1, 40), (40, 70)):
        drift.add(reference[start:stop], other[start:stop])
    assert drift.num_positions == 70
    assert drift.kl == pytest.approx(by_definition(reference, other), rel=1e-9)
    assert drift.top1_agreement == np.mean(reference.argmax(1) == other.argmax(1))
    assert 0 < drift.top1_agreement < 1


def test_likelihood_is_that_of_the_tokens_that_followed():
    reference, other = logits(70, seed=1), logits(70, seed=2)
    tokens = np.random.default_rng(3).integers(0, 11, 70).tolist()
    drift = Drift()
    for start, stop in ((0, 33), (33, 70)):
        drift.add(reference[start:stop], other[start:stop], tokens[start:stop])
    wanted = [math.log(sum(map(math.exp, row))) - row[i] for row, i in zip(other.tolist(), tokens, strict=True)]
    assert drift.nll == pytest.approx(np.mean(wanted), rel=1e-9)


def test_direction_matters():
    reference, other = logits(5, seed=1), logits(5, seed=2)
    there, back = Drift(), Drift()
    there.add(reference, other)
    back.add(other, reference)
    assert there.kl == pytest.approx(by_definition(reference, other), rel=1e-9)
    assert back.kl == pytest.approx(by_definition(other, reference), rel=1e-9)
    assert there.kl != pytest.approx(back.kl, rel=1e-3)


def test_equal_logits_have_not_moved_and_a_constant_does_not_matter():
    reference = logits(4, seed=3)
    drift = Drift()
    drift.add(reference, reference)
    assert (drift.kl, drift.top1_agreement) == (0.0, 1.0)
    drift.add(reference, reference + np.float32(64.0))
    assert drift.kl == pytest.approx(0.0, abs=1e-10)


def test_large_logits_stay_finite():
    drift = Drift()
    drift.add(logits(3, seed=1, size=1e4), logits(3, seed=2, size=1e4))
    assert math.isfinite(drift.kl)
