"""What the device was given and the host has not read: chunks of prefill, blocks of decode steps, and their tokens."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lragent_jax.dispatcher import Dispatched, Dispatcher
from lragent_jax.executor import DecodeBatch, Executor, Row
from lragent_jax.request import Request
from lragent_jax.sampling import SamplingArrays, sampling_arrays
from lragent_jax.scheduler import batch_size

_SHRINK = 8
"""A decode batch is padded to as many rows as before until an eighth would do: programs and tables stay the same."""


@dataclasses.dataclass(frozen=True)
class InFlight:
    """Tokens [B, steps] that the device is about to have, and whose they are: (request, its row then, row of B)."""

    tokens: jax.Array | Dispatched
    rows: list[tuple[Request, Row, int]]

    def read(self) -> np.ndarray:
        """The tokens, once the device has them; raises what went wrong with them."""
        tokens = self.tokens.result() if isinstance(self.tokens, Dispatched) else self.tokens
        jax.block_until_ready(tokens)
        return np.asarray(tokens) if self.rows else np.empty(0)


class DeviceWork:
    """Gives the device its work, in order, and hands back what comes of it. Called by whoever steps.

    When is a result read? When the device has it, and not before the device has its next work:

    * A prefill is dispatched by the thread that steps, which is soon done. A block of decode steps is dispatched by a
      thread of its own: on a GPU that takes as long as the block (see `Dispatcher`).
    * First tokens are read while the block that was given out behind their prefill runs. So the time to a first token
      is that of its prefill and of what the device had before, and costs the device nothing.
    * The next step begins when the block has been dispatched: on a GPU, when the device is at its end. So whoever came
      meanwhile is in it, and the device waits, once per block, for the host to plan and to dispatch. Then, while the
      next block runs, what this one wrote is made into strings and handed out: a stream is as far behind the device as
      planning takes, and never a block.
    * Where dispatching does not block, all the same happens earlier: the next step is planned and dispatched while the
      block runs, and the device never waits.

    Reading a block before the next one is given out would let the device wait until the tokens of all rows are text.
    Planning before a block ends would spare it the wait for the plan, and would have whoever comes during a block wait
    for the whole next one, too.
    """

    def __init__(
        self, executor: Executor, eos_token_ids: Sequence[int], scope: Callable[[], contextlib.AbstractContextManager]
    ):
        self._executor, self._eos_token_ids, self._scope = executor, tuple(eos_token_ids), scope
        self.dispatcher = Dispatcher()
        self._left: list[InFlight] = []  # of the step before
        self._given: list[InFlight] = []  # by this step
        self._logits: jax.Array | None = None  # of this step's last prefill, unless somebody begins to decode
        self._decode_key: tuple = ()
        self._decode_batch: DecodeBatch | None = None
        self._decode_size = 1

    @property
    def has_results(self) -> bool:
        """Whether there is anything to read, now or later."""
        return bool(self._left or self._given)

    def prefill(self, requests: Sequence[Request]) -> list[Request]:
        """Runs the next chunk of each. Returns those for whom it was the last: they begin to decode."""
        rows = [request.row for request in requests if request.row is not None]
        chunks = [row.chunks[request.next_chunk] for request, row in zip(requests, rows, strict=True)]
        logits, _ = self._executor.run_chunks(rows, chunks)
        for request in requests:
            request.next_chunk += 1
        ended = [request for request in requests if not request.needs_prefill]
        self._logits = None if ended else logits
        if ended:
            tokens = self._executor.begin(
                logits,
                [None if request.needs_prefill else request.slot for request in requests],
                [len(request.trajectory) for request in requests],
                self._sampling(requests, logits.shape[0]),
                [len(request.generated.token_ids) for request in requests],
            )
            tokens.copy_to_host_async()
            of_rows = [(request, row, b) for b, (request, row) in enumerate(zip(requests, rows, strict=True))]
            self._given.append(InFlight(tokens, [entry for entry in of_rows if not entry[0].needs_prefill]))
        for request in ended:
            request.state, request.num_dispatched = "decoding", len(request.generated.token_ids) + 1
        return ended

    def decode(self, requests: Sequence[Request], num_steps: int, num_running: int) -> None:
        """Up to `num_steps` more tokens for each; `num_running` requests decode or will soon."""
        fitting = batch_size(num_running)
        size = max(fitting, batch_size(self._executor.min_batch_size))
        self._decode_size = size if fitting * _SHRINK <= self._decode_size else max(size, self._decode_size)
        rows = [request.row for request in requests if request.row is not None]
        key = (self._decode_size, *((r.id, r.num_admissions, r.num_reserved) for r in requests))
        if key != self._decode_key or self._decode_batch is None:
            slots = [request.slot for request in requests if request.slot is not None]
            sampling = self._sampling(requests, self._decode_size)
            self._decode_batch = self._executor.decode_batch(rows, slots, sampling, self._decode_size)
            self._decode_key = key
        # What JAX keeps for every thread, and what programs are compiled by.
        device, precision = jax.config.jax_default_device, jax.config.jax_default_matmul_precision  # pyright: ignore
        tokens = self.dispatcher.submit(
            functools.partial(_decode, self._executor, self._scope, self._decode_batch, num_steps, device, precision)
        )
        for request in requests:
            request.num_dispatched = min(request.num_dispatched + num_steps, request.generated.max_new_tokens)
        of_rows = [(request, row, b) for b, (request, row) in enumerate(zip(requests, rows, strict=True))]
        self._given.append(InFlight(tokens, of_rows))

    def results(self) -> Iterator[InFlight]:
        """Ends a step: all that the device was given before what it was given last, which is left to the next step."""
        if self._logits is not None and not self._given:
            self._given = [InFlight(self._logits, [])]  # so that the host is one step ahead, not many
        due, self._left = [*self._left, *self._given[:-1]], self._given[-1:]
        self._given, self._logits = [], None
        yield from due

    def failure(self) -> tuple[BaseException, InFlight] | None:
        """What went wrong in the block that the step before gave out, and whose it was. The dispatcher is done."""
        for entry in self._left:
            if isinstance(entry.tokens, Dispatched) and entry.tokens.error is not None:
                return entry.tokens.error, entry
        return None

    def forget(self) -> None:
        """Nobody wants what is under way any more."""
        self._left, self._given, self._logits = [], [], None

    def shrink(self) -> None:
        """Nobody is left: the next decode batch is as small as it can be."""
        self._decode_size, self._decode_batch = 1, None

    def _sampling(self, requests: Sequence[Request], batch: int) -> SamplingArrays:
        limits = [request.generated.max_new_tokens for request in requests]
        return sampling_arrays([request.params for request in requests], limits, self._eos_token_ids, batch)


def _decode(
    executor: Executor,
    scope: Callable[[], contextlib.AbstractContextManager],
    batch: DecodeBatch,
    num_steps: int,
    device: Any,
    precision: Any,
) -> jax.Array:
    with jax.default_device(device), jax.default_matmul_precision(precision), scope():
        tokens = executor.decode(batch, num_steps)
        tokens.copy_to_host_async()
        return tokens
