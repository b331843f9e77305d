"""Which pages go when a call needs more than are free: of the prefix tree, and of trajectories that no call extends."""

import collections
import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Protocol

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
) -> tuple[list[Victim], dict[PoolName, int]]:
    """What `evict` has to take, in this order, and how many pages come free by it, at least.

    `needs`: each pool that is short of pages, and by how many; where even everything would not be enough, fewer come
    free. `writers`: how many runs are about to write to a page. A page frees one if nobody else holds it, and saves
    its copy if all others are about to write to it. `cost`: to compute page i of a context again, in any unit. `use`:
    how likely the next calls are to read a key.

    Leaves go first, the least worth of them before the others: a trajectory's end before its beginning. A page goes
    from all who hold it at once, and not at all while a running call holds it or somebody holds it who could not have
    it written again. A base page takes along what is read beside it.
    """
    plan = _Plan(tree, holders, writers, lambda page: _worth(page, cost, use, tree.clock()))
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


@dataclasses.dataclass(eq=False, slots=True)
class _Page:
    """A page of a pool, and the shares in it that could be let go."""

    of: tuple[PagePool, int]
    key: PageKey
    index: int
    visits: int = 1
    last_used: float = -math.inf
    shares: list[tuple["_Place", Victim]] = dataclasses.field(default_factory=list)
    is_pinned: bool = False

    def add(self, place: "_Place", victim: Victim, visits: int, last_used: float) -> None:
        self.shares.append((place, victim))
        place.pages[victim.key] = self
        self.visits, self.last_used = max(self.visits, visits), max(self.last_used, last_used)


@dataclasses.dataclass(eq=False, slots=True)
class _Place:
    """The pages that one trajectory or node holds of the same tokens, and the places next to it."""

    pages: dict[PageKey, _Page] = dataclasses.field(default_factory=dict)
    before: "_Place | None" = None
    behind: list["_Place"] = dataclasses.field(default_factory=list)
    is_node: bool = False

    def is_leaf(self, key: PageKey) -> bool:
        """Whether nothing behind needs the page: in the tree nothing at all, in a trajectory nothing that can go."""
        return not any(key in other.pages and (self.is_node or not other.pages[key].is_pinned) for other in self.behind)

    def beside(self, key: PageKey) -> list[_Page]:
        """What is worthless without the page."""
        return [page for other, page in self.pages.items() if other.pool != "base"] if key.pool == "base" else []


class _Plan:
    """Evictions that have been decided and not yet made."""

    def __init__(
        self,
        tree: PrefixTree,
        holders: Iterable[Holder],
        writers: Mapping[tuple[PagePool, int], int],
        worth_of: Callable[[_Page], float],
    ):
        self._worth_of, self._writers = worth_of, writers
        self._pages: dict[tuple[PagePool, int], _Page] = {}
        self.freed: collections.Counter[PagePool] = collections.Counter()
        self.victims: list[Victim] = []
        self._add_tree(tree)
        for holder in holders:
            self._add_holder(holder)
        self._left = {page: pool.num_references(number) for (pool, number), page in self._pages.items()}

    def take(self, pool: PagePool, count: int) -> None:
        """Decides until `count` pages of `pool` come free, or no more would."""
        tie = itertools.count()
        heap = [(self._worth_of(page), next(tie), page) for page in self._pages.values() if self._may_go(page, pool)]
        heapq.heapify(heap)
        while heap and self.freed[pool] < count:
            page = heapq.heappop(heap)[2]
            places = [place.before for place, _ in page.shares if place.before is not None]
            self._remove(page)
            for before in {id(page): page for place in places for page in place.pages.values()}.values():
                if self._may_go(before, pool):
                    heapq.heappush(heap, (self._worth_of(before), next(tie), before))

    def _add_tree(self, tree: PrefixTree) -> None:
        places: dict[PageNode, _Place] = {}
        for node in tree.nodes():
            before = places.get(node.parent) if node.parent is not None else None
            place = places[node] = _place(before, is_node=True)
            for key, cached in node.pages.items():
                page = self._page(cached.pool, cached.page, key, node.index)
                page.add(place, Victim(key, node.index, node=node), cached.visits, cached.last_used)

    def _add_holder(self, holder: Holder) -> None:
        places: list[_Place] = []
        for _ in range(max((len(run.pages) for run in holder.idle_runs.values()), default=0)):
            places.append(_place(places[-1] if places else None, is_node=False))
        for key, run in holder.idle_runs.items():
            for index, number in enumerate(run.pages):
                if number != HOLE:
                    page = self._page(run.pool, number, key, index)
                    page.add(places[index], Victim(key, index, run=run), holder.visits, holder.last_used)
                    page.is_pinned |= not run.can_rebuild(index)

    def _page(self, pool: PagePool, number: int, key: PageKey, index: int) -> _Page:
        return self._pages.setdefault((pool, number), _Page((pool, number), key, index))

    def _may_go(self, page: _Page, pool: PagePool) -> bool:
        """Whether the page would come free, or a copy of it would be saved, and nothing rests on it any more."""
        if page.of[0] is not pool or page.is_pinned or not page.shares:
            return False
        if self._left[page] - len(page.shares) != self._writers.get(page.of, 0):
            return False
        return all(
            place.is_leaf(page.key) and not any(beside.is_pinned for beside in place.beside(page.key))
            for place, _ in page.shares
        )

    def _remove(self, page: _Page) -> None:
        for place, victim in list(page.shares):
            self._let_go(page, place, victim)
            for beside in place.beside(page.key):
                for other in [share for share in beside.shares if share[0] is place]:
                    self._let_go(beside, *other)

    def _let_go(self, page: _Page, place: _Place, victim: Victim) -> None:
        self.victims.append(victim)
        page.shares.remove((place, victim))
        del place.pages[victim.key]
        self._left[page] -= 1
        self.freed[page.of[0]] += self._left[page] == self._writers.get(page.of, 0)


def _place(before: _Place | None, is_node: bool) -> _Place:
    place = _Place(before=before, is_node=is_node)
    if before is not None:
        before.behind.append(place)
    return place


def _worth(page: _Page, cost: Callable[[int], float], use: Callable[[PageKey], float], now: float) -> float:
    return worth(cost(page.index), page.visits, now - page.last_used, use(page.key))
