"""Which pages hold which beginnings of a context, whoever wrote them: a radix tree over whole pages of token ids."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from lragent_jax.page_pool import PagePool
from lragent_jax.page_run import HOLE, PageRun, Span, unrebuildable, with_unrecorded
from lragent_jax.sharing import PageKey


@dataclasses.dataclass(eq=False, slots=True)
class CachedPage:
    """A page that the tree holds, and how often and when calls have used it."""

    pool: PagePool
    page: int
    visits: int
    last_used: float


class PageNode:
    """A page of token ids behind those of its ancestors, the page that holds them under each key, and who wrote them.

    A key that a node has a page of, its parent has one of, too; and only a node with a base page has pages of other
    pools. `spans` is the record: it stays when a page goes.
    """

    __slots__ = ("children", "index", "pages", "parent", "spans", "token_ids")

    def __init__(self, parent: "PageNode | None", token_ids: tuple[int, ...]):
        self.parent, self.token_ids = parent, token_ids
        self.index: int = -1 if parent is None else parent.index + 1
        self.children: dict[tuple[int, ...], PageNode] = {}
        self.pages: dict[PageKey, CachedPage] = {}
        self.spans: dict[PageKey, tuple[Span, ...]] = {}

    def descendants(self) -> Iterator["PageNode"]:
        """All nodes below this one, parents first."""
        stack = list(self.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())


class Path(list[PageNode]):
    """The nodes of a context's first pages, as far as they were found: where the next search begins.

    As far as `known` the tree has all pages of the context's runs, if those have had `num_losses` together and no more.
    """

    known: PageNode | None = None
    num_losses = 0


@dataclasses.dataclass(frozen=True)
class Reused:
    """What a run was given: which of its pages, and its record as it was before."""

    run: PageRun
    indices: list[int]
    spans_before: list[Span]

    def give_back(self) -> None:
        """Makes the run what it was."""
        self.run.restore(self.indices, self.spans_before)


class PrefixTree:
    """Beginnings of contexts that were read before, from position 0, under every key.

    The tree holds a reference to each of its pages, so they outlive the trajectories that wrote them. Token ids are
    compared one by one, keys hold an adapter's content and never a name. What a page holds depends on who wrote the
    tokens in front of it, in every run that its writer read: contexts that disagree with the tree about that neither
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
        self,
        path: Path,
        token_ids: Sequence[int],
        runs: Mapping[PageKey, PageRun],
        beside: Callable[[PageKey], PageRun] | None = None,
    ) -> list[Reused]:
        """Gives each of a context's runs the pages that it lacks and the tree has, with their writers.

        What a run holds or has begun stays. `beside`: the context's runs under other keys. They get no pages, but the
        record: what was written under one key may rest on what its writer read under another. Returns what to give
        back if nothing comes of it. Brings `path` up to date.
        """
        self._follow(path, token_ids)
        others: dict[PageKey, PageRun] = {}
        pages: dict[PageKey, dict[int, CachedPage]] = {key: {} for key in runs}
        records: dict[PageKey, list[Span]] = {}
        for node in path:
            if beside is not None:
                others |= {key: beside(key) for key in node.spans if key not in runs and key not in others}
            if not _may_take(runs, node) or not _agree(others, node):
                break
            for key, cached in node.pages.items():
                if key in runs and runs[key].page(node.index) == HOLE:
                    pages[key][node.index] = cached
            for key, spans in node.spans.items():
                if key in runs or key in others:
                    records.setdefault(key, []).extend(spans)
        reused = []
        for key, run in (*runs.items(), *others.items()):
            found, before = pages.get(key, {}), run.spans
            run.adopt({index: cached.page for index, cached in found.items()}, records.get(key, []))
            if found or run.spans != before:
                reused.append(Reused(run, list(found), before))
        return reused

    def visit(self, path: Path, runs: Mapping[PageKey, PageRun]) -> None:
        """A call has begun that reads these runs: eviction weighs the pages that they share with the tree by that."""
        now = self.clock()
        for node in path:
            for key, run in runs.items():
                if _same_page(run, node, key):
                    cached = node.pages[key]
                    cached.visits, cached.last_used = cached.visits + 1, now

    def insert(self, path: Path, token_ids: Sequence[int], runs: Mapping[PageKey, PageRun]) -> None:
        """Adds the full pages of a context's runs, and what they have on record; `path` grows with them."""
        self._follow(path, token_ids)
        known, num_losses = path.known, sum(run.num_losses for run in runs.values())
        runs = dict(sorted(runs.items(), key=lambda entry: entry[0].pool != "base"))
        held = {key for key, run in runs.items() if run.held}
        if known is not None and not (
            num_losses == path.num_losses
            and known in path[known.index : known.index + 1]
            and held <= known.pages.keys()
        ):
            known = None
        path.num_losses = num_losses
        for index in range(known.index + 1 if known else 0, len(token_ids) // self.page_size):
            node = path[index] if index < len(path) else None
            if node is not None and not _agree(runs, node):
                break
            parent = path[index - 1] if index else self.root
            new = self._new_pages(runs, parent, index, {} if node is None else node.pages)
            if node is None:
                if not new:
                    break
                start = index * self.page_size
                node = PageNode(parent, tuple(token_ids[start : start + self.page_size]))
                parent.children[node.token_ids] = node
                path.append(node)
            for key, cached in new.items():
                cached.pool.keep(cached.page)
                node.pages[key] = cached
            for key, run in runs.items():
                if _same_page(run, node, key) and key in node.spans and key not in new:
                    continue
                if recorded := with_unrecorded(node.spans.get(key, ()), run.page_spans(index)):
                    node.spans[key] = tuple(recorded)
            if node.parent in (known, self.root) and held <= node.pages.keys():
                known = node
        path.known = known

    def remove(self, node: PageNode, key: PageKey) -> None:
        """Lets go of a page that no child has under its key; of a base page, with all that is read beside it."""
        keys = [key]
        if key.pool == "base":
            keys += [other for other in node.pages if other.pool != "base"]
        for gone in keys:
            cached = node.pages.pop(gone)
            cached.pool.let_go(cached.page)
        if not node.pages and node.parent is not None:
            del node.parent.children[node.token_ids]
            node.parent = None

    def drop(self, keys_in_use: Callable[[PageKey], bool]) -> None:
        """Lets go of every page whose key is out of use, and of what is on record about it."""
        for node in reversed(list(self.nodes())):
            for key in [key for key in node.pages if not keys_in_use(key)]:
                if key in node.pages:
                    self.remove(node, key)
            node.spans = {key: spans for key, spans in node.spans.items() if keys_in_use(key)}

    def writer_unloaded(self, writer: str) -> None:
        """From now on nobody can write again what `writer` wrote: what is on no page is forgotten."""
        for node in self.nodes():
            for key, spans in list(node.spans.items()):
                kept = spans if key in node.pages else [span for span in spans if span.writer != writer]
                node.spans[key] = tuple(unrebuildable(span, writer) for span in kept)

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
                new[key] = CachedPage(run.pool, run.page(index), 1, self.clock())
        return new


def _same_page(run: PageRun, node: PageNode, key: PageKey) -> bool:
    cached = node.pages.get(key)
    return cached is not None and run.page(node.index) == cached.page


def _agree(runs: Mapping[PageKey, PageRun], node: PageNode) -> bool:
    """Whether nothing speaks against one history behind a context's page and the node's: no token has two writers."""
    return all(
        key not in node.spans or _same_page(run, node, key) or _consistent(run.page_spans(node.index), node.spans[key])
        for key, run in runs.items()
    )


def _may_take(runs: Mapping[PageKey, PageRun], node: PageNode) -> bool:
    """Whether runs may go on with the node's pages: they agree, and have not begun a page that the node has more of."""
    for key, run in runs.items():
        known = node.spans.get(key, ())
        if not known or _same_page(run, node, key):
            continue
        own = run.page_spans(node.index)
        if own and not (_consistent(own, known) and _num_common(own, known) == _num_tokens(known)):
            return False
    return True


def _consistent(own: Sequence[Span], known: Sequence[Span]) -> bool:
    return all(
        (a.writer, a.rebuildable) == (b.writer, b.rebuildable)
        for a in own for b in known if max(a.start, b.start) < min(a.stop, b.stop)
    )  # fmt: skip


def _num_common(own: Sequence[Span], known: Sequence[Span]) -> int:
    return sum(max(0, min(a.stop, b.stop) - max(a.start, b.start)) for a in own for b in known)


def _num_tokens(spans: Sequence[Span]) -> int:
    return sum(span.stop - span.start for span in spans)
