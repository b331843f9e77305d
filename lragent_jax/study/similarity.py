"""How alike agents see the same tokens: the figure of LRAgent (arXiv 2602.01053) that its method rests on.

V of agent j is X_j W + (X_j A_j) B_j, where X_j are the states of an agent that has read everything on its own.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lragent_jax.generation import exact_matmuls
from lragent_jax.models.adapter import Adapter
from lragent_jax.models.adapter_bank import expand, shrink_by_group
from lragent_jax.models.bank_builder import build_bank
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import InputError
from lragent_jax.models.layer_adapters import LayerAdapters
from lragent_jax.models.packed_rows import PackedRows
from lragent_jax.models.rope import inverse_frequencies, rotation
from lragent_jax.recording import Recording

PARTS = ("base", "low_rank", "adapter")
"""X W, X A and X A B."""

_BUCKET = 256


def value_similarity(
    config: LlamaConfig,
    graphdef,
    params,
    adapters: Mapping[str, Adapter],
    recordings: Sequence[Recording],
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Float[np.ndarray, " L"]]:
    """Cosine similarity of each of `PARTS` of V across agents, by layer: the mean over tokens and pairs of agents.

    `config, graphdef, params` are what `read_model` returns. All agents read every recording whole, each on its own.
    """
    if len(adapters) < 2 or not all("v" in adapter.targets for adapter in adapters.values()):
        raise InputError("similarity needs two agents or more, and every one must adapt v")
    bank = build_bank(config, list(adapters.values()), jax.tree.leaves(params)[0].dtype)
    adapter_ids = jnp.arange(1, len(adapters) + 1, dtype=jnp.int32)
    model = nnx.merge(graphdef, params)
    layers = [nnx.split(layer) for layer in model.layers]
    sums, num_tokens = np.zeros((config.num_layers, len(PARTS))), 0
    with exact_matmuls(params):
        for i, recording in enumerate(recordings):
            if progress:
                progress(i, len(recordings), "similarity")
            rows, length = _rows(recording, len(adapters))
            x = model.embed[...][rows.tokens]
            found = []
            for layer, (layer_graph, state) in enumerate(layers):
                of_layer = LayerAdapters(bank.layers[layer], bank.group_of, adapter_ids)
                x, similarity = _run_layer(layer_graph, state, x, of_layer, rows, np.int32(length), config)
                found.append(similarity)
            sums += np.asarray(jnp.stack(found), np.float64)
            num_tokens += length
    if progress:
        progress(len(recordings), len(recordings), "similarity")
    return {part: sums[:, i] / num_tokens for i, part in enumerate(PARTS)}


def _rows(recording: Recording, num_agents: int) -> tuple[PackedRows, int]:
    """The recording once for every agent, padded."""
    ids = [token for part in recording.parts for token in part.ids]
    width = -(-len(ids) // _BUCKET) * _BUCKET
    tokens, segments = np.zeros(width, np.int32), np.zeros(width, np.int32)
    tokens[: len(ids)], segments[: len(ids)] = ids, 1
    arrays = (tokens, np.arange(width, dtype=np.int32), segments)
    return PackedRows(*(np.tile(array, (num_agents, 1)) for array in arrays)), len(ids)


@functools.partial(jax.jit, static_argnames=("graphdef", "config"))
def _run_layer(graphdef, state, x, adapters: LayerAdapters, rows: PackedRows, length, config):
    """The layer's output, and the similarities [3] of its V's parts, summed over tokens."""
    block = nnx.merge(graphdef, state)
    normed = block.attention_norm(x)
    pair = adapters.pairs["v"]
    low_rank = shrink_by_group(normed, pair.lora_a, adapters.group_of["v"][adapters.adapter_ids])
    values = (block.attention.v(normed), low_rank, expand(low_rank, pair.lora_b[adapters.adapter_ids]))
    real = jnp.arange(x.shape[1]) < length
    similarity = jnp.stack([jnp.sum(jnp.where(real, _cosine(value), 0.0)) for value in values])
    rope = rotation(jnp.asarray(rows.positions), inverse_frequencies(config))
    return block.packed(x, adapters, rope, rows.mask(), None), similarity


def _cosine(x: Float[Array, "B T width"]) -> Float[Array, " T"]:
    """The mean over pairs of rows."""
    x = x.astype(jnp.float32)
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)
    first, second = np.triu_indices(x.shape[0], 1)
    return jnp.mean(jnp.sum(x[first] * x[second], axis=-1), axis=0)
