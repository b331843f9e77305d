"""The pages that hold one trajectory under one key: which tokens are on them, and who wrote each."""

import bisect
import dataclasses
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence

from lragent_jax.intervals import Interval, difference, intersection, union
from lragent_jax.page_pool import PagePool

HOLE = -1
"""In place of a page that no token of the run has needed yet, or that went when others needed it."""


@dataclasses.dataclass(frozen=True)
class Span:
    """Tokens [start, stop) that one writer ran. The writer is an adapter's content hash, None for the base model.

    `rebuildable` is False from the moment the writer is unloaded: what it read may go, and nobody can write the same
    again, whatever is loaded later.
    """

    start: int
    stop: int
    writer: str | None
    rebuildable: bool = True


@dataclasses.dataclass(frozen=True)
class PageCopy:
    """Page `source` has to be copied to page `target` before it is written (copy on write)."""

    source: int
    target: int


class PageRun:
    """Tokens of one trajectory on pages of one pool. Token i lies on page i // page_size.

    `spans` is the record: who wrote which tokens, be they on a page (`held`) or gone with it. A token that is recorded
    and not held has to be rebuilt under its writer. The record may have holes: an A-group that was loaded late has the
    tokens written since, but not yet those before.
    """

    def __init__(self, pool: PagePool, page_size: int):
        self.pool = pool
        self.page_size = page_size
        self.pages: list[int] = []
        self.spans: list[Span] = []
        self.held: list[Interval] = []
        self.num_losses = 0  # how often it may have lost tokens, or their record

    def missing(self, stop: int) -> list[Interval]:
        """The intervals of [0, stop) that are on no page."""
        return difference([(0, stop)], self.held)

    def holds(self, position: int) -> bool:
        """Whether the token is on a page."""
        i = bisect.bisect_right(self.held, position, key=lambda interval: interval[0])
        return i > 0 and position < self.held[i - 1][1]

    def recorded(self, start: int, stop: int) -> list[Span]:
        """Who wrote which of [start, stop), as far as anybody did."""
        first = bisect.bisect_right(self.spans, start, key=lambda span: span.stop)
        last = bisect.bisect_left(self.spans, stop, lo=first, key=lambda span: span.start)
        return [_clipped(span, start, stop) for span in self.spans[first:last]]

    def page(self, index: int) -> int:
        """The page of tokens [index · page_size, (index + 1) · page_size), or `HOLE`."""
        return self.pages[index] if index < len(self.pages) else HOLE

    def pages_to_write(self, start: int, stop: int) -> list[int]:
        """Which entries of `pages` `prepare` would take from the pool: new ones, and copies of shared ones."""
        return [index for index in self._page_range(start, stop) if self._needs_page(index)]

    def prepare(self, start: int, stop: int) -> list[PageCopy]:
        """Makes every page of [start, stop) this run's own; returns the copies that the device has to make."""
        copies = []
        for index in self.pages_to_write(start, stop):
            self.pages.extend([HOLE] * (index + 1 - len(self.pages)))
            page = self.pages[index]
            self.pages[index] = self.pool.allocate()
            if page != HOLE:
                copies.append(PageCopy(source=page, target=self.pages[index]))
                self.pool.release(page)
        return copies

    def commit(self, start: int, stop: int, writer: str | None) -> None:
        """Records that `writer` has written those of [start, stop) that were missing.

        Where the page was lost meanwhile, the record is all that stays.
        """
        written = difference([(start, stop)], self.held)
        self._record(Span(a, b, writer) for a, b in written)
        size = self.page_size
        on_pages = [(i * size, (i + 1) * size) for i in self._page_range(start, stop) if self.page(i) != HOLE]
        self.held = union([*self.held, *intersection(written, on_pages)])

    def truncate(self, length: int) -> None:
        """Forgets tokens from `length` on and releases every page that holds none of the rest."""
        if self.spans and self.spans[-1].stop > length:
            self.num_losses += 1
            self.spans = self.recorded(0, length)
        self.held = intersection(self.held, [(0, length)])
        used = union((pages.start, pages.stop) for pages in itertools.starmap(self._page_range, self.held))
        for start, stop in difference([(0, len(self.pages))], used):
            for index in range(start, stop):
                if self.pages[index] != HOLE:
                    self.pool.release(self.pages[index])
                    self.pages[index] = HOLE
        del self.pages[used[-1][1] if used else 0 :]

    def page_spans(self, index: int) -> list[Span]:
        """Who wrote which tokens of page `index`, be it here or gone."""
        return self.recorded(index * self.page_size, (index + 1) * self.page_size)

    def is_full(self, index: int) -> bool:
        """Whether page `index` is here with every token."""
        start, stop = index * self.page_size, (index + 1) * self.page_size
        return self.page(index) != HOLE and not difference([(start, stop)], self.held)

    def can_rebuild(self, index: int) -> bool:
        """Whether the tokens of page `index` could be written again as they are."""
        return all(span.rebuildable for span in self.page_spans(index))

    def adopt(self, pages: Mapping[int, int], spans: Sequence[Span]) -> None:
        """Takes a share in pages that others have written, `spans` by whom, in place of holes."""
        for index, page in pages.items():
            self.pool.share(page)
            self.pages.extend([HOLE] * (index + 1 - len(self.pages)))
            self.pages[index] = page
        self.learn(spans)
        size = self.page_size
        self.held = union([*self.held, *((index * size, (index + 1) * size) for index in pages)])

    def learn(self, spans: Iterable[Span]) -> None:
        """Adds to the record what others have written, where it has nothing."""
        self.spans = with_unrecorded(self.spans, spans)

    def give_up(self, indices: Collection[int]) -> None:
        """Releases whole pages. The record stays, but for what nobody could write again."""
        self.num_losses += 1
        lost = [(index * self.page_size, (index + 1) * self.page_size) for index in sorted(indices)]
        for index in indices:
            self.pool.release(self.pages[index])
            self.pages[index] = HOLE
        while self.pages and self.pages[-1] == HOLE:
            self.pages.pop()
        gone = [(span.start, span.stop) for span in self.spans if not span.rebuildable]
        self.spans = _without(self.spans, intersection(gone, lost))
        self.held = difference(self.held, lost)

    def restore(self, indices: Collection[int], spans: Sequence[Span]) -> None:
        """Undoes `adopt` and `learn`: gives the pages back, and `spans` is the record that was there before."""
        self.give_up(indices)
        self.spans = list(spans)

    def writer_unloaded(self, writer: str) -> None:
        """From now on nobody can write again what `writer` wrote: what is on no page is forgotten."""
        self.num_losses += 1
        written = [(span.start, span.stop) for span in self.spans if span.writer == writer]
        kept = _without(self.spans, difference(written, self.held))
        self.spans = _joined(unrebuildable(span, writer) for span in kept)

    def fork(self) -> "PageRun":
        """A second run over the same pages; whoever writes to one of them first takes a copy."""
        other = PageRun(self.pool, self.page_size)
        other.pages, other.spans, other.held = list(self.pages), list(self.spans), list(self.held)
        for page in other.pages:
            if page != HOLE:
                self.pool.share(page)
        return other

    def _record(self, spans: Iterable[Span]) -> None:
        """Puts spans, which are in order, in the place of what was recorded for their tokens."""
        spans = list(spans)
        if spans:
            # Most go on where the record ends, and the record of a long trajectory is long.
            first = bisect.bisect_left(self.spans, spans[0].start, key=lambda span: span.stop)
            kept = _without(self.spans[first:], [(span.start, span.stop) for span in spans])
            self.spans = [*self.spans[:first], *_joined([*kept, *spans])]

    def _page_range(self, start: int, stop: int) -> range:
        return range(start // self.page_size, -(-stop // self.page_size)) if stop > start else range(0)

    def _needs_page(self, index: int) -> bool:
        page = self.page(index)
        return page == HOLE or self.pool.num_references(page) > 1


def with_unrecorded(known: Sequence[Span], spans: Iterable[Span]) -> list[Span]:
    """A record with what others say about tokens that it does not have."""
    return _joined([*known, *_without(spans, [(span.start, span.stop) for span in known])])


def unrebuildable(span: Span, writer: str) -> Span:
    """The span as it is once `writer` is unloaded."""
    return dataclasses.replace(span, rebuildable=False) if span.writer == writer else span


def _clipped(span: Span, start: int, stop: int) -> Span:
    return dataclasses.replace(span, start=max(span.start, start), stop=min(span.stop, stop))


def _without(spans: Iterable[Span], positions: list[Interval]) -> list[Span]:
    return [
        dataclasses.replace(span, start=a, stop=b)
        for span in spans
        for a, b in difference([(span.start, span.stop)], positions)
    ]


def _joined(spans: Iterable[Span]) -> list[Span]:
    """The same tokens in order, one span where a writer goes on."""
    joined: list[Span] = []
    for span in sorted(spans, key=lambda span: span.start):
        last = joined[-1] if joined else None
        if last and (last.stop, last.writer, last.rebuildable) == (span.start, span.writer, span.rebuildable):
            joined[-1] = dataclasses.replace(last, stop=span.stop)
        else:
            joined.append(span)
    return joined
