"""Which pages of the prefix tree go when a call needs more than are free."""

import collections
import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from lragent_jax.models.config import LlamaConfig
from lragent_jax.page_pool import PagePool
from lragent_jax.prefix_tree import CachedPage, PageNode, PrefixTree
from lragent_jax.sharing import PageKey, PoolName

Victim = tuple[PageNode, PageKey]


def recompute_flop(config: LlamaConfig, page_size: int, index: int) -> float:
    """FLOP to run the tokens of a context's page `index` again; attention grows with the position."""
    linear = config.num_layers * sum(rows * columns for rows, columns in config.projection_shapes().values())
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * (index + 0.5) * page_size
    return 2.0 * page_size * (linear + attention)


def worth(cost: float, visits: int, seconds: float) -> float:
    """log of cost x visits x (1 - sigmoid(seconds since the last use)), FASTLIBRA's (arXiv 2505.03756).

    The logarithm, because the last factor is 0 in floating point after a quarter of an hour.
    """
    seconds = max(seconds, 0.0)
    return math.log(cost) + math.log(visits) - seconds - math.log1p(math.exp(-seconds))


def choose_victims(
    tree: PrefixTree,
    needs: Mapping[PoolName, tuple[PagePool, int]],
    writers: Mapping[tuple[PagePool, int], int],
    cost: Callable[[int], float],
) -> tuple[list[Victim], dict[PoolName, int]]:
    """What `PrefixTree.remove` has to take, in this order, and how many pages come free by it, at least.

    `needs`: each pool that is short of pages, and by how many; where even everything would not be enough, fewer come
    free. `writers`: how many runs are about to write to a page. A page frees one if nobody else holds it, and saves
    its copy if all others are about to write to it. `cost`: to compute page i of a context again, in any unit.

    Leaves go first, the least worth of them before the others. A page of the low-rank or recomputed pool goes alone
    where it would be made again as it was. It would not be where another adapter of its A-group might make it, while
    base pages that were written beside it, and shaped by it, stay: then they go together, as long as that will do.
    """
    plan = _Plan(tree, writers, cost)
    for pool, count in needs.values():
        any(plan.take(pool, count, what) for what in ("alone", "with base", "any"))
    return plan.victims, {name: plan.num_freed(pool) for name, (pool, _) in needs.items()}


class _Plan:
    """Evictions that have been decided and not yet made."""

    def __init__(self, tree: PrefixTree, writers: Mapping[tuple[PagePool, int], int], cost: Callable[[int], float]):
        self._tree, self._writers, self._cost, self._now = tree, writers, cost, tree.clock()
        self._gone: set[Victim] = set()
        self._freed: collections.Counter[PagePool] = collections.Counter()
        self.victims: list[Victim] = []

    def num_freed(self, pool: PagePool) -> int:
        return self._freed[pool]

    def take(self, pool: PagePool, count: int, what: Literal["alone", "with base", "any"]) -> bool:
        """Decides until `count` pages of `pool` come free: its own leaves, or base leaves with all beside them."""

        def eligible(node: PageNode, key: PageKey) -> bool:
            if (node, key) in self._gone or not self._is_leaf(node, key):
                return False
            cached = node.pages[key]
            if not self._frees(cached):
                return False
            if what == "with base":
                return key.pool == "base"
            return cached.pool is pool and (key.pool == "base" or what == "any" or not _supports(node, key))

        tie = itertools.count()
        heap = [(self._worth(*leaf), next(tie), *leaf) for leaf in self._entries() if eligible(*leaf)]
        heapq.heapify(heap)
        while heap and self.num_freed(pool) < count:
            _, _, node, key = heapq.heappop(heap)
            self._remove(node, key)
            parent = node.parent
            assert parent is not None, "the root holds no pages"
            for other in parent.pages:
                if eligible(parent, other):
                    heapq.heappush(heap, (self._worth(parent, other), next(tie), parent, other))
        return self.num_freed(pool) >= count

    def _remove(self, node: PageNode, key: PageKey) -> None:
        if (node, key) in self._gone:
            return
        self.victims.append((node, key))
        keys = [key, *(other for other in node.pages if other.pool != "base")] if key.pool == "base" else [key]
        for other in keys:
            cached = node.pages[other]
            if (node, other) not in self._gone and self._frees(cached):
                self._freed[cached.pool] += 1
            self._gone.add((node, other))

    def _entries(self) -> Iterator[Victim]:
        return ((node, key) for node in self._tree.nodes() for key in node.pages)

    def _is_leaf(self, node: PageNode, key: PageKey) -> bool:
        return all(key not in child.pages or (child, key) in self._gone for child in node.children.values())

    def _frees(self, cached: CachedPage) -> bool:
        others = cached.pool.num_references(cached.page) - 1
        return others == self._writers.get((cached.pool, cached.page), 0)

    def _worth(self, node: PageNode, key: PageKey) -> float:
        cached = node.pages[key]
        return worth(self._cost(node.index), cached.visits, self._now - cached.last_used)


def _supports(node: PageNode, key: PageKey) -> bool:
    """Whether a writer of the page wrote the base page beside it, and others than that one might make it again."""
    base = {span.writer for other, cached in node.pages.items() if other.pool == "base" for span in cached.spans}
    return any(span.writer in base and span.writer != key.owner for span in node.pages[key].spans)
