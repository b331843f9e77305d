"""What a caller asks for, checked and made into requests; its trajectories are held until it is over."""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Sequence

from lragent_jax.adapter_registry import AdapterRegistry
from lragent_jax.batching import Batcher
from lragent_jax.call_arguments import Prompt
from lragent_jax.executor import Executor
from lragent_jax.generated_row import GeneratedRow
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import InputError
from lragent_jax.request import Request
from lragent_jax.sampling import stop_ids
from lragent_jax.sampling_params import SamplingParams
from lragent_jax.tokenizer import Tokenizer
from lragent_jax.trajectory import Trajectory

LOOK_STEPS = 4
"""Tokens between two looks where somebody reads along or a stop string may come: enough to hide the host's work, few
enough to look alive, and few beyond a stop, at which the device goes on for as many."""


@dataclasses.dataclass(eq=False)
class Call:
    """Requests that were made together and end together."""

    batcher: Batcher
    requests: list[Request]
    held: contextlib.ExitStack
    was_ended: bool = False

    @property
    def is_over(self) -> bool:
        """Whether all requests are done, or one of them failed."""
        return self.num_done == len(self.requests) or any(request.error for request in self.requests)

    @property
    def num_done(self) -> int:
        return sum(request.done for request in self.requests)

    def is_beyond(self, num_done: int) -> bool:
        """Whether more than `num_done` requests are done, or the call is over."""
        return self.num_done > num_done or self.is_over

    def check(self) -> None:
        """Raises what a request failed with."""
        for request in self.requests:
            if request.error is not None:
                raise request.error

    def end(self) -> None:
        """Lets the trajectories go: all requests are done."""
        self.was_ended = True
        self.held.close()

    def abandon(self, keep_taken: bool = False) -> None:
        """Ends what is not done. Of a stream that was left, what its reader took stays; otherwise no token joins.

        Called inside `Batcher.exclusive`, again if that was interrupted; of a call that has ended it changes nothing.
        """
        if not self.was_ended:
            for request in self.requests:
                self.batcher.cancel(request, request.num_given if keep_taken else 0)
            self.was_ended = True  # from here on the trajectories are their owners'
        self.held.close()


class Caller:
    """Opens calls of one engine."""

    def __init__(
        self,
        config: LlamaConfig,
        tokenizer: Tokenizer | None,
        executor: Executor,
        registry: AdapterRegistry,
        batcher: Batcher,
        new_trajectory: Callable[[], Trajectory],
    ):
        self._config, self._tokenizer = config, tokenizer
        self._executor, self._registry, self._batcher = executor, registry, batcher
        self._new_trajectory = new_trajectory

    def open(
        self,
        prompts: Sequence[Prompt],
        agents: Sequence[str | None],
        params: Sequence[SamplingParams],
        *,
        streams: bool = False,
        listener: Callable[[], None] | None = None,
    ) -> Call:
        """Submits one request per prompt. Raises before anything is changed if one of them cannot be.

        `streams`: whether somebody reads the tokens as they come. `listener`: see `Request`.
        """
        self._batcher.refuse_inside()
        adapters = [self._registry.find(agent) for agent in agents]
        with contextlib.ExitStack() as held:
            requests = []
            for prompt, agent, adapter, one in zip(prompts, agents, adapters, params, strict=True):
                is_private = not isinstance(prompt, Trajectory)
                trajectory = prompt if isinstance(prompt, Trajectory) else self._new_trajectory().append(prompt)
                self.check_own(trajectory)
                held.enter_context(trajectory.extending())
                look = LOOK_STEPS if one.stop or streams else self._executor.decode_block
                request = Request(
                    trajectory=trajectory,
                    agent=agent,
                    params=one,
                    generated=self._generated_row(trajectory, one),
                    max_steps=min(look, self._executor.decode_block),
                    is_private=is_private,
                    pieces=collections.deque() if streams else None,
                    listener=listener,
                )
                self._executor.cache.check_fits(request.longest, self._executor.pools_read(adapter))
                requests.append(request)
            call = Call(self._batcher, requests, held.pop_all())
        self._batcher.submit(requests)
        return call

    def check_own(self, trajectory: Trajectory) -> None:
        if not isinstance(trajectory, Trajectory):
            given = type(trajectory).__name__
            raise InputError(f"this call takes a trajectory, not {given}: engine.trajectory().append(...) makes one")
        if not trajectory.is_in(self._executor.cache):
            raise InputError("this trajectory belongs to another engine; append its token_ids to one of this engine's")

    def room(self, trajectory: Trajectory) -> int:
        """How many tokens the model's context still takes."""
        if not len(trajectory):
            raise InputError("the trajectory is empty: append text or token ids before an agent reads it")
        return self._config.context_length - len(trajectory)

    def _generated_row(self, trajectory: Trajectory, params: SamplingParams) -> GeneratedRow:
        room = self.room(trajectory)
        if not room:
            raise InputError(f"the trajectory fills the model's context of {self._config.context_length} tokens")
        if params.stop and self._tokenizer is None:
            raise InputError("stop strings need a tokenizer, which this model came without; use stop_token_ids")
        return GeneratedRow(
            params,
            max_new_tokens=min(params.max_new_tokens, room),
            stop_ids=frozenset(stop_ids(params, self._config.eos_token_ids)),
            decoder=self._tokenizer.stream_decoder(trajectory.token_ids) if self._tokenizer else None,
        )
