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
from lragent_jax.models.cache_view import NEVER, BaseCache, HostOrDevice, LowRankCache, PageTable
from lragent_jax.models.llama import Llama, Params
from lragent_jax.models.pytree import pytree
from lragent_jax.models.tensor_parallel import whole
from lragent_jax.sampling import SamplingArrays, is_stop, sample

_RESIDENT = ("graphdef", "params", "bank", "cache")
"""What programs take that lies on the devices already."""


@pytree
class Cache:
    """Everything a pass reads and writes."""

    base: BaseCache
    low_rank: LowRankCache


def exact_matmuls(params: Params):
    """f32 weights mean f32 products; GPUs and TPUs would round their inputs to tf32 or bf16."""
    if jax.tree.leaves(params)[0].dtype == jnp.float32:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


LEAST_LAST_ONLY = 256
"""Tokens of a chunk from which on its last layer makes nothing of those in front of the last but keys and values: a
layer's attention and MLP, for some ten small kernels more."""


def has_last_only(num_tokens: int) -> bool:
    """Whether the engine prefills chunks of so many tokens with `last_only`, unless all of them are to be scored."""
    return num_tokens >= LEAST_LAST_ONLY


@functools.partial(
    DeviceJit,
    resident=_RESIDENT,
    static_argnames=("graphdef", "write_base", "last_only", "implementation"),
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
    last_only: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "B V"], Float[Array, "B S D"], Cache]:
    """Runs one chunk per row: the logits of each row's last token (f32), hidden states, and the cache.

    Hidden states are those of all T tokens (S = T), which `unembed` turns into scores, or with `last_only` those of
    each row's last token (S = 1), for which the last layer does less. Rows without new tokens return numbers that mean
    nothing.
    """
    with exact_matmuls(params):
        model: Llama = nnx.merge(graphdef, params)
        hidden, base, low_rank = model(
            tokens, adapter_ids, table, bank, cache.base, cache.low_rank,
            write_base=write_base, last_only=last_only, implementation=implementation,
        )  # fmt: skip
        of_last = hidden
        if not last_only:
            slots, _ = table.last_tokens(tokens.shape[1])
            of_last = jnp.take_along_axis(hidden, slots[:, None, None], axis=1)
        logits = whole(model.logits(of_last[:, 0]))
    return logits, hidden, Cache(base=base, low_rank=low_rank)


@functools.partial(DeviceJit, resident=_RESIDENT, static_argnames=("graphdef",))
def unembed(graphdef: nnx.GraphDef, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Logits (f32) of hidden states that `prefill` returned."""
    with exact_matmuls(params):
        return whole(nnx.merge(graphdef, params).logits(hidden))


@pytree
class Slots:
    """Where rows stand: of every request of the engine, M at most, or of those of a batch.

    A program takes the rows of its batch out and puts them back: so requests join and leave a running batch on the
    device, and the host sees their tokens when it likes.
    """

    last_tokens: Int[Array, " M"]  # sampled last, not run yet
    num_generated: Int[Array, " M"]
    finished: Bool[Array, " M"]
    kv_lens: Int[Array, " M"]  # tokens in the cache, without the one sampled last

    @classmethod
    def empty(cls, num_slots: int) -> "Slots":
        zeros = jnp.zeros(num_slots, jnp.int32)
        return cls(last_tokens=zeros, num_generated=zeros, finished=jnp.ones(num_slots, bool), kv_lens=zeros)

    def rows(self, slot_ids: Int[HostOrDevice, " B"]) -> "Slots":
        """Those of a batch; in a slot of M stands a row that has nothing to do."""

        def at(values, fill):
            return whole(values.at[slot_ids].get(mode="fill", fill_value=fill))

        return Slots(
            at(self.last_tokens, 0), at(self.num_generated, 0), at(self.finished, True), at(self.kv_lens, 0)
        )  # fmt: skip

    def with_rows(self, slot_ids: Int[HostOrDevice, " B"], rows: "Slots") -> "Slots":
        """The same with those of a batch put back; a slot of M is nobody's."""
        return jax.tree.map(lambda old, new: whole(old.at[slot_ids].set(new, mode="drop")), self, rows)


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

    `index`: how many tokens a row generated before it was interrupted. One that may generate nothing more is finished
    from the start. `draws`: whether a row samples; see `sample`.
    """
    index = jnp.asarray(index)
    tokens = whole(sample(logits, sampling, index, draws))
    finished = is_stop(tokens, sampling) | (sampling.max_new_tokens <= index + 1)
    rows = Slots(last_tokens=tokens, num_generated=index + 1, finished=finished, kv_lens=jnp.asarray(kv_lens))
    return tokens, slots.with_rows(slot_ids, rows)


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
    slots: Slots,
    slot_ids: Int[Array, " B"],
    sampling: SamplingArrays,
    adapter_ids: Int[Array, " B"],
    table: PageTable,
    num_steps: Int[Array, ""],
    *,
    block: int,
    write_without_adapter: bool = False,
    implementation: str | None = None,
) -> tuple[Int[Array, "B block"], Slots, Cache]:
    """Up to `num_steps` (at most `block`) tokens per row without the host: run, sample, compare with the stop ids.

    The rows go on from their slots; the lengths and query positions of `table` are not looked at. Returns the new
    tokens (-1 where a row was finished), a stop id included as the row's last, and what the next call goes on from.

    `write_without_adapter`: a second row per row runs the same tokens without adapter and writes the cache; the first
    only reads, at its own position too.
    """
    batch = slot_ids.shape[0]
    if write_without_adapter:
        adapter_ids = jnp.concatenate([adapter_ids, jnp.zeros_like(adapter_ids)])

    def step(carry):
        i, out, rows, cache = carry
        active = ~rows.finished
        new_lens = jnp.where(active, rows.kv_lens + 1, rows.kv_lens)
        here = dataclasses.replace(table, q_starts=rows.kv_lens, kv_lens=new_lens)
        inputs = rows.last_tokens
        if write_without_adapter:
            inputs, here = jnp.concatenate([inputs, inputs]), _readers_and_writers(here)
        hidden, base, low_rank = model(
            inputs[:, None], adapter_ids, here, bank, cache.base, cache.low_rank, implementation=implementation
        )
        tokens = sample(model.logits(hidden[:batch, 0]), sampling, rows.num_generated)
        tokens = jnp.where(active, tokens, rows.last_tokens)
        num_generated = rows.num_generated + active
        finished = rows.finished | is_stop(tokens, sampling) | (num_generated >= sampling.max_new_tokens)
        out = out.at[:, i].set(jnp.where(active, tokens, -1))
        rows = Slots(last_tokens=tokens, num_generated=num_generated, finished=finished, kv_lens=new_lens)
        return i + 1, out, rows, Cache(base=base, low_rank=low_rank)

    def unfinished(carry):
        i, _, rows, _ = carry
        return (i < num_steps) & ~jnp.all(rows.finished)

    with exact_matmuls(params):
        model: Llama = nnx.merge(graphdef, params)
        out = jnp.full((batch, block), -1, jnp.int32)
        carry = (jnp.int32(0), out, slots.rows(slot_ids), cache)
        _, out, rows, cache = jax.lax.while_loop(unfinished, step, carry)
    return whole(out), slots.with_rows(slot_ids, rows), cache


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
