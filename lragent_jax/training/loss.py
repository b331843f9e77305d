"""Cross-entropy of output tokens: scores over the vocabulary exist only where there is a loss, a chunk at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lragent_jax.models.cache_view import HostOrDevice
from lragent_jax.models.llama import Llama
from lragent_jax.training.packing import Batch

_SCORES_BYTES = 2**30
"""Of the f32 scores that exist at once."""


def output_hidden(hidden: Float[Array, "B T D"], positions: Int[HostOrDevice, "B M"]) -> Float[Array, "B M D"]:
    """The hidden states with a loss; zeros for positions beyond the row."""

    def of_row(hidden, positions):
        return hidden.at[positions].get(mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True)

    return jax.vmap(of_row)(hidden, positions)


def summed_loss(model: Llama, hidden: Float[Array, "B T D"], batch: Batch) -> Float[Array, ""]:
    """Negative log-likelihood of all output tokens, in nats; differentiable in `hidden`, f32."""
    losses = token_losses(output_hidden(hidden, batch.loss_positions), unembedding(model), batch.targets)
    return jnp.sum(losses * batch.weights)


def losses_and_hits(
    model: Llama, hidden: Float[Array, "B T D"], batch: Batch
) -> tuple[Float[Array, "B M"], Float[Array, "B M"]]:
    """(negative log-likelihood of every output token, 1 where it was the likeliest); 0 in slots without one."""
    picked = output_hidden(hidden, batch.loss_positions)

    def of_chunk(hidden, targets):
        losses, _, hits = _score(hidden, unembedding(model), targets)
        return losses, hits

    losses, hits = _in_chunks(of_chunk, picked, batch.targets, unembedding(model).shape[0])
    return losses * batch.weights, hits * batch.weights


def unembedding(model: Llama) -> Float[Array, "V D"]:
    """What hidden states are multiplied by; where it is stored as [D, V] the turn is part of the product."""
    return model.embed[...] if model.unembed is None else model.unembed[...].T


@jax.custom_vjp
def token_losses(
    hidden: Float[Array, "B M D"], unembed: Float[Array, "V D"], targets: Int[Array, "B M"]
) -> Float[Array, "B M"]:
    """Negative log-likelihood of every target, f32; `unembed` is not differentiated.

    The gradient is that of a frozen unembedding times one number per token, so the forward pass computes it while the
    scores are there, and nothing of the vocabulary's size outlives it.
    """
    return _in_chunks(lambda h, t: _score(h, unembed, t)[0], hidden, targets, unembed.shape[0])


def _forward(hidden, unembed, targets):
    def of_chunk(hidden, targets):
        losses, scores_gradient, _ = _score(hidden, unembed, targets)
        # In the model's dtype: f32 here would make an f32 copy of the unembedding.
        gradient = jnp.einsum("bmv,vd->bmd", scores_gradient.astype(hidden.dtype), unembed)
        return losses, gradient

    return _in_chunks(of_chunk, hidden, targets, unembed.shape[0])


def _backward(gradient, cotangent):
    return (gradient * cotangent[..., None].astype(gradient.dtype)).astype(gradient.dtype), None, None


token_losses.defvjp(_forward, _backward)


def _score(
    hidden: Float[Array, "B m D"], unembed: Float[Array, "V D"], targets: Int[Array, "B m"]
) -> tuple[Float[Array, "B m"], Float[Array, "B m V"], Bool[Array, "B m"]]:
    """(loss, its gradient in the scores, whether the target scored best)"""
    scores = jnp.einsum("bmd,vd->bmv", hidden, unembed, preferred_element_type=jnp.float32)
    is_target = jnp.arange(unembed.shape[0]) == targets[..., None]
    lse = jax.nn.logsumexp(scores, axis=-1)
    of_target = jnp.sum(jnp.where(is_target, scores, 0), axis=-1)
    gradient = jnp.exp(scores - lse[..., None]) - is_target
    return lse - of_target, gradient, jnp.argmax(scores, axis=-1) == targets


def _in_chunks(function: Callable[..., Any], hidden, targets, vocab_size: int):
    """`function` of (hidden, targets) in chunks of M whose scores fit into `_SCORES_BYTES`."""
    rows, slots = targets.shape
    num_chunks = -(-rows * slots * vocab_size * 4 // _SCORES_BYTES)
    if num_chunks <= 1:
        return function(hidden, targets)
    size = -(-slots // num_chunks)

    def cut(x):
        padded = jnp.pad(x, [(0, 0), (0, num_chunks * size - slots), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(padded.reshape(rows, num_chunks, size, *x.shape[2:]), 1, 0)

    def joined(x):
        return jnp.moveaxis(x, 0, 1).reshape(rows, num_chunks * size, *x.shape[3:])[:, :slots]

    return jax.tree.map(joined, jax.lax.map(lambda chunk: function(*chunk), (cut(hidden), cut(targets))))
