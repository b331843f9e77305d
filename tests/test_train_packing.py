"""Sequences in rows, rows in steps: everything once, nothing twice, the same for the same seed."""

import itertools

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from lragent_jax.training.examples import TokenSequence
from lragent_jax.training.packing import Packer, batch_shapes


def sequence(length: int, number: int = 0) -> TokenSequence:
    """`length` inputs, recognisable ids, outputs here and there."""
    ids = np.arange(length + 1, dtype=np.int32) + 1000 * number + 2
    is_output = (np.arange(length + 1) % 3 == 1) & (np.arange(length + 1) > 0)
    return TokenSequence(ids, is_output)


def packer(lengths, **changes) -> Packer:
    sizes = {"sequence_length": 64, "tokens_per_step": 256, "row_multiple": 1} | changes
    return Packer([sequence(length, i) for i, length in enumerate(lengths)], **sizes)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(0, 5), st.integers(1, 3))
def test_every_sequence_lies_in_one_row_that_holds_it(lengths, seed, multiple):
    packed = packer(lengths, row_multiple=multiple)
    steps = packed.epoch([seed])
    assert sorted(i for step in steps for row in step.rows for i in row) == list(range(len(lengths)))
    shapes = batch_shapes([(packed, steps)])
    for step in steps:
        assert step.length in (64, 128, 256, 512)
        assert 1 <= len(step.rows) <= shapes[step.length].rows == packed.num_rows(step.length)
        assert shapes[step.length].rows % multiple == 0
        assert all(sum(lengths[i] for i in row) <= step.length for row in step.rows)
        assert packed.num_tokens(step) == sum(lengths[i] for row in step.rows for i in row)
    assert steps == packed.epoch([seed])


def test_a_batch_holds_the_sequences_and_their_losses():
    packed = packer([10, 20, 70, 30, 3])
    steps = packed.epoch(None)
    shapes = batch_shapes([(packed, steps)])
    found = []
    for step in steps:
        batch = packed.batch(step, shapes[step.length])
        for row in range(shapes[step.length].rows):
            segments = np.asarray(batch.rows.segments[row])
            real = batch.weights[row] > 0
            positions = np.asarray(batch.loss_positions[row])
            assert (np.diff(positions) > 0).all(), "the gather is told that they are sorted and unique"
            assert (positions[~real] >= step.length).all()
            losses = dict(zip(positions[real].tolist(), np.asarray(batch.targets[row])[real].tolist(), strict=True))
            for number in range(1, segments.max() + 1):
                slots = np.flatnonzero(segments == number)
                inputs = np.asarray(batch.rows.tokens[row])[slots]
                assert np.asarray(batch.rows.positions[row])[slots].tolist() == list(range(len(slots)))
                index = (int(inputs[0]) - 2) // 1000
                want = packed.sequences[index]
                assert inputs.tolist() == want.ids[:-1].tolist()
                targets = {slots[0] + t: int(want.ids[t + 1]) for t in range(len(slots)) if want.is_output[t + 1]}
                assert {at: losses.pop(at) for at in targets} == targets
                found.append(index)
            assert losses == {}
    assert sorted(found) == [0, 1, 2, 3, 4]


def test_short_sequences_fill_what_long_ones_leave():
    steps = packer([100, 28, 64]).epoch(None)
    assert {step.length: step.rows for step in steps} == {64: ((2,),), 128: ((0, 1),)}


def test_rows_are_spread_evenly_over_their_steps():
    steps = packer([64] * 9).epoch([0])
    assert sorted(len(step.rows) for step in steps) == [3, 3, 3]


def test_epochs_differ_and_seeds_repeat():
    packed = packer([20] * 30)
    of_epoch = len(packed.epoch([0, 0]))
    first, again = (list(itertools.islice(packed.steps(0), 2 * of_epoch)) for _ in range(2))
    assert first == again
    assert first[:of_epoch] != first[of_epoch:]
    assert first != list(itertools.islice(packed.steps(1), 2 * of_epoch))


def test_many_sequences_leave_little_padding():
    lengths = np.random.default_rng(0).integers(20, 900, 2000).tolist()
    packed = packer(lengths, sequence_length=2048, tokens_per_step=32_768)
    steps = packed.epoch([0])
    assert sum(lengths) / (2048 * sum(len(step.rows) for step in steps)) > 0.97
