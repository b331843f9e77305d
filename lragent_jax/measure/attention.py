"""Attention's arguments at the shapes of a workload: random, in pages that lie as they lie after a while of serving."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32

from lragent_jax.kernels.lora_attention import LoraB, LowRank, PageTable


@dataclasses.dataclass(frozen=True)
class Heads:
    """The model's side of attention: N query heads, K kv heads, head dim H, page size p, dtype."""

    N: int = 32
    K: int = 8
    H: int = 128
    p: int = 64
    dtype: str = "bfloat16"

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    def kv_bytes(self, tokens: int) -> int:
        return tokens * self.K * 2 * self.H * self.itemsize


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """B rows of T new tokens at the end of a context of S.

    r_v, r_k: ranks of the low-rank caches, 0 for none. groups: A-groups that the rows' agents are in, round robin.
    prefix: tokens at the start that all rows read in the same pages; S: everything, agents of one trajectory.
    share: whether they do. scattered: whether pages lie at random.
    """

    S: int
    T: int = 1
    B: int = 1
    r_v: int = 16
    r_k: int = 0
    groups: int = 1
    prefix: int | None = None
    share: bool = True
    scattered: bool = True

    def __str__(self) -> str:
        ranks = f"r={self.r_v}" + (f"+{self.r_k}" if self.r_k else "") if self.r_v or self.r_k else "merged"
        parts = [f"T={self.T}", f"S={self.S}", ranks]
        parts += [f"B={self.B}"] if self.B > 1 else []
        parts += [f"groups={self.groups}"] if self.groups > 1 else []
        parts += [f"prefix={self.prefix}"] if self.prefix is not None else []
        parts += [] if self.share else ["prefix not shared"]
        parts += [] if self.scattered else ["contiguous"]
        return " ".join(parts)

    @property
    def plain(self) -> "AttentionCase":
        """The same without any low-rank cache."""
        return dataclasses.replace(self, r_v=0, r_k=0, groups=1)

    @property
    def distinct_tokens(self) -> int:
        """Tokens of base cache that the rows name, each once: what has to be read at least."""
        prefix = (self.S if self.prefix is None else self.prefix) if self.share else 0
        return prefix + self.B * (self.S - prefix)

    def flop(self, heads: Heads) -> float:
        """Of the two matrix products, causal triangle and all; low-rank caches not counted."""
        keys_seen = self.T * (self.S - self.T) + self.T * (self.T + 1) / 2
        return 4 * self.B * keys_seen * heads.N * heads.H

    def floor_bytes(self, heads: Heads) -> float:
        """Caches read once, queries and outputs moved once."""
        low_rank = self.groups * (self.distinct_tokens) * (self.r_v + self.r_k) * heads.itemsize
        return (
            heads.kv_bytes(self.distinct_tokens) + low_rank + 2 * self.B * self.T * heads.N * heads.H * heads.itemsize
        )


class Cache(NamedTuple):
    """What one layer holds."""

    base: Array
    low_rank: LowRank | None
    lora_b: LoraB | None


# Standard deviation of random values. An output of attention over thousands of scores near 0 averages them away; the
# benchmarks feed outputs back as queries, which stay of a usual size with values of this one.
VALUE_SCALE = 32.0


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(seed, scale, *, shape: tuple[int, ...], dtype: str) -> Array:
    return (jax.random.normal(jax.random.key(seed), shape, dtype) * scale).astype(dtype)


class RandomCaches:
    """Random arrays, made once per shape and kept: cases of a run read the same pools."""

    def __init__(self, heads: Heads):
        self.heads = heads
        self._made: dict[tuple, Array] = {}

    def normal(self, seed: int, shape: tuple[int, ...], scale: float | np.ndarray = 1.0, dtype: str = "") -> Array:
        key = (seed, shape, float(np.sum(scale)), dtype)
        if key not in self._made:
            self._made[key] = _normal(
                seed, jnp.asarray(scale, jnp.float32), shape=shape, dtype=dtype or self.heads.dtype
            )
        return self._made[key]

    def forget(self) -> None:
        """Gives the memory back."""
        self._made.clear()

    def queries(self, case: AttentionCase, dtype: str = "") -> Array:
        return self.normal(0, (case.B, case.T, self.heads.N, self.heads.H), dtype=dtype)

    def caches(self, case: AttentionCase, num_pages: int, count: int) -> tuple[Cache, ...]:
        """`count` layers whose base pools have `num_pages` pages, the low-rank pools that many per group."""
        K, H, p = self.heads.K, self.heads.H, self.heads.p
        lanes = np.repeat([1.0, VALUE_SCALE], H)
        adapters = case.B + 1

        def low_rank(seed, r, scale):
            return self.normal(seed, (case.groups * num_pages, r, p), scale) if r else None

        def lora_b(seed, r, scale):
            return self.normal(seed, (adapters, r, K, H), scale / r**0.5) if r else None

        def layer(i):
            base = self.normal(3 * i + 1, (num_pages, K, p, 2 * H), lanes)
            if not case.r_v and not case.r_k:
                return Cache(base, None, None)
            pools = LowRank(low_rank(3 * i + 2, case.r_v, 1.0), low_rank(3 * i + 3, case.r_k, 1.0))
            own = LoraB(lora_b(3 * i + 2, case.r_v, VALUE_SCALE / 2), lora_b(3 * i + 3, case.r_k, 0.5))
            return Cache(base, pools, own)

        return tuple(layer(i) for i in range(count))

    def inv_freq(self, case: AttentionCase) -> Array | None:
        H = self.heads.H
        return jnp.asarray(5e5 ** -(np.arange(0, H, 2) / H), jnp.float32) if case.r_k else None


def page_table(case: AttentionCase, p: int, num_pages: int) -> tuple[PageTable, Int32[Array, " B"] | None]:
    """The rows' pages and adapters: row b reads as adapter b + 1."""
    rng = np.random.default_rng(0)
    W = -(-case.S // p)
    shared = (W if case.prefix is None else case.prefix // p) if case.share else 0
    wanted = shared + case.B * (W - shared)
    if wanted > num_pages:
        raise ValueError(f"{case} names {wanted} pages of {p} tokens; the pools have {num_pages}")
    order = rng.permutation(num_pages) if case.scattered else np.arange(num_pages)
    own = order[shared:wanted].reshape(case.B, W - shared)
    base = np.concatenate([np.tile(order[:shared], (case.B, 1)), own], axis=1)
    low_rank = adapter_ids = None
    if case.r_v or case.r_k:
        other = rng.permutation(num_pages) if case.scattered else np.arange(num_pages)
        group = np.arange(case.B) % case.groups
        low_rank = jnp.asarray(group[:, None] * num_pages + other[base], jnp.int32)
        adapter_ids = jnp.arange(1, case.B + 1, dtype=jnp.int32)
    lens = jnp.full(case.B, case.S, jnp.int32)
    return PageTable(jnp.asarray(base, jnp.int32), low_rank, lens - case.T, lens), adapter_ids


class Chained(NamedTuple):
    """One call `attend(q, data[i], shared)`, as `timing.chain` makes many of it, and what it is called with."""

    attend: Callable
    q: Array
    data: tuple
    shared: Any = None

    @property
    def arguments(self) -> tuple:
        return self.q, self.data, self.shared


def paged(attention: Callable, case: AttentionCase, caches: RandomCaches, num_pages: int, count: int) -> Chained:
    """Calls of `attention`, of `lora_attention`'s signature, on `count` layers with one page table."""
    table, adapter_ids = page_table(case, caches.heads.p, num_pages)

    def attend(q, layer, shared):
        table, adapter_ids, inv_freq = shared
        if case.T > 1:  # or XLA would expand a low-rank cache once for all calls that read it
            q, base = lax.optimization_barrier((q, table.base))
            table = table._replace(base=base)
        return attention(q, *layer, table, adapter_ids, rope_inv_freq=inv_freq)

    layers = caches.caches(case, num_pages, count)
    return Chained(attend, caches.queries(case), layers, (table, adapter_ids, caches.inv_freq(case)))


def cycle(case: AttentionCase, heads: Heads, num_bytes: float) -> int:
    """How many caches have more than `num_bytes`; 16 at most."""
    return min(16, 1 + math.ceil(num_bytes / heads.kv_bytes(case.distinct_tokens)))
