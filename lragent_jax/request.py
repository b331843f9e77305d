"""One request on its way: what was asked, where it stands, what has come of it."""

import collections
import dataclasses
import time
from collections.abc import Callable, Hashable
from typing import Literal

from lragent_jax.executor import Row
from lragent_jax.generated_row import GeneratedRow
from lragent_jax.outputs import GenerationOutput, StreamPiece
from lragent_jax.sampling_params import SamplingParams
from lragent_jax.trajectory import Trajectory

RequestState = Literal["waiting", "prefilling", "decoding", "preempted", "finished", "cancelled", "failed"]
"""`preempted` waits, too, and goes on where it was; behind the last three nothing changes any more."""


@dataclasses.dataclass(eq=False)
class Request:
    """One trajectory under one agent, from its arrival to its last token.

    `max_steps`: the most tokens between two looks of its reader. `is_private`: whether the trajectory is the request's
    own, to be closed at its end. `pieces`: what a reader has not taken yet, if there is one. `listener` is called, by
    whoever steps, when tokens have come and when the request has ended; it must not wait for anything.
    """

    trajectory: Trajectory
    agent: str | None
    params: SamplingParams
    generated: GeneratedRow
    max_steps: int
    is_private: bool
    pieces: collections.deque[StreamPiece] | None = None
    listener: Callable[[], None] | None = None

    id: int = -1  # by arrival
    state: RequestState = "waiting"
    error: BaseException | None = None
    row: Row | None = None  # while it has pages, as has the slot
    slot: int | None = None
    next_chunk: int = 0
    num_reserved: int = 0  # tokens of the trajectory that there are pages for
    num_dispatched: int = 0  # generated tokens at most, when all that the device was given is done
    num_taken: int = 0  # generated tokens that were made into pieces
    num_admissions: int = 0
    num_prefilled_tokens: int = 0
    num_cached_tokens: int = 0
    page_names: list[Hashable] = dataclasses.field(default_factory=list)  # of its full pages of token ids
    awaits: frozenset[Hashable] = frozenset()  # the next pages that it lacked when it was looked at last
    arrived_at: float = dataclasses.field(default_factory=time.perf_counter)
    first_token_at: float | None = None
    last_token_at: float | None = None

    def __post_init__(self):
        self.start_length = len(self.trajectory)

    @property
    def done(self) -> bool:
        return self.state in ("finished", "cancelled", "failed")

    @property
    def needs_prefill(self) -> bool:
        return self.row is None or self.next_chunk < len(self.row.chunks)

    @property
    def steps_left(self) -> int:
        """The most tokens that the device may still be given to decode."""
        return self.generated.max_new_tokens - max(self.num_dispatched, 1)

    @property
    def longest(self) -> int:
        """Tokens in the cache behind the longest output; the one sampled last is not run."""
        return self.start_length + self.generated.max_new_tokens - 1

    @property
    def num_joined(self) -> int:
        """Generated tokens that are in the trajectory."""
        return len(self.trajectory) - self.start_length

    @property
    def num_given(self) -> int:
        """Generated tokens that the reader has taken."""
        return self.num_taken - sum(len(piece.token_ids) for piece in self.pieces or ())

    def take_pieces(self, *, ends: bool = False) -> None:
        """Puts what has become certain aside for the reader, with the output if the request `ends`."""
        if self.pieces is None:
            return
        ids = self.generated.token_ids[self.num_taken :]
        text = self.generated.take_text()
        self.num_taken += len(ids)
        output = self.output() if ends else None
        if text or ids or output:
            self.pieces.append(StreamPiece(text, ids, output))

    def notify(self) -> None:
        if self.listener is not None:
            self.listener()

    def output(self) -> GenerationOutput:
        """Of a finished request."""
        generated = self.generated
        assert generated.finish_reason is not None
        assert self.first_token_at is not None
        assert self.last_token_at is not None
        return GenerationOutput(
            text=generated.text,
            token_ids=list(generated.token_ids),
            finish_reason=generated.finish_reason,
            num_prefilled_tokens=self.num_prefilled_tokens,
            num_cached_tokens=self.num_cached_tokens,
            ttft_s=self.first_token_at - self.arrived_at,
            latency_s=self.last_token_at - self.arrived_at,
        )
