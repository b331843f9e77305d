"""Which layers an agent must run for itself: the choice of `droidspeak`, measured on recorded trajectories.

DroidSpeak (arXiv 2411.02820) profiles which layers' K and V matter and recomputes those alone. Here every layer is
tried on its own: all agents keep K and V of all other layers for themselves, as in `none`, and share this layer's.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lragent_jax.generation import exact_matmuls
from lragent_jax.models.adapter import Adapter
from lragent_jax.models.adapter_bank import AdapterBank
from lragent_jax.models.bank_builder import build_bank
from lragent_jax.models.cache_view import NEVER, LayerCache, PageTable
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import InputError
from lragent_jax.models.layer_adapters import LayerAdapters
from lragent_jax.models.llama import Llama
from lragent_jax.models.rope import inverse_frequencies, rotation
from lragent_jax.recording import Recording

_PAGE_SIZE = 64
_BUCKET = 256  # lengths are padded to multiples of it, so that few programs are compiled


def critical_layers(
    config: LlamaConfig,
    graphdef,
    params,
    adapters: Mapping[str, Adapter | None],
    recordings: Sequence[Recording],
    *,
    share: float = 1 / 3,
    implementation: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[int, ...]:
    """The `share` of all layers (at least one) whose sharing moves the agents most: `recompute_layers` for an engine.

    Takes what `layer_drift` takes. Layers are ranked one by one and need not be neighbours: every layer is run anyway,
    so a gap costs nothing, and how errors of several layers add up is not looked at.
    """
    if not 0 < share <= 1:
        raise InputError(f"share must be above 0 and at most 1, not {share}")
    drift = layer_drift(
        config, graphdef, params, adapters, recordings, implementation=implementation, progress=progress
    )
    return most_drifting(drift, share)


def most_drifting(drift: Float[np.ndarray, " L"], share: float = 1 / 3) -> tuple[int, ...]:
    """The `share` of all layers (at least one) whose drift is largest, in order."""
    count = max(1, round(share * len(drift)))
    return tuple(sorted(int(layer) for layer in np.argsort(-drift, kind="stable")[:count]))


def layer_drift(
    config: LlamaConfig,
    graphdef,
    params,
    adapters: Mapping[str, Adapter | None],
    recordings: Sequence[Recording],
    *,
    implementation: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Float[np.ndarray, " L"]:
    """KL(`none` || `droidspeak` that shares this layer alone) in nats for each layer, the mean over output positions.

    `config, graphdef, params` are what `read_model` returns; `adapters` has one for every role that speaks (None: the
    base model). Layer l's K and V are shared by whoever ran a token first, and their input is the same as in `none`:
    they are taken from there, and only the layers from l on are run again. L²/2 runs of one layer for each recording,
    all agents at once, and few programs, for all layers are alike. Device memory: a recording's hidden states in front
    of every layer for each agent, and one copy of its K and V.

    Raises `InputError` for recordings without outputs, beyond the context, or with a role that has no adapter.
    """
    roles = _checked_roles(config, adapters, recordings)
    bank, adapter_ids = _bank(config, [adapters[role] for role in roles], jax.tree.leaves(params)[0].dtype)
    with exact_matmuls(params):
        model = _Layers(config, nnx.merge(graphdef, params), bank, adapter_ids, implementation)
        sums, num_positions = np.zeros(config.num_layers), 0
        for i, recording in enumerate(recordings):
            reading = _Reading.of(recording, roles)
            shared, inputs, hidden = _run_alone(model, reading)
            reference = model.log_probs(hidden, reading)
            for layer in range(config.num_layers):
                if progress:
                    done = i * config.num_layers + layer
                    progress(done, len(recordings) * config.num_layers, f"recording {i + 1}, layer {layer}")
                hidden = model.run(inputs[layer], layer, shared[layer], reading)
                for above in range(layer + 1, config.num_layers):
                    hidden = model.run(hidden, above, None, reading)
                sums[layer] += float(_kl(reference, model.log_probs(hidden, reading), reading.weights))
            num_positions += int(reading.weights.sum())
    if progress:
        progress(len(recordings) * config.num_layers, len(recordings) * config.num_layers, "measured")
    return sums / num_positions


@dataclasses.dataclass(frozen=True)
class _Reading:
    """One recording, read by every role: B rows over the same T tokens, padded.

    `first_runner` [T]: the row that runs each token first, and so writes what is shared. `rows`, `positions`,
    `weights` [E]: where the logits of an agent's own outputs come from; weight 0 is padding.
    """

    tokens: np.ndarray
    num_tokens: int
    first_runner: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, recording: Recording, roles: Sequence[str]) -> "_Reading":
        ids = [token for part in recording.parts for token in part.ids]
        first_runner = np.zeros(_padded(len(ids)), np.int32)
        outputs: list[tuple[int, int]] = []
        start = num_run = 0
        for part in recording.parts:
            stop = start + len(part.ids)
            if part.role is not None:
                row = roles.index(part.role)
                # All that nobody has run, and the output but for its last token, which is sampled and not run.
                first_runner[num_run : stop - 1] = row
                num_run = stop - 1
                outputs += [(row, position - 1) for position in range(max(start, 1), stop)]
            start = stop
        rows, positions, weights = (np.zeros(_padded(len(outputs)), np.int32) for _ in range(3))
        rows[: len(outputs)], positions[: len(outputs)] = zip(*outputs, strict=True)
        weights[: len(outputs)] = 1
        tokens = np.zeros(len(first_runner), np.int32)
        tokens[: len(ids)] = ids
        return cls(tokens, len(ids), first_runner, rows, positions, weights.astype(np.float32))

    def table(self, num_rows: int, shared: bool) -> PageTable:
        """Every row's own pages, all of them written; or one set of pages that all rows read and none writes."""
        num_pages = len(self.tokens) // _PAGE_SIZE
        first_page = np.zeros(num_rows, np.int32) if shared else np.arange(num_rows, dtype=np.int32) * num_pages
        return PageTable(
            q_starts=np.zeros(num_rows, np.int32),
            kv_lens=np.full(num_rows, self.num_tokens, np.int32),
            base=first_page[:, None] + np.arange(num_pages, dtype=np.int32),
            base_write_from=np.full(num_rows, NEVER if shared else 0, np.int32),
            low_rank=np.zeros((0, num_rows, num_pages), np.int32),
            low_rank_write_from=np.zeros((0, num_rows), np.int32),
            group_ids=np.zeros((0, num_rows), np.int32),
            read_slots=np.zeros(num_rows, np.int32),
        )


class _Layers:
    """A Llama taken apart: layers are run one by one by a program that fits all of them."""

    def __init__(self, config: LlamaConfig, model: Llama, bank: AdapterBank, adapter_ids, implementation: str | None):
        self.config, self.bank, self.adapter_ids, self.implementation = config, bank, adapter_ids, implementation
        self.model, self.layers = model, [nnx.split(layer) for layer in model.layers]

    def embed(self, reading: _Reading) -> Float[Array, "B T D"]:
        x = self.model.embed[...][reading.tokens]
        return jnp.broadcast_to(x, (len(self.adapter_ids), *x.shape))

    def pool(self, reading: _Reading, num_rows: int) -> Float[Array, "P K p HH"]:
        num_pages = num_rows * len(reading.tokens) // _PAGE_SIZE
        shape = (num_pages, self.config.num_kv_heads, _PAGE_SIZE, 2 * self.config.head_dim)
        return jnp.zeros(shape, self.model.embed[...].dtype)

    def run(self, x: Float[Array, "B T D"], layer: int, shared: Array | None, reading: _Reading):
        """Layer `layer` over hidden states in front of it; K and V are each row's own, or those that are `shared`."""
        hidden, _ = self.run_and_keep(x, layer, shared, reading)
        return hidden

    def run_and_keep(self, x, layer: int, shared: Array | None, reading: _Reading):
        num_rows = len(self.adapter_ids)
        kv = self.pool(reading, num_rows) if shared is None else shared
        table = reading.table(num_rows, shared=shared is not None)
        adapters = LayerAdapters(self.bank.layers[layer], self.bank.group_of, self.adapter_ids)
        graphdef, state = self.layers[layer]
        return _run_layer(graphdef, state, x, kv, adapters, table, self.config, self.implementation)

    def log_probs(self, hidden: Float[Array, "B T D"], reading: _Reading) -> Float[Array, "E V"]:
        """Of the recorded outputs' positions, each in its own agent's row."""
        return _log_probs(*nnx.split(self.model), hidden, reading.rows, reading.positions)


def _run_alone(model: _Layers, reading: _Reading):
    """Every agent as in `none`: the K and V that are shared, by layer; the layers' inputs; the last hidden states."""
    num_rows = len(model.adapter_ids)
    shared, inputs, x = [], [], model.embed(reading)
    for layer in range(model.config.num_layers):
        inputs.append(x)
        x, kv = model.run_and_keep(x, layer, None, reading)
        shared.append(_first_written(kv, reading.first_runner, num_rows))
    return shared, inputs, x


@functools.partial(jax.jit, static_argnames=("graphdef", "config", "implementation"))
def _run_layer(graphdef, state, x, kv, adapters: LayerAdapters, table: PageTable, config, implementation):
    rope = rotation(table.positions(x.shape[1]), inverse_frequencies(config))
    cache = LayerCache(kv=kv, low_rank_v=None, low_rank_k=None)
    x, cache = nnx.merge(graphdef, state)(
        x, cache, adapters, table, rope, write_base=True, implementation=implementation
    )
    return x, cache.kv


@functools.partial(jax.jit, static_argnames=("num_rows",))
def _first_written(
    kv: Float[Array, "P K p HH"], first_runner: Int[Array, " T"], num_rows: int
) -> Float[Array, "W K p HH"]:
    """Of the rows' copies of every slot that of the row which ran it first."""
    copies = kv.reshape(num_rows, -1, *kv.shape[1:])
    runner = first_runner.reshape(1, -1, 1, _PAGE_SIZE, 1)
    return jnp.take_along_axis(copies, runner, axis=0)[0]


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _log_probs(graphdef, params, hidden, rows: Int[Array, " E"], positions: Int[Array, " E"]):
    model = nnx.merge(graphdef, params)
    return jax.nn.log_softmax(model.logits(model.norm(hidden[rows, positions][None])[0]), axis=-1)


@jax.jit
def _kl(p: Float[Array, "E V"], q: Float[Array, "E V"], weights: Float[Array, " E"]) -> Float[Array, ""]:
    """The weighted sum of KL(p || q), both given as logarithms."""
    return jnp.sum(weights * jnp.sum(jnp.exp(p) * (p - q), axis=-1))


def _padded(length: int) -> int:
    return -(-length // _BUCKET) * _BUCKET


def _bank(config: LlamaConfig, adapters: Sequence[Adapter | None], dtype) -> tuple[AdapterBank, Int[Array, " B"]]:
    """The adapters, and each one's row of the bank; 0 is the base model."""
    loaded = [adapter for adapter in adapters if adapter is not None]
    numbers = iter(range(1, len(loaded) + 1))
    ids = [0 if adapter is None else next(numbers) for adapter in adapters]
    return build_bank(config, loaded, dtype), jnp.array(ids, jnp.int32)


def _checked_roles(
    config: LlamaConfig, adapters: Mapping[str, Adapter | None], recordings: Sequence[Recording]
) -> list[str]:
    """The roles that speak, in the order of the adapters."""
    if not recordings:
        raise InputError("there is nothing to measure: no recording was given")
    speaking = set()
    for i, recording in enumerate(recordings):
        if not recording.num_outputs:
            raise InputError(f"recording {i} holds no output, so nothing in it can be measured")
        if recording.num_tokens > config.context_length:
            raise InputError(
                f"recording {i} has {recording.num_tokens} tokens, and the model's context is "
                f"{config.context_length}: cut it"
            )
        speaking |= {part.role for part in recording.parts if part.role is not None}
    if missing := sorted(speaking - set(adapters)):
        raise InputError(f"role {missing[0]} has no adapter (None: the base model); there are: {', '.join(adapters)}")
    return [role for role in adapters if role in speaking]
