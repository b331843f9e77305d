"""Which pages hold which beginnings of a context, whoever wrote them: a radix tree over whole pages of token ids."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from lragent_jax.page_pool import PagePool
from lragent_jax.page_run import HOLE, PageRun, Span
from lragent_jax.sharing import PageKey


@dataclasses.dataclass(eq=False, slots=True)
class CachedPage:
    """A page that the tree holds, who wrote its tokens, and how often and when calls have used it."""

    pool: PagePool
    page: int
    spans: tuple[Span, ...]
    visits: int
    last_used: float


class PageNode:
    """A page of token ids behind those of its ancestors, and the page that holds them under each key.

    A key that a node has, its parent has too; and only a node with a base page has pages of other pools.
    """

    __slots__ = ("children", "index", "pages", "parent", "token_ids")

    def __init__(self, parent: "PageNode | None", token_ids: tuple[int, ...]):
        self.parent, self.token_ids = parent, token_ids
        self.index: int = -1 if parent is None else parent.index + 1
        self.children: dict[tuple[int, ...], PageNode] = {}
        self.pages: dict[PageKey, CachedPage] = {}

    def descendants(self) -> Iterator["PageNode"]:
        """All nodes below this one, parents first."""
        stack = list(self.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())


Path = list[PageNode]
"""The nodes of a context's first pages, as far as they were found: where the next search begins."""


class PrefixTree:
    """Beginnings of contexts that were read before, from position 0, under every key.

    The tree holds a reference to each of its pages, so they outlive the trajectories that wrote them. Token ids are
    compared one by one, keys hold an adapter's content and never a name. What a page holds depends on who wrote the
    tokens in front of it, in every run that its writer reads: contexts that disagree with the tree about that neither
    take from it nor add to it behind the place, so that writers alone decide what an agent reads.

    `clock` tells seconds, for eviction. Whoever calls a method holds the cache's lock.
    """

    def __init__(self, page_size: int, clock: Callable[[], float] = time.monotonic):
        self.page_size, self.clock = page_size, clock
        self.root = PageNode(None, ())

    def nodes(self) -> Iterator[PageNode]:
        """Every node but the root, parents first."""
        return self.root.descendants()

    def pages(self, pool: PagePool) -> list[CachedPage]:
        """The tree's pages of one pool."""
        return [cached for node in self.nodes() for cached in node.pages.values() if cached.pool is pool]

    def reuse(
        self, path: Path, token_ids: Sequence[int], runs: Mapping[PageKey, PageRun]
    ) -> list[tuple[PageRun, list[int]]]:
        """Gives each of a context's runs the pages that it lacks and the tree has, with their writers.

        What a run holds stays. Returns the indices of what was added to which run. Brings `path` up to date.
        """
        self._follow(path, token_ids)
        now = self.clock()
        found: dict[PageKey, dict[int, CachedPage]] = {key: {} for key in runs}
        for node in path:
            if not all(_agree(run, node.index, node.pages.get(key)) for key, run in runs.items()):
                break
            for key, run in runs.items():
                cached = node.pages.get(key)
                if cached is None:
                    continue
                cached.visits, cached.last_used = cached.visits + 1, now
                if run.page(node.index) == HOLE:
                    found[key][node.index] = cached
        for key, pages in found.items():
            spans = [span for cached in pages.values() for span in cached.spans]
            runs[key].adopt({index: cached.page for index, cached in pages.items()}, spans)
        return [(runs[key], list(pages)) for key, pages in found.items() if pages]

    def insert(self, path: Path, token_ids: Sequence[int], runs: Mapping[PageKey, PageRun]) -> None:
        """Adds the full pages of a context's runs, the base run first among them; `path` grows with them."""
        self._follow(path, token_ids)
        for index in range(len(token_ids) // self.page_size):
            node = path[index] if index < len(path) else None
            known = {} if node is None else node.pages
            if not all(_agree(run, index, known.get(key)) for key, run in runs.items()):
                return
            if node is not None and all(key in known for key in runs):
                continue
            parent = path[index - 1] if index else self.root
            new = self._new_pages(runs, parent, index, known)
            if node is None:
                if not new:
                    return
                start = index * self.page_size
                node = PageNode(parent, tuple(token_ids[start : start + self.page_size]))
                parent.children[node.token_ids] = node
                path.append(node)
            for key, cached in new.items():
                cached.pool.share(cached.page)
                node.pages[key] = cached

    def remove(self, node: PageNode, key: PageKey) -> None:
        """Lets go of a page that no child has under its key; of a base page, with all that is read beside it."""
        keys = [key]
        if key.pool == "base":
            keys += [other for other in node.pages if other.pool != "base"]
        for gone in keys:
            cached = node.pages.pop(gone)
            cached.pool.release(cached.page)
        if not node.pages and node.parent is not None:
            del node.parent.children[node.token_ids]
            node.parent = None

    def drop(self, keys_in_use: Callable[[PageKey], bool]) -> None:
        """Lets go of every page whose key is out of use."""
        for node in reversed(list(self.nodes())):
            for key in [key for key in node.pages if not keys_in_use(key)]:
                if key in node.pages:
                    self.remove(node, key)

    def _follow(self, path: Path, token_ids: Sequence[int]) -> None:
        """Takes nodes that were evicted off the path's end, and adds those that have come."""
        while path and path[-1].parent is None:
            path.pop()
        node = path[-1] if path else self.root
        for start in range(len(path) * self.page_size, len(token_ids) - self.page_size + 1, self.page_size):
            found = node.children.get(tuple(token_ids[start : start + self.page_size]))
            if found is None:
                return
            node = found
            path.append(node)

    def _new_pages(
        self, runs: Mapping[PageKey, PageRun], parent: PageNode, index: int, known: Mapping[PageKey, CachedPage]
    ) -> dict[PageKey, CachedPage]:
        """The runs' pages that a node may take: full ones, without holes in front, beside a base page."""
        new: dict[PageKey, CachedPage] = {}
        for key, run in runs.items():
            follows = parent is self.root or key in parent.pages
            has_base = key.pool == "base" or any(other.pool == "base" for other in (*known, *new))
            if key not in known and follows and has_base and run.is_full(index):
                new[key] = CachedPage(run.pool, run.page(index), tuple(run.page_spans(index)), 1, self.clock())
        return new


def _agree(run: PageRun, index: int, cached: CachedPage | None) -> bool:
    """Whether a run's page may stand in the place of the tree's: it lacks one of the two, or the writers are equal."""
    page = run.page(index)
    if page == HOLE or cached is None or page == cached.page:
        return True
    return tuple(run.page_spans(index)) == cached.spans
