"""The page pools of an engine: arrays on the device, allocators on the host."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from lragent_jax.adapter_use import AdapterUse
from lragent_jax.device_jit import this_device
from lragent_jax.devices import machine_bytes
from lragent_jax.eviction import Holder, choose_victims, evict, recompute_flop
from lragent_jax.fair_lock import FairLock
from lragent_jax.generation import Cache, copy_pages
from lragent_jax.models.cache_view import BaseCache, LowRankCache
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import OutOfPagesError
from lragent_jax.models.tensor_parallel import POOL, WHOLE
from lragent_jax.page_pool import PagePool
from lragent_jax.page_run import HOLE, PageCopy, PageRun
from lragent_jax.prefix_tree import PrefixTree
from lragent_jax.sharing import PageKey, PoolName

_COPIES_PER_CALL = 8

_PAGES_PER_SPARE = 64
"""When pages have to go, one more goes for so many in the pool."""

_SIZE_OPTIONS: dict[PoolName, str] = {
    "base": "num_pages",
    "recomputed": "num_recomputed_pages",
    "low_rank": "num_low_rank_pages",
}


@dataclasses.dataclass(frozen=True)
class PoolStats:
    """Pages of one pool and the device memory they stand for.

    `pages_used` are held by trajectories that are open. `pages_idle` of them are those that no running call reads, and
    that can be rebuilt: they go when a call needs them. `pages_cached` are held by nobody else than the prefix cache,
    and go likewise: a call can have `pages_free + pages_cached + pages_idle`.
    """

    pages_used: int
    pages_free: int
    pages_cached: int
    pages_idle: int
    bytes_per_page: int

    @property
    def bytes_used(self) -> int:
        return self.pages_used * self.bytes_per_page

    @property
    def bytes_total(self) -> int:
        return (self.pages_used + self.pages_free + self.pages_cached) * self.bytes_per_page


@dataclasses.dataclass(frozen=True)
class CacheStats:
    """All pools; `page_size` is in tokens. `recomputed` holds the layers that are not in `base`, if any."""

    base: PoolStats
    low_rank: PoolStats
    recomputed: PoolStats
    page_size: int

    @property
    def bytes_used(self) -> int:
        return self.base.bytes_used + self.low_rank.bytes_used + self.recomputed.bytes_used


@dataclasses.dataclass(frozen=True)
class Claim:
    """Tokens [start, stop) that a call is going to write to a run."""

    run: PageRun
    start: int
    stop: int


class PagedCache:
    """Base pages [P, K, p, 2H] and low-rank pages [P_lr, r, p] of every layer, and who holds them.

    `recomputed_layers` have base pages of their own, `num_recomputed_pages` of them. `low_rank_ranks` gives r for the
    cached targets ("v", "k") that have a low-rank cache at all. On a `mesh` every device has the base pages of its kv
    heads, and all low-rank pages; without one they lie on `home` (see `Devices.home`). Whoever allocates, releases or
    runs a program on the arrays holds `lock`.

    `holders` are the trajectories that are open, and `use` knows which adapters are in demand: what eviction looks at.
    `release_abandoned` returns the pages of those that were dropped, which nobody holds; False if there are none.
    """

    def __init__(
        self,
        config: LlamaConfig,
        dtype,
        *,
        page_size: int,
        num_pages: int,
        num_low_rank_pages: int,
        low_rank_ranks: Mapping[str, int],
        recomputed_layers: Sequence[int] = (),
        num_recomputed_pages: int = 0,
        mesh: Mesh | None = None,
        home: Sharding | None = None,
    ):
        self.config, self.dtype, self.page_size = config, jnp.dtype(dtype), page_size
        self.low_rank_ranks, self.recomputed_layers = dict(low_rank_ranks), tuple(recomputed_layers)
        self.lock, self._mesh, self._home = FairLock(), mesh, home
        sizes: dict[PoolName, int] = {
            "base": num_pages,
            "recomputed": num_recomputed_pages if recomputed_layers else 0,
            "low_rank": num_low_rank_pages if low_rank_ranks else 0,
        }
        self._check_room(sizes)
        self.pools: dict[PoolName, PagePool] = {name: PagePool(size) for name, size in sizes.items()}
        self.prefixes = PrefixTree(page_size)
        self.holders: Iterable[Holder] = ()
        self.release_abandoned: Callable[[], bool] = lambda: False
        self.use = AdapterUse()
        self.num_losses = 0
        self.is_doubtful = False
        self.arrays = self._allocate()

    def recover(self) -> bool:
        """Allocates the arrays again if they are gone; True if they were, and with them what is on every page.

        Programs take the arrays and give them back. A call that is interrupted in between, by Ctrl-C or an error of
        the device, leaves none. A program that fails on the device itself leaves arrays without values: that takes a
        wait to find out, and is looked for where `is_doubtful` says that something went wrong.
        """
        doubtful, self.is_doubtful = self.is_doubtful, False
        if not any(pool.is_deleted() for pool in jax.tree.leaves(self.arrays)) and not (doubtful and self._failed()):
            return False
        self.num_losses += 1
        self.prefixes.drop(lambda key: False)
        self.arrays = self._allocate()
        return True

    def _failed(self) -> bool:
        """Whether the program that was to write the arrays did not."""
        try:
            jax.block_until_ready(self.arrays)
        except jax.errors.JaxRuntimeError:
            return True
        return False

    def _allocate(self) -> Cache:
        num_low_rank_pages = self.pools["low_rank"].num_pages
        try:
            arrays = Cache(
                base=BaseCache(kv=self._base_pools()),
                low_rank=LowRankCache(
                    v=self._low_rank_pools(self.low_rank_ranks.get("v"), num_low_rank_pages),
                    k=self._low_rank_pools(self.low_rank_ranks.get("k"), num_low_rank_pages),
                ),
            )
            return jax.block_until_ready(arrays)
        except jax.errors.JaxRuntimeError as error:
            raise self._no_room({name: pool.num_pages for name, pool in self.pools.items()}) from error

    def _check_room(self, sizes: Mapping[PoolName, int]) -> None:
        """Raises `OutOfPagesError` for pools in the machine's own memory that it has not got, weights or not.

        Other devices say so when they are asked; a process that asks a machine for too much is killed instead.
        """
        platform = this_device().platform if self._mesh is None else self._mesh.devices.flat[0].platform
        available = machine_bytes() if platform == "cpu" else None
        if available is not None and sum(self._num_bytes(sizes).values()) > available:
            raise self._no_room(sizes)

    def _no_room(self, sizes: Mapping[PoolName, int]) -> OutOfPagesError:
        num_bytes = self._num_bytes(sizes)
        pools = [f"{size:,} {name} pages ({num_bytes[name] / 1e9:,.1f} GB)" for name, size in sizes.items() if size]
        largest = max(sizes, key=lambda name: num_bytes[name])
        return OutOfPagesError(
            f"the device has no room for {' and '.join(pools)} beside the weights; lower {_SIZE_OPTIONS[largest]}"
        )

    def _num_bytes(self, sizes: Mapping[PoolName, int]) -> dict[PoolName, int]:
        """Of the pools, on all devices of this process together; each has all low-rank pages."""
        local = 1 if self._mesh is None else len(self._mesh.local_devices)
        share = 1.0 if self._mesh is None else local / self._mesh.size
        return {
            name: int(sizes[name] * num_bytes * (local if name == "low_rank" else share))
            for name, num_bytes in self._bytes_per_page().items()
        }

    def new_run(self, key: PageKey) -> PageRun:
        return PageRun(self.pools[key.pool], self.page_size)

    def note_calls(self, rows: Sequence[Iterable[PageKey]]) -> None:
        """Rows have begun that read these keys: eviction weighs pages by the use of their adapters."""
        self.use.note(rows, batch_size=sum(bool(holder.reading) for holder in self.holders))

    def pages_needed(self, claims: Iterable[Claim]) -> dict[PoolName, int]:
        """How many of every pool `reserve` would take for these claims."""
        writers = _writers(claims)
        return {name: _pages_needed(writers, pool) for name, pool in self.pools.items()}

    def check_fits(self, num_tokens: int, pools: Iterable[PoolName]) -> None:
        """Raises `OutOfPagesError` if even empty pools could not hold a context of so many tokens."""
        num_pages = -(-num_tokens // self.page_size)
        for name in pools:
            if num_pages > self.pools[name].num_pages:
                raise OutOfPagesError(
                    f"{num_tokens} tokens need {num_pages} {name} pages of {self.page_size} tokens, there are "
                    f"{self.pools[name].num_pages}: shorten the prompt, lower max_new_tokens, or build the engine with "
                    f"a larger {_SIZE_OPTIONS[name]}"
                )

    def reserve(self, claims: Iterable[Claim]) -> None:
        """Gives every claim pages of its own, or raises `OutOfPagesError` and changes nothing.

        If too few are free, others go, as many as it takes: of the prefix cache, and of trajectories that no call is
        extending, whose record stays so that they are rebuilt. A tier of host memory would be filled here, from the
        pages that `_evict` chooses, and read by `PrefixTree.reuse`, before anything is run again.
        """
        claims = [claim for claim in claims if claim.stop > claim.start]
        self.release_abandoned()
        try:
            self._evict(_writers(claims))
        except OutOfPagesError:  # the collector may have dropped one meanwhile
            if not self.release_abandoned():
                raise
            self._evict(_writers(claims))
        for name, pool in self.pools.items():
            self._copy(name, [copy for claim in claims if claim.run.pool is pool
                              for copy in claim.run.prepare(claim.start, claim.stop)])  # fmt: skip

    def _evict(self, writers: Mapping[tuple[PagePool, int], int]) -> None:
        """Makes room for what is going to be written, or raises `OutOfPagesError` and changes nothing."""
        needed: dict[PoolName, int] = {name: _pages_needed(writers, pool) for name, pool in self.pools.items()}
        # A few more than that where the pool is large: looking through all of it for every page would take too long.
        needs: dict[PoolName, tuple[PagePool, int]] = {
            name: (pool, needed[name] - pool.num_free + pool.num_pages // _PAGES_PER_SPARE)
            for name, pool in self.pools.items()
            if needed[name] > pool.num_free
        }
        if not needs:
            return
        reading = {key for holder in self.holders for key in holder.reading}
        victims, num_freed = choose_victims(
            self.prefixes, needs, writers, lambda index: recompute_flop(self.config, self.page_size, index),
            holders=self.holders, use=lambda key: 1.0 if key in reading else self.use.expected(key),
        )  # fmt: skip
        for name, (pool, _) in needs.items():
            if pool.num_free + num_freed[name] < needed[name]:
                raise OutOfPagesError(
                    f"this call needs {needed[name]} more {name} pages of {self.page_size} tokens, "
                    f"{pool.num_free + num_freed[name]} of {pool.num_pages} are free: close trajectories, lower "
                    f"max_new_tokens, or build the engine with a larger {_SIZE_OPTIONS[name]}"
                )
        evict(self.prefixes, victims)

    def grow_low_rank(self, num_pages: int, low_rank_ranks: Mapping[str, int]) -> None:
        """Makes room for more pages or larger ranks; what is cached stays valid.

        The rows of X A that a larger rank adds are zeros for every adapter that was loaded before, as is the whole
        X A of a target that none of them adapts: padding the pools with zeros is what they would have written.
        """
        pool = self.pools["low_rank"]
        num_pages = max(num_pages, pool.num_pages)
        ranks = {t: max(low_rank_ranks.get(t, 0), self.low_rank_ranks.get(t, 0)) for t in ("v", "k")}
        ranks = {target: rank for target, rank in ranks.items() if rank}
        if ranks == self.low_rank_ranks and num_pages == pool.num_pages:
            return
        old, grown = self.arrays.low_rank, {}
        try:
            for target in ("v", "k"):
                layers, rank = getattr(old, target), ranks.get(target)
                if layers is None:
                    grown[target] = self._low_rank_pools(rank, num_pages)
                    continue
                assert rank is not None
                pad = ((0, num_pages - pool.num_pages), (0, rank - layers[0].shape[1]), (0, 0))
                grown[target] = tuple(jnp.pad(layer, pad) for layer in layers)
            jax.block_until_ready(grown)
        except jax.errors.JaxRuntimeError as error:
            raise OutOfPagesError(
                f"the device has no room for {num_pages} low-rank pages; lower num_low_rank_pages or unload an adapter"
            ) from error
        self.arrays = dataclasses.replace(self.arrays, low_rank=LowRankCache(**grown))
        self.low_rank_ranks = ranks
        pool.grow(num_pages)

    def warmup(self) -> None:
        """Compiles the page copies."""
        for name, pool in self.pools.items():
            if pool.num_pages:
                self._copy(name, [PageCopy(0, 0)])

    def _bytes_per_page(self) -> dict[PoolName, int]:
        itemsize, p = self.dtype.itemsize, self.page_size
        layer_bytes = self.config.base_cache_bytes_per_token(itemsize) // self.config.num_layers * p
        num_recomputed = len(self.recomputed_layers)
        rank = sum(self.low_rank_ranks.values())
        return {
            "base": layer_bytes * (self.config.num_layers - num_recomputed),
            "recomputed": layer_bytes * num_recomputed,
            "low_rank": self.config.low_rank_cache_bytes_per_token(rank, itemsize) * p,
        }

    def stats(self) -> CacheStats:
        bytes_per_page, stats = self._bytes_per_page(), {}
        for name, pool in self.pools.items():
            cached, idle = pool.num_kept_alone, self._idle_pages(pool)
            num_idle = sum(pool.num_references(page) == count + pool.is_kept(page) for page, count in idle.items())
            stats[name] = PoolStats(pool.num_used - cached, pool.num_free, cached, num_idle, bytes_per_page[name])
        return CacheStats(**stats, page_size=self.page_size)

    def _idle_pages(self, pool: PagePool) -> collections.Counter[int]:
        """Pages that trajectories could let go, and how many of them hold each."""
        counts: collections.Counter[int] = collections.Counter()
        for run in (run for holder in self.holders for run in holder.idle_runs.values() if run.pool is pool):
            if all(span.rebuildable for span in run.spans):
                counts.update(run.pages)
            else:
                counts.update(page for index, page in enumerate(run.pages) if run.can_rebuild(index))
        del counts[HOLE]
        return counts

    def _base_pools(self) -> tuple[jax.Array, ...]:
        config, pools = self.config, []
        for layer in range(config.num_layers):
            pool = self.pools["recomputed" if layer in self.recomputed_layers else "base"]
            shape = (pool.num_pages, config.num_kv_heads, self.page_size, 2 * config.head_dim)
            pools += self._zeros(1, shape, POOL)
        return tuple(pools)

    def _low_rank_pools(self, rank: int | None, num_pages: int):
        if rank is None:
            return None
        shape = (num_pages, rank, self.page_size)
        return self._zeros(self.config.num_layers, shape, WHOLE)

    def _zeros(self, num_layers: int, shape: tuple[int, ...], spec: PartitionSpec) -> tuple[jax.Array, ...]:
        """One pool per layer, each device with its part of it."""
        place = self._home if self._mesh is None else NamedSharding(self._mesh, spec)
        return tuple(jnp.zeros(shape, self.dtype, device=place) for _ in range(num_layers))

    def _copy(self, name: PoolName, copies: Sequence[PageCopy]) -> None:
        """Copies pages in all layers of one pool."""
        for first in range(0, len(copies), _COPIES_PER_CALL):
            batch = copies[first : first + _COPIES_PER_CALL]
            sources = np.zeros(_COPIES_PER_CALL, np.int32)
            targets = np.full(_COPIES_PER_CALL, self.pools[name].num_pages, np.int32)  # out of range: skipped
            sources[: len(batch)] = [copy.source for copy in batch]
            targets[: len(batch)] = [copy.target for copy in batch]
            if name == "low_rank":
                copied = copy_pages(self.arrays.low_rank, sources, targets)
                self.arrays = dataclasses.replace(self.arrays, low_rank=copied)
                continue
            kv = list(self.arrays.base.kv)
            layers = [i for i in range(len(kv)) if (i in self.recomputed_layers) == (name == "recomputed")]
            copied = copy_pages(BaseCache(tuple(kv[i] for i in layers)), sources, targets)
            for i, pool in zip(layers, copied.kv, strict=True):
                kv[i] = pool
            self.arrays = dataclasses.replace(self.arrays, base=BaseCache(tuple(kv)))


def _writers(claims: Iterable[Claim]) -> collections.Counter[tuple[PagePool, int]]:
    """How many runs are going to write to every shared page, and how many new pages they need (under `HOLE`)."""
    wanted: dict[tuple[int, int], tuple[PagePool, int]] = {}
    for claim in claims:
        for index in claim.run.pages_to_write(claim.start, claim.stop):
            wanted[id(claim.run), index] = claim.run.pool, claim.run.page(index)
    return collections.Counter(wanted.values())


def _pages_needed(writers: Mapping[tuple[PagePool, int], int], pool: PagePool) -> int:
    """New pages, and copies of shared ones: of those that hold a page together, the last to write keeps it."""
    counts = {page: count for (of, page), count in writers.items() if of is pool}
    return sum(count if page == HOLE else min(count, pool.num_references(page) - 1) for page, count in counts.items())
