"""What calls return."""

import dataclasses
from typing import Literal

import numpy as np

FinishReason = Literal["stop", "length"]
"""`stop`: a stop string, a stop id or EOS. `length`: max_new_tokens, or the end of the model's context."""


@dataclasses.dataclass(frozen=True)
class GenerationOutput:
    """One finished call of `Engine.generate`.

    `text` is None without a tokenizer, and cut in front of a stop string; `token_ids` are the ids that joined the
    trajectory. `num_prefilled_tokens` were run before the first token (in mode `rebase` the last one twice: to be
    cached and to be read), `num_cached_tokens` of the context were read from the cache instead. Times in seconds,
    from the call to the first token (`ttft_s`) and to the end (`latency_s`).
    """

    text: str | None
    token_ids: list[int]
    finish_reason: FinishReason
    num_prefilled_tokens: int
    num_cached_tokens: int
    ttft_s: float
    latency_s: float


@dataclasses.dataclass(frozen=True)
class StreamPiece:
    """What `Engine.stream` yields: new text (never half a character, never part of a stop string) and new ids.

    The last piece carries `output`, the whole call.
    """

    text: str
    token_ids: list[int]
    output: GenerationOutput | None = None


@dataclasses.dataclass(frozen=True)
class ScoreOutput:
    """A recorded output under one agent: `logits` f32 [T, V], row i scoring token i given everything before it.

    Counts and time are those of the context's prefill, as in `GenerationOutput`.
    """

    logits: np.ndarray
    num_prefilled_tokens: int
    num_cached_tokens: int
    ttft_s: float
