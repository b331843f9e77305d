"""How far next-token distributions have moved."""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float

_ROWS = 32  # positions at a time: a vocabulary in float64 is a megabyte


class Drift:
    """Compares logits with those of a reference, position by position, in float64 on the host."""

    def __init__(self):
        self.num_positions = 0
        self._num_agreeing = 0
        self._kl = self._nll = 0.0

    def add(
        self,
        reference: Float[np.ndarray, "T V"],
        logits: Float[np.ndarray, "T V"],
        token_ids: Sequence[int] | None = None,
    ) -> None:
        """T more positions. `token_ids` are the tokens that followed, for `nll`."""
        for start in range(0, len(reference), _ROWS):
            p = _log_softmax(reference[start : start + _ROWS])
            q = _log_softmax(logits[start : start + _ROWS])
            self._kl += float(np.sum(np.exp(p) * (p - q)))
            self._num_agreeing += int(np.sum(p.argmax(axis=-1) == q.argmax(axis=-1)))
            if token_ids is not None:
                self._nll -= float(np.sum(q[np.arange(len(q)), token_ids[start : start + _ROWS]]))
        self.num_positions += len(reference)

    @classmethod
    def total(cls, parts: Iterable["Drift"]) -> "Drift":
        """Over the positions of all parts."""
        total = cls()
        for part in parts:
            total.num_positions += part.num_positions
            total._num_agreeing += part._num_agreeing
            total._kl += part._kl
            total._nll += part._nll
        return total

    @property
    def top1_agreement(self) -> float:
        """The share of positions where both find the same token likeliest."""
        return self._num_agreeing / self.num_positions

    @property
    def kl(self) -> float:
        """KL(reference || other) in nats, the mean over positions."""
        return self._kl / self.num_positions

    @property
    def nll(self) -> float:
        """-log of what `logits` gave the tokens that followed, in nats, the mean over positions."""
        return self._nll / self.num_positions


def _log_softmax(logits: Float[np.ndarray, "T V"]) -> Float[np.ndarray, "T V"]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
