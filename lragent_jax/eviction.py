"""Which pages go when a call needs more than are free: of the prefix tree, and of trajectories that no call extends."""

import collections
import dataclasses
import heapq
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple, Protocol

from lragent_jax.models.config import LlamaConfig
from lragent_jax.page_pool import PagePool
from lragent_jax.page_run import HOLE, PageRun
from lragent_jax.prefix_tree import PageNode, PrefixTree
from lragent_jax.sharing import PageKey, PoolName


class Holder(Protocol):
    """A trajectory: the keys that a running call has open, the runs under all others, and how often and when calls
    used it.
    """

    @property
    def reading(self) -> Collection[PageKey]: ...

    @property
    def idle_runs(self) -> Mapping[PageKey, PageRun]: ...

    @property
    def visits(self) -> int: ...

    @property
    def last_used(self) -> float: ...


@dataclasses.dataclass(frozen=True)
class Victim:
    """One holder's share in a page: page `index` of a trajectory's run, or a tree node's page under `key`."""

    key: PageKey
    index: int
    run: PageRun | None = None
    node: PageNode | None = None


def recompute_flop(config: LlamaConfig, page_size: int, index: int) -> float:
    """FLOP to run the tokens of a context's page `index` again; attention grows with the position."""
    linear = config.num_layers * sum(rows * columns for rows, columns in config.projection_shapes().values())
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * (index + 0.5) * page_size
    return 2.0 * page_size * (linear + attention)


def worth(cost: float, visits: int, seconds: float, use: float = 1.0) -> float:
    """log of use x cost x visits x (1 - sigmoid(seconds since the last use)), FASTLIBRA's (arXiv 2505.03756).

    `use`: how likely the next calls are to need the page's adapter. The logarithm, because the last factor is 0 in
    floating point after a quarter of an hour.
    """
    seconds = max(seconds, 0.0)
    return math.log(use) + math.log(cost) + math.log(visits) - seconds - math.log1p(math.exp(-seconds))


def choose_victims(
    tree: PrefixTree,
    needs: Mapping[PoolName, tuple[PagePool, int]],
    writers: Mapping[tuple[PagePool, int], int],
    cost: Callable[[int], float],
    holders: Iterable[Holder] = (),
    use: Callable[[PageKey], float] = lambda key: 1.0,
    rule: Callable[[float, int, float, float], float] = worth,
) -> tuple[list[Victim], dict[PoolName, int]]:
    """What `evict` has to take, in this order, and how many pages come free by it, at least.

    `needs`: each pool that is short of pages, and by how many; where even everything would not be enough, fewer come
    free. `writers`: how many runs are about to write to a page. A page frees one if nobody else holds it, and saves
    its copy if all others are about to write to it. `cost`: to compute page i of a context again, in any unit. `use`:
    how likely the next calls are to read a key. `rule`: of cost, visits, seconds since the last use and use, what a
    page is worth.

    Leaves go first, the least worth of them before the others: a trajectory's end before its beginning. A page goes
    from all who hold it at once, and not at all while a running call holds it or somebody holds it who could not have
    it written again. A base page takes along what is read beside it.
    """
    now = tree.clock()

    def worth_of(key: PageKey, index: int, visits: int, last_used: float) -> float:
        return rule(cost(index), visits, now - last_used, use(key))

    plan = _Plan(tree, holders, writers, worth_of)
    for pool, count in needs.values():
        plan.take(pool, count)
    return plan.victims, {name: plan.freed[pool] for name, (pool, _) in needs.items()}


def evict(tree: PrefixTree, victims: Iterable[Victim]) -> None:
    """Lets go of what `choose_victims` chose."""
    for victim in victims:
        if victim.run is not None:
            victim.run.give_up([victim.index])
        elif victim.node is not None and victim.key in victim.node.pages:
            tree.remove(victim.node, victim.key)


class _Share(NamedTuple):
    """A trajectory's share in a page: entry `at` of its run under `key`, and its other runs that could be let go."""

    holder: Holder
    runs: Mapping[PageKey, PageRun]
    key: PageKey
    at: int

    @property
    def run(self) -> PageRun:
        return self.runs[self.key]


class _Plan:
    """Evictions that have been decided and not yet made.

    Built anew for every call that lacks pages, for thousands of them: two dictionaries from page to who could let it
    go, out of which everything goes that was decided on, and nothing per page beside them.
    """

    def __init__(
        self,
        tree: PrefixTree,
        holders: Iterable[Holder],
        writers: Mapping[tuple[PagePool, int], int],
        worth_of: Callable[[PageKey, int, int, float], float],
    ):
        self._worth_of, self._writers = worth_of, writers
        self._in_tree: dict[PagePool, dict[int, tuple[PageNode, PageKey]]] = collections.defaultdict(dict)
        self._in_runs: dict[PagePool, dict[int, list[_Share]]] = collections.defaultdict(dict)
        self._ends: dict[PagePool, set[int]] = collections.defaultdict(set)  # all that may have nothing behind them
        self._pinned: set[tuple[PagePool, int]] = set()
        self._let_go_of: collections.Counter[tuple[PagePool, int]] = collections.Counter()
        self.freed: collections.Counter[PagePool] = collections.Counter()
        self.victims: list[Victim] = []
        for node in tree.nodes():
            followed = set[PageKey]().union(*(child.pages for child in node.children.values()))
            for key, cached in node.pages.items():
                self._in_tree[cached.pool][cached.page] = node, key
                if key not in followed:
                    self._ends[cached.pool].add(cached.page)
        for holder in holders:
            runs = holder.idle_runs
            for key, run in runs.items():
                of_pool = self._in_runs[run.pool]
                for index, page in enumerate(run.pages):
                    if page != HOLE:
                        of_pool.setdefault(page, []).append(_Share(holder, runs, key, index))
                        if run.page(index + 1) == HOLE:
                            self._ends[run.pool].add(page)
                if not all(span.rebuildable for span in run.spans):
                    self._pin(runs, key)

    def take(self, pool: PagePool, count: int) -> None:
        """Decides until `count` pages of `pool` come free, or no more would."""
        # Where pages stay that nobody could write again, those in front of them may go: then all are looked at.
        pages = {*self._in_tree[pool], *self._in_runs[pool]} if self._pinned else self._ends[pool]
        heap = [(self._worth(pool, page), page) for page in pages if self._may_go(pool, page)]
        heapq.heapify(heap)
        while heap and self.freed[pool] < count:
            page = heapq.heappop(heap)[1]
            if not self._may_go(pool, page):
                continue
            for before in self._remove(pool, page):
                if self._may_go(pool, before):
                    heapq.heappush(heap, (self._worth(pool, before), before))

    def _pin(self, runs: Mapping[PageKey, PageRun], key: PageKey) -> None:
        """Keeps what nobody could write again, and the base pages without which it would be worthless."""
        run = runs[key]
        for index, page in enumerate(run.pages):
            if page != HOLE and not run.can_rebuild(index):
                self._pinned.add((run.pool, page))
                self._pinned |= {
                    (other.pool, other.page(index))
                    for beside, other in runs.items()
                    if beside.pool == "base" != key.pool
                }

    def _may_go(self, pool: PagePool, page: int) -> bool:
        """Whether the page would come free, or a copy of it would be saved, and nothing rests on it any more."""
        in_tree, shares = self._in_tree[pool].get(page), self._in_runs[pool].get(page, [])
        num_shares = len(shares) + (in_tree is not None)
        if not num_shares or (in_tree is not None and not self._is_leaf(*in_tree)):
            return False
        if self._num_holders(pool, page) - num_shares != self._writers.get((pool, page), 0):
            return False
        return (pool, page) not in self._pinned and not any(self._has_more_behind(share) for share in shares)

    def _num_holders(self, pool: PagePool, page: int) -> int:
        return pool.num_references(page) - self._let_go_of[pool, page]

    def _is_leaf(self, node: PageNode, key: PageKey) -> bool:
        """Whether no child has a page of the key any more."""
        pages = [child.pages[key] for child in node.children.values() if key in child.pages]
        return not any(cached.page in self._in_tree[cached.pool] for cached in pages)

    def _has_more_behind(self, share: _Share) -> bool:
        """Whether the next page of a trajectory is there, and could go before."""
        run, behind = share.run, share.run.page(share.at + 1)
        if behind == HOLE or (run.pool, behind) in self._pinned:
            return False
        return any(other.run is run for other in self._in_runs[run.pool].get(behind, ()))

    def _worth(self, pool: PagePool, page: int) -> float:
        """That of a page which several share: by all their visits that are known, and the last of them."""
        in_tree, shares = self._in_tree[pool].get(page), self._in_runs[pool].get(page, [])
        used = [(share.holder.visits, share.holder.last_used) for share in shares]
        key, index = (in_tree[1], in_tree[0].index) if in_tree else (shares[0].key, shares[0].at)
        if in_tree is not None:
            cached = in_tree[0].pages[key]
            used.append((cached.visits, cached.last_used))
        return self._worth_of(key, index, max(visits for visits, _ in used), max(at for _, at in used))

    def _remove(self, pool: PagePool, page: int) -> Iterable[int]:
        """Lets a page go from all who share it, with what is worthless without it; which ones it was behind of."""
        before: set[int] = set()
        if page in self._in_tree[pool]:
            node, key = self._in_tree[pool][page]
            self.victims.append(Victim(key, node.index, node=node))  # takes along what is beside it
            for other in (key, *_beside(node.pages, key)):
                cached = node.pages[other]
                if self._in_tree[cached.pool].pop(cached.page, None):
                    self._let_go(cached.pool, cached.page)
            assert node.parent is not None, "the root holds no pages"
            for cached in node.parent.pages.values():
                self._ends[cached.pool].add(cached.page)
                if cached.pool is pool:
                    before.add(cached.page)
        for share in list(self._in_runs[pool].get(page, ())):
            for other in (share.key, *_beside(share.runs, share.key)):
                self._let_go_share(share._replace(key=other))
            for run in share.runs.values() if share.at else ():
                self._ends[run.pool].add(run.page(share.at - 1))
                if run.pool is pool:
                    before.add(run.page(share.at - 1))
        return before

    def _let_go_share(self, share: _Share) -> None:
        page = share.run.page(share.at)
        shares = self._in_runs[share.run.pool].get(page, [])
        for i, other in enumerate(shares):
            if other.run is share.run:
                del shares[i]
                self.victims.append(Victim(share.key, share.at, run=share.run))
                self._let_go(share.run.pool, page)
                return

    def _let_go(self, pool: PagePool, page: int) -> None:
        self._let_go_of[pool, page] += 1
        self.freed[pool] += self._num_holders(pool, page) == self._writers.get((pool, page), 0)


def _beside(keys: Iterable[PageKey], key: PageKey) -> list[PageKey]:
    """Those whose pages are worthless without the page under `key`."""
    return [other for other in keys if other.pool != "base"] if key.pool == "base" else []
