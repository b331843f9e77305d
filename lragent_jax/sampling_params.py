"""What a caller can ask of generation."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from lragent_jax.models.errors import InputError


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """What one call generates and when it stops.

    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep every token. The draw of a row depends on `seed` and the
    index of the generated token alone, never on what else is in the batch. `stop` strings end the text in front of
    them; `stop_token_ids` and, unless `ignore_eos`, the model's EOS ids end it without joining the trajectory.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if not isinstance(value, Iterable):
                raise InputError(f"{name} must be a list, not {value!r}")
            object.__setattr__(self, name, tuple(value))
        checks = (
            ("max_new_tokens", _is_int(self.max_new_tokens) and self.max_new_tokens >= 1, "a positive integer"),
            ("temperature", _is_number(self.temperature) and self.temperature >= 0, "a finite number >= 0"),
            ("top_k", _is_int(self.top_k) and self.top_k >= 0, "an integer >= 0 (0 keeps every token)"),
            ("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("seed", _is_int(self.seed) and 0 <= self.seed < 2**32, "an integer in [0, 2**32)"),
            ("stop", all(isinstance(s, str) and s for s in self.stop), "non-empty strings"),
            ("stop_token_ids", all(_is_int(i) and 0 <= i < 2**31 for i in self.stop_token_ids), "token ids"),
        )
        for name, ok, wanted in checks:
            if not ok:
                raise InputError(f"{name} must be {wanted}, not {getattr(self, name)!r}")


def _is_int(value) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and bool(np.isfinite(value))
