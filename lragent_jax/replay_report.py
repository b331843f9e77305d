"""What a replay measured, as numbers."""

import dataclasses
import json

from lragent_jax.recording import OutputKind
from lragent_jax.sharing import SharingMode

DECODED_TOKENS = 16
"""Length of the call that measures a mode's decode speed."""


@dataclasses.dataclass(frozen=True)
class KindReport:
    """Outputs of one kind: means over their `positions`."""

    positions: int
    top1_agreement: float
    kl: float
    nll: float


@dataclasses.dataclass(frozen=True)
class ModeReport:
    """One sharing mode over all replayed trajectories.

    `prefilled_tokens`, `cached_tokens` and `ttft_s` (seconds to the first logits) are sums over all calls.
    `cache_bytes` is what the largest trajectory holds at its end, base and low-rank pages together. `tokens_per_s` is
    the speed of one greedy call of `DECODED_TOKENS` tokens at the end of the first trajectory, behind its first token.
    `top1_agreement`, `kl` (nats, reference against mode) and `nll` (nats, of the recorded tokens) are means over all
    positions of the recorded outputs; `by_kind` has them for each kind of output. `tokens_per_s` is None where
    decoding was not measured.
    """

    prefilled_tokens: int
    cached_tokens: int
    cache_bytes: int
    ttft_s: float
    tokens_per_s: float | None
    top1_agreement: float
    kl: float
    nll: float
    by_kind: dict[OutputKind, KindReport]


@dataclasses.dataclass(frozen=True)
class ReplayReport:
    """What `replay` measured, the reference mode first. `num_tokens` counts contexts and outputs of all trajectories,
    `num_output_tokens` the recorded outputs alone; `notes` say what was left out."""

    modes: dict[SharingMode, ModeReport]
    reference: SharingMode
    num_trajectories: int
    num_outputs: int
    num_tokens: int
    num_output_tokens: int
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """One line: {"modes": {mode: the fields of `ModeReport`}}."""
        return json.dumps({"modes": {mode: dataclasses.asdict(report) for mode, report in self.modes.items()}})
