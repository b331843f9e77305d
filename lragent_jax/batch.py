"""The rows of one call, from the checks to what comes back."""

import time

import numpy as np

from lragent_jax.executor import Row
from lragent_jax.generated_row import GeneratedRow
from lragent_jax.outputs import GenerationOutput
from lragent_jax.sampling_params import SamplingParams
from lragent_jax.trajectory import Trajectory


class Batch:
    """The rows of one call of `generate` or `stream`."""

    def __init__(
        self,
        trajectories: list[Trajectory],
        agents: list[str | None],
        generated: list[GeneratedRow],
        params: list[SamplingParams],
        started: float,
    ):
        self.trajectories, self.agents = trajectories, agents
        self.generated, self.params, self.started = generated, params, started
        self.rows: list[Row] = []  # once the device is ours
        self.ttft_s = 0.0
        self.failed = False

    @property
    def finished(self) -> bool:
        return all(generated.finish_reason for generated in self.generated)

    def finished_rows(self, batch_size: int) -> np.ndarray:
        """bool [B] for the device; rows that only pad the batch have nothing to do."""
        finished = np.ones(batch_size, bool)
        finished[: len(self.generated)] = [generated.finish_reason is not None for generated in self.generated]
        return finished

    def push(self, tokens: np.ndarray) -> None:
        """Hands [B, steps] new tokens to the rows; -1 marks steps that a finished row did not take."""
        for generated, row_tokens in zip(self.generated, tokens, strict=False):
            for token in row_tokens[row_tokens >= 0]:
                generated.push(int(token))

    def discard(self) -> None:
        """Something went wrong: no token joins."""
        self.failed = True
        for generated in self.generated:
            generated.discard()

    def settle(self) -> None:
        """Lets the tokens join, and forgets what the device wrote beyond them."""
        for row, generated in zip(self.rows, self.generated, strict=bool(self.rows)):
            length = len(row.trajectory)
            row.trajectory.join(generated.token_ids)
            row.commit(length, length + generated.num_run)
            row.release_unused()

    def outputs(self) -> list[GenerationOutput]:
        return [self._output(row, generated) for row, generated in zip(self.rows, self.generated, strict=True)]

    def _output(self, row: Row, generated: GeneratedRow) -> GenerationOutput:
        assert generated.finish_reason is not None
        return GenerationOutput(
            text=generated.text,
            token_ids=list(generated.token_ids),
            finish_reason=generated.finish_reason,
            num_prefilled_tokens=row.num_prefilled_tokens,
            num_cached_tokens=row.num_cached_tokens,
            ttft_s=self.ttft_s,
            latency_s=time.perf_counter() - self.started,
        )
