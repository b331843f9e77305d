"""How the next token is drawn on the device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from lragent_jax.models.cache_view import HostOrDevice
from lragent_jax.models.errors import InputError
from lragent_jax.models.pytree import pytree
from lragent_jax.sampling_params import SamplingParams

MAX_STOP_IDS = 8
"""Stop ids per row that the device compares with; EOS ids of the model count too."""


@pytree
class SamplingArrays:
    """`SamplingParams` of a batch on the device. `stop_ids` [B, MAX_STOP_IDS] is padded with -1."""

    temperature: Float[HostOrDevice, " B"]
    top_k: Int[HostOrDevice, " B"]
    top_p: Float[HostOrDevice, " B"]
    seed: UInt32[HostOrDevice, " B"]
    stop_ids: Int[HostOrDevice, "B n"]
    max_new_tokens: Int[HostOrDevice, " B"]


def sampling_arrays(
    params: Sequence[SamplingParams], max_new_tokens: Sequence[int], eos_token_ids: Sequence[int], batch: int
) -> SamplingArrays:
    """Packs the rows' parameters, padded to `batch` rows that generate nothing. Host arrays; jit moves them."""
    stops = np.full((batch, MAX_STOP_IDS), -1, np.int32)
    for row, p in enumerate(params):
        ids = stop_ids(p, eos_token_ids)
        stops[row, : len(ids)] = ids

    def pack(values, dtype) -> np.ndarray:
        packed = np.zeros(batch, dtype)
        packed[: len(params)] = list(values)
        return packed

    return SamplingArrays(
        temperature=pack((p.temperature for p in params), np.float32),
        top_k=pack((min(p.top_k, 2**31 - 1) for p in params), np.int32),
        top_p=pack((p.top_p for p in params), np.float32),
        seed=pack((p.seed for p in params), np.uint32),
        stop_ids=stops,
        max_new_tokens=pack(max_new_tokens, np.int32),
    )


def stop_ids(params: SamplingParams, eos_token_ids: Sequence[int]) -> list[int]:
    """The ids that end a row; raises `InputError` if there are more than the device compares with."""
    ids = dict.fromkeys([*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)])
    if len(ids) > MAX_STOP_IDS:
        raise InputError(f"{len(ids)} stop ids (EOS included), but at most {MAX_STOP_IDS} are compared per row")
    return list(ids)


def sample(
    logits: Float[Array, "B V"], sampling: SamplingArrays, token_index: Int[Array, " B"], draws: bool | None = None
) -> Int[Array, " B"]:
    """The next token of each row; `token_index` counts the tokens it has generated. Sorts only if a row samples.

    `draws`: whether one does, where the host knows. Without, the device decides, for which a GPU's host waits.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> Int[Array, " B"]:
        kept = _keep_top(logits / jnp.maximum(sampling.temperature, 1e-6)[:, None], sampling)
        keys = jax.vmap(lambda seed, index: jax.random.fold_in(jax.random.key(seed), index))(sampling.seed, token_index)
        drawn = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
        return jnp.where(sampling.temperature > 0, drawn, greedy)

    if draws is not None:
        return draw() if draws else greedy
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
