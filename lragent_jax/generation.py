"""The compiled programs: prefill a chunk, decode several tokens, and little helpers. Pure functions over pytrees.

Caches are donated: a program updates them in place and the caller keeps only what comes back.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lragent_jax.device_jit import DeviceJit
from lragent_jax.models.adapter_bank import AdapterBank
from lragent_jax.models.cache_view import BaseCache, HostOrDevice, LowRankCache, PageTable
from lragent_jax.models.llama import Llama, Params
from lragent_jax.models.pytree import pytree
from lragent_jax.models.tensor_parallel import whole
from lragent_jax.sampling import SamplingArrays, is_stop, sample

NEVER = 2**30
"""A write-from position beyond every context: the row writes nothing to that table."""


_RESIDENT = ("graphdef", "params", "bank", "cache")
"""What programs take that lies on the devices already."""


@pytree
class Cache:
    """Everything a pass reads and writes."""

    base: BaseCache
    low_rank: LowRankCache


@pytree
class DecodeState:
    """Where each row stands: the token sampled last (not run yet), how many it has generated, whether it is done."""

    last_tokens: Int[Array, " B"]
    num_generated: Int[Array, " B"]
    finished: Bool[Array, " B"]


def exact_matmuls(params: Params):
    """f32 weights mean f32 products; GPUs and TPUs would round their inputs to tf32 or bf16."""
    if jax.tree.leaves(params)[0].dtype == jnp.float32:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


@functools.partial(
    DeviceJit,
    resident=_RESIDENT,
    static_argnames=("graphdef", "write_base", "implementation"),
    donate_argnames=("cache",),
)
def prefill(
    graphdef: nnx.GraphDef,
    params: Params,
    bank: AdapterBank,
    cache: Cache,
    tokens: Int[Array, "B T"],
    adapter_ids: Int[Array, " B"],
    table: PageTable,
    *,
    write_base: bool = True,
    implementation: str | None = None,
) -> tuple[Float[Array, "B V"], Float[Array, "B T D"], Cache]:
    """Runs one chunk per row: the logits of each row's last token (f32), all hidden states, and the cache.

    `logits` of `unembed` turns hidden states of other positions into scores; rows without new tokens return
    numbers that mean nothing.
    """
    with exact_matmuls(params):
        model: Llama = nnx.merge(graphdef, params)
        hidden, base, low_rank = model(
            tokens, adapter_ids, table, bank, cache.base, cache.low_rank,
            write_base=write_base, implementation=implementation,
        )  # fmt: skip
        last = jnp.clip(table.kv_lens - table.q_starts - 1, 0, tokens.shape[1] - 1)
        logits = whole(model.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]))
    return logits, hidden, Cache(base=base, low_rank=low_rank)


@functools.partial(DeviceJit, resident=_RESIDENT, static_argnames=("graphdef",))
def unembed(graphdef: nnx.GraphDef, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Logits (f32) of hidden states that `prefill` returned."""
    with exact_matmuls(params):
        return whole(nnx.merge(graphdef, params).logits(hidden))


@pytree
class Slots:
    """Where every request of the engine stands, M of them at most; a batch takes its rows out and puts them back.

    So requests join and leave a running batch on the device, and the host sees their tokens when it likes.
    """

    state: DecodeState  # of M rows
    kv_lens: Int[Array, " M"]  # tokens in the cache

    @classmethod
    def empty(cls, num_slots: int) -> "Slots":
        zeros = jnp.zeros(num_slots, jnp.int32)
        return cls(state=DecodeState(zeros, zeros, jnp.ones(num_slots, bool)), kv_lens=zeros)


@DeviceJit
def first_token(logits: Float[Array, "B V"], sampling: SamplingArrays) -> DecodeState:
    """Samples what follows a prefill. Rows that may generate nothing more are finished from the start."""
    return _first_token(logits, sampling, jnp.zeros(logits.shape[0], jnp.int32))


def _first_token(logits, sampling: SamplingArrays, index, draws: bool | None = None) -> DecodeState:
    tokens = sample(logits, sampling, index, draws)
    state = DecodeState(
        last_tokens=tokens,
        num_generated=index + 1,
        finished=is_stop(tokens, sampling) | (sampling.max_new_tokens <= index + 1),
    )
    return jax.tree.map(whole, state)


@functools.partial(DeviceJit, static_argnames=("draws",))
def begin(
    slots: Slots,
    logits: Float[Array, "B V"],
    sampling: SamplingArrays,
    slot_ids: Int[HostOrDevice, " B"],
    kv_lens: Int[HostOrDevice, " B"],
    index: Int[HostOrDevice, " B"],
    *,
    draws: bool | None = None,
) -> tuple[Int[Array, " B"], Slots]:
    """The first tokens of rows whose prefill is done, which go to their slots; a slot of M is nobody's.

    `index`: how many tokens a row generated before it was interrupted. `draws`: whether a row samples; see `sample`.
    """
    state = _first_token(logits, sampling, jnp.asarray(index), draws)
    return whole(state.last_tokens), _put(slots, slot_ids, state, kv_lens)


@DeviceJit
def take(slots: Slots, slot_ids: Int[HostOrDevice, " B"]) -> tuple[DecodeState, Int[Array, " B"]]:
    """The rows of a batch out of their slots, and their lengths; a slot of M has nothing to do."""

    def rows(values, fill):
        return values.at[slot_ids].get(mode="fill", fill_value=fill)

    state = slots.state
    taken = DecodeState(rows(state.last_tokens, 0), rows(state.num_generated, 0), rows(state.finished, True))
    return jax.tree.map(whole, (taken, rows(slots.kv_lens, 0)))


@DeviceJit
def put(slots: Slots, slot_ids: Int[HostOrDevice, " B"], state: DecodeState, kv_lens: Int[HostOrDevice, " B"]) -> Slots:
    """The rows of a batch back into their slots."""
    return _put(slots, slot_ids, state, kv_lens)


def _put(slots: Slots, slot_ids, state: DecodeState, kv_lens) -> Slots:
    def rows(old, new):
        return whole(old.at[slot_ids].set(new, mode="drop"))

    return Slots(state=jax.tree.map(rows, slots.state, state), kv_lens=rows(slots.kv_lens, kv_lens))


@functools.partial(
    DeviceJit,
    resident=_RESIDENT,
    cuda_graphs=True,
    static_argnames=("graphdef", "block", "write_without_adapter", "implementation"),
    donate_argnames=("cache",),
)
def decode(
    graphdef: nnx.GraphDef,
    params: Params,
    bank: AdapterBank,
    cache: Cache,
    state: DecodeState,
    sampling: SamplingArrays,
    adapter_ids: Int[Array, " B"],
    table: PageTable,
    num_steps: Int[Array, ""],
    *,
    block: int,
    write_without_adapter: bool = False,
    implementation: str | None = None,
) -> tuple[Int[Array, "B block"], DecodeState, PageTable, Cache]:
    """Up to `num_steps` (at most `block`) tokens per row without the host: run, sample, compare with the stop ids.

    `table.kv_lens` counts the tokens in the cache, without the one sampled last. Returns the new tokens (-1 where a
    row was finished), a stop id included as the row's last, and everything the next call goes on from.

    `write_without_adapter`: a second row per row runs the same tokens without adapter and writes the cache; the first
    only reads, at its own position too.
    """
    batch = state.last_tokens.shape[0]
    if write_without_adapter:
        adapter_ids = jnp.concatenate([adapter_ids, jnp.zeros_like(adapter_ids)])

    def step(carry):
        i, out, state, kv_lens, cache = carry
        active = ~state.finished
        new_lens = jnp.where(active, kv_lens + 1, kv_lens)
        here = dataclasses.replace(table, q_starts=kv_lens, kv_lens=new_lens)
        inputs = state.last_tokens
        if write_without_adapter:
            inputs, here = jnp.concatenate([inputs, inputs]), _readers_and_writers(here)
        hidden, base, low_rank = model(
            inputs[:, None], adapter_ids, here, bank, cache.base, cache.low_rank, implementation=implementation
        )
        tokens = sample(model.logits(hidden[:batch, 0]), sampling, state.num_generated)
        tokens = jnp.where(active, tokens, state.last_tokens)
        num_generated = state.num_generated + active
        finished = state.finished | is_stop(tokens, sampling) | (num_generated >= sampling.max_new_tokens)
        out = out.at[:, i].set(jnp.where(active, tokens, -1))
        state = DecodeState(last_tokens=tokens, num_generated=num_generated, finished=finished)
        return i + 1, out, state, new_lens, Cache(base=base, low_rank=low_rank)

    def unfinished(carry):
        i, _, state, _, _ = carry
        return (i < num_steps) & ~jnp.all(state.finished)

    with exact_matmuls(params):
        model: Llama = nnx.merge(graphdef, params)
        out = jnp.full((batch, block), -1, jnp.int32)
        carry = (jnp.int32(0), out, state, table.kv_lens, cache)
        _, *for_the_host, cache = jax.lax.while_loop(unfinished, step, carry)
    out, state, kv_lens = jax.tree.map(whole, for_the_host)
    return out, state, dataclasses.replace(table, kv_lens=kv_lens), cache


def _readers_and_writers(table: PageTable) -> PageTable:
    """[2B] rows: every row as one that writes nothing, then every row as it is."""

    def twice(x, axis: int = 0):
        return jnp.concatenate([x, x], axis)

    def then(x):
        return jnp.concatenate([jnp.full_like(x, NEVER), x], axis=-1)

    return PageTable(
        q_starts=twice(table.q_starts),
        kv_lens=twice(table.kv_lens),
        base=twice(table.base),
        base_write_from=then(table.base_write_from),
        low_rank=twice(table.low_rank, axis=1),
        low_rank_write_from=then(table.low_rank_write_from),
        group_ids=twice(table.group_ids, axis=1),
        read_slots=twice(table.read_slots),
    )


@functools.partial(DeviceJit, resident=("pools",), donate_argnames=("pools",))
def copy_pages(pools, sources: Int[Array, " n"], targets: Int[Array, " n"]):
    """Copies whole pages inside every pool of a tree; targets out of range are skipped (padding)."""
    return jax.tree.map(lambda pool: pool.at[targets].set(pool[sources], mode="drop"), pools)
