"""How the next token is chosen, on the host (parameters) and on the device (the draw)."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lragent_jax.models.cache_view import HostOrDevice
from lragent_jax.models.errors import InputError
from lragent_jax.models.pytree import pytree

MAX_STOP_IDS = 8
"""Stop ids per row that the device compares with; EOS ids of the model count too."""


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
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(int(i) for i in self.stop_token_ids))
        checks = (
            ("max_new_tokens", _is_int(self.max_new_tokens) and self.max_new_tokens >= 1, "a positive integer"),
            ("temperature", _is_number(self.temperature) and self.temperature >= 0, "a finite number >= 0"),
            ("top_k", _is_int(self.top_k) and self.top_k >= 0, "an integer >= 0 (0 keeps every token)"),
            ("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("seed", _is_int(self.seed) and 0 <= self.seed < 2**32, "an integer in [0, 2**32)"),
            ("stop", all(isinstance(s, str) and s for s in self.stop), "non-empty strings"),
            ("stop_token_ids", all(i >= 0 for i in self.stop_token_ids), "token ids >= 0"),
        )
        for name, ok, wanted in checks:
            if not ok:
                raise InputError(f"{name} must be {wanted}, not {getattr(self, name)!r}")


def _is_int(value) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and bool(np.isfinite(value))


@pytree
class SamplingArrays:
    """`SamplingParams` of a batch on the device. `stop_ids` [B, MAX_STOP_IDS] is padded with -1."""

    temperature: Float[HostOrDevice, " B"]
    top_k: Int[HostOrDevice, " B"]
    top_p: Float[HostOrDevice, " B"]
    seed: Int[HostOrDevice, " B"]
    stop_ids: Int[HostOrDevice, "B n"]
    max_new_tokens: Int[HostOrDevice, " B"]


def sampling_arrays(
    params: Sequence[SamplingParams], max_new_tokens: Sequence[int], eos_token_ids: Sequence[int], batch: int
) -> SamplingArrays:
    """Packs the rows' parameters, padded to `batch` rows that generate nothing. Host arrays; jit moves them."""
    stop_ids = np.full((batch, MAX_STOP_IDS), -1, np.int32)
    for row, p in enumerate(params):
        ids = dict.fromkeys([*p.stop_token_ids, *(() if p.ignore_eos else eos_token_ids)])
        if len(ids) > MAX_STOP_IDS:
            raise InputError(f"{len(ids)} stop ids (EOS included), but at most {MAX_STOP_IDS} are compared per row")
        stop_ids[row, : len(ids)] = list(ids)

    def pack(values, dtype) -> np.ndarray:
        packed = np.zeros(batch, dtype)
        packed[: len(params)] = list(values)
        return packed

    return SamplingArrays(
        temperature=pack((p.temperature for p in params), np.float32),
        top_k=pack((min(p.top_k, 2**31 - 1) for p in params), np.int32),
        top_p=pack((p.top_p for p in params), np.float32),
        seed=pack((p.seed for p in params), np.uint32),
        stop_ids=stop_ids,
        max_new_tokens=pack(max_new_tokens, np.int32),
    )


def sample(
    logits: Float[Array, "B V"], sampling: SamplingArrays, token_index: Int[Array, " B"]
) -> Int[Array, " B"]:
    """The next token of each row; `token_index` counts the tokens it has generated. Sorts only if a row samples."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> Int[Array, " B"]:
        kept = _keep_top(logits / jnp.maximum(sampling.temperature, 1e-6)[:, None], sampling)
        keys = jax.vmap(lambda seed, index: jax.random.fold_in(jax.random.key(seed), index))(sampling.seed, token_index)
        drawn = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
        return jnp.where(sampling.temperature > 0, drawn, greedy)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), draw, lambda: greedy)


def _keep_top(scores: Float[Array, "B V"], sampling: SamplingArrays) -> Float[Array, "B V"]:
    """-inf for every token outside the top k, and outside the smallest set of probability top_p (nucleus sampling)."""
    descending = -jnp.sort(-scores, axis=-1)
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, scores.shape[-1]), scores.shape[-1])
    probs = jax.nn.softmax(descending, axis=-1)
    rank = jnp.arange(scores.shape[-1])
    mass_before = jnp.cumsum(probs, axis=-1) - probs
    kept = (rank < k[:, None]) & ((mass_before < sampling.top_p[:, None]) | (rank == 0))
    lowest = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scores >= lowest, scores, -jnp.inf)


def is_stop(tokens: Int[Array, " B"], sampling: SamplingArrays) -> Bool[Array, " B"]:
    """Whether a token ends its row."""
    return jnp.any(tokens[:, None] == sampling.stop_ids, axis=-1)
