"""Sequences packed into rows of few lengths, and rows into steps of a constant number of slots."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from lragent_jax.models.cache_view import HostOrDevice
from lragent_jax.models.packed_rows import PackedRows
from lragent_jax.models.pytree import pytree
from lragent_jax.training.examples import TokenSequence

_OPEN_ROWS = 128
"""Rows that a sequence may still join: bounds the time packing takes; more of them pad hardly less."""

_LOSS_SLOTS_MULTIPLE = 64


@pytree
class Batch:
    """What one step runs, on the host. M slots per row hold the positions with a loss, in order.

    Slots left over have positions beyond the row, all different, and weight 0.
    """

    rows: PackedRows
    loss_positions: Int[HostOrDevice, "B M"]
    targets: Int[HostOrDevice, "B M"]
    weights: Float[HostOrDevice, "B M"]


def slot_agents(batch: Batch) -> Int[np.ndarray, "B M"]:
    """Whose output every loss slot holds: that of the agent that runs the token before it. 0 where one runs all."""
    agents = batch.rows.adapter_ids
    if agents is None:
        return np.zeros(batch.targets.shape, np.int32)
    slots = np.minimum(batch.loss_positions, agents.shape[1] - 1)
    return np.take_along_axis(np.asarray(agents), np.asarray(slots), axis=1)


@dataclasses.dataclass(frozen=True)
class Step:
    """The rows of one step: slots per row, and the sequences that lie in each, by index."""

    length: int
    rows: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """B, T and M of a program's batches, and whether each token has its agent."""

    rows: int
    length: int
    loss_slots: int
    by_token: bool = False


def empty_batch(shape: BatchShape) -> Batch:
    """Rows of padding, without a loss."""
    slots = (shape.rows, shape.length)
    loss_slots = (shape.rows, shape.loss_slots)
    return Batch(
        rows=PackedRows(*(np.zeros(slots, np.int32) for _ in range(3 + shape.by_token))),
        loss_positions=np.tile(shape.length + np.arange(shape.loss_slots, dtype=np.int32), (shape.rows, 1)),
        targets=np.zeros(loss_slots, np.int32),
        weights=np.zeros(loss_slots, np.float32),
    )


@dataclasses.dataclass(eq=False)
class _OpenRow:
    """A row that is being filled."""

    slots_left: int
    indices: list[int] = dataclasses.field(default_factory=list)


class Packer:
    """Packs one set of sequences, the same way for the same seed; all of them or none say who runs each token.

    Rows have `sequence_length` slots; sequences that are longer open rows of twice as many, and so on. The rows of a
    step have one length, and their number is `tokens_per_step` over it, a multiple of `row_multiple`.
    """

    def __init__(
        self, sequences: Sequence[TokenSequence], *, sequence_length: int, tokens_per_step: int, row_multiple: int = 1
    ):
        self.sequences = sequences
        self._lengths = [sequence.num_inputs for sequence in sequences]
        self._num_outputs = [sequence.num_outputs for sequence in sequences]
        self._shortest = min(self._lengths)
        self._sequence_length, self._tokens_per_step, self._multiple = sequence_length, tokens_per_step, row_multiple

    def epoch(self, seed: Sequence[int] | None) -> list[Step]:
        """Every sequence once, of those that are drawn. Rows are spread evenly over their steps; `seed` None keeps the
        order of the file.
        """
        rng = None if seed is None else np.random.default_rng(seed)

        def shuffled(items: list) -> list:
            return items if rng is None else [items[i] for i in rng.permutation(len(items))]

        steps = []
        rows_by_length = self._first_fit(shuffled(self._drawn(rng)))
        for length in sorted(rows_by_length):
            rows = shuffled(rows_by_length[length])
            count = -(-len(rows) // self.num_rows(length))
            bounds = np.linspace(0, len(rows), count + 1).round().astype(int)
            steps += [
                Step(length, tuple(tuple(row) for row in rows[start:stop]))
                for start, stop in itertools.pairwise(bounds)
            ]
        return shuffled(steps)

    def steps(self, seed: int) -> Iterator[Step]:
        """Epoch after epoch, each packed anew, for ever."""
        epoch = 0
        while True:
            yield from self.epoch([seed, epoch])
            epoch += 1

    def num_rows(self, length: int) -> int:
        """Rows of a step whose rows have so many slots."""
        rows = max(1, self._tokens_per_step // length)
        return -(-rows // self._multiple) * self._multiple

    def num_tokens(self, step: Step) -> int:
        """Tokens without padding."""
        return sum(self._lengths[i] for row in step.rows for i in row)

    def loss_slots(self, steps: Sequence[Step]) -> dict[int, int]:
        """By row length, how many positions with a loss the fullest row has."""
        slots: dict[int, int] = {}
        for step in steps:
            most = max(sum(self._num_outputs[i] for i in row) for row in step.rows)
            slots[step.length] = max(slots.get(step.length, 0), most)
        return slots

    def batch(self, step: Step, shape: BatchShape) -> Batch:
        """The arrays of a step; rows that it lacks are padding."""
        batch = empty_batch(shape)
        for row, indices in enumerate(step.rows):
            start, slot = 0, 0
            for number, sequence in enumerate((self.sequences[i] for i in indices), start=1):
                here = row, slice(start, start + sequence.num_inputs)
                batch.rows.tokens[here] = sequence.ids[:-1]
                batch.rows.positions[here] = np.arange(sequence.num_inputs)
                batch.rows.segments[here] = number
                if batch.rows.adapter_ids is not None and sequence.agents is not None:
                    batch.rows.adapter_ids[here] = sequence.agents[:-1]
                with_loss = np.flatnonzero(sequence.is_output[1:])
                slots = row, slice(slot, slot + len(with_loss))
                batch.loss_positions[slots] = start + with_loss
                batch.targets[slots] = sequence.ids[1:][with_loss]
                batch.weights[slots] = 1.0
                start, slot = start + sequence.num_inputs, slot + len(with_loss)
        return batch

    @property
    def by_token(self) -> bool:
        """Whether each token has its agent."""
        return self.sequences[0].agents is not None

    def _drawn(self, rng: np.random.Generator | None) -> list[int]:
        """The sequences of an epoch, by index; without `rng` those that validation looks at."""
        return list(range(len(self._lengths)))

    def _first_fit(self, order: Sequence[int]) -> dict[int, list[list[int]]]:
        """Rows by length. Long sequences come first, so that short ones fill up what they leave of their rows."""
        rows: dict[int, list[list[int]]] = {}
        still_open: list[_OpenRow] = []
        for index in sorted(order, key=lambda i: -self._row_length(i)):
            needed = self._lengths[index]
            row = next((row for row in still_open if row.slots_left >= needed), None)
            if row is None:
                row = _OpenRow(self._row_length(index))
                rows.setdefault(row.slots_left, []).append(row.indices)
                still_open = [*still_open[-_OPEN_ROWS + 1 :], row]
            row.indices.append(index)
            row.slots_left -= needed
            if row.slots_left < self._shortest:
                still_open.remove(row)
        return rows

    def _row_length(self, index: int) -> int:
        length = self._sequence_length
        while length < self._lengths[index]:
            length *= 2
        return length


def batch_shapes(packers_and_steps: Sequence[tuple[Packer, Sequence[Step]]]) -> Mapping[int, BatchShape]:
    """By row length, one shape for the steps of all agents, so that they run one program."""
    slots: dict[int, int] = {}
    for packer, steps in packers_and_steps:
        for length, count in packer.loss_slots(steps).items():
            slots[length] = max(slots.get(length, 0), count)
    any_packer = packers_and_steps[0][0]
    return {
        length: BatchShape(
            any_packer.num_rows(length),
            length,
            -(-count // _LOSS_SLOTS_MULTIPLE) * _LOSS_SLOTS_MULTIPLE,
            any_packer.by_token,
        )
        for length, count in sorted(slots.items())
    }
