"""The pages that hold one trajectory under one key: which tokens are on them, and who wrote each."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from lragent_jax.page_pool import PagePool

HOLE = -1
"""In place of a page that no token of the run has needed yet."""


@dataclasses.dataclass(frozen=True)
class Span:
    """Tokens [start, stop) that one writer ran. The writer is an adapter's content hash, None for the base model."""

    start: int
    stop: int
    writer: str | None


@dataclasses.dataclass(frozen=True)
class PageCopy:
    """Page `source` has to be copied to page `target` before it is written (copy on write)."""

    source: int
    target: int


class PageRun:
    """Tokens of one trajectory on pages of one pool. Token i lies on page i // page_size.

    Coverage may have holes: an A-group that was loaded late has the tokens written since, but not yet those before.
    """

    def __init__(self, pool: PagePool, page_size: int):
        self.pool = pool
        self.page_size = page_size
        self.pages: list[int] = []
        self.spans: list[Span] = []

    def missing(self, stop: int) -> list[tuple[int, int]]:
        """The intervals of [0, stop) that nobody has written."""
        gaps, position = [], 0
        for span in self.spans:
            if span.start >= stop:
                break
            if span.start > position:
                gaps.append((position, span.start))
            position = span.stop
        if position < stop:
            gaps.append((position, stop))
        return gaps

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
        """Records that `writer` has written those of [start, stop) that were missing."""
        missing = [(max(a, start), b) for a, b in self.missing(stop) if b > start]
        self.spans = _joined([*self.spans, *(Span(a, b, writer) for a, b in missing)])

    def truncate(self, length: int) -> None:
        """Forgets tokens from `length` on and releases every page that holds none of the rest."""
        self.spans = [Span(s.start, min(s.stop, length), s.writer) for s in self.spans if s.start < length]
        used = {index for span in self.spans for index in self._page_range(span.start, span.stop)}
        for index, page in enumerate(self.pages):
            if page != HOLE and index not in used:
                self.pool.release(page)
                self.pages[index] = HOLE
        del self.pages[max(used, default=-1) + 1 :]

    def page_spans(self, index: int) -> list[Span]:
        """Who wrote which tokens of page `index`."""
        start, stop = index * self.page_size, (index + 1) * self.page_size
        inside = [span for span in self.spans if span.start < stop and span.stop > start]
        return [Span(max(span.start, start), min(span.stop, stop), span.writer) for span in inside]

    def is_full(self, index: int) -> bool:
        """Whether every token of page `index` has been written."""
        return sum(span.stop - span.start for span in self.page_spans(index)) == self.page_size

    def adopt(self, pages: Mapping[int, int], spans: Sequence[Span]) -> None:
        """Takes a share in pages that others have written, `spans` by whom, in place of holes."""
        for index, page in pages.items():
            self.pool.share(page)
            self.pages.extend([HOLE] * (index + 1 - len(self.pages)))
            self.pages[index] = page
        self.spans = _joined([*self.spans, *spans])

    def give_up(self, indices: Collection[int]) -> None:
        """Releases whole pages, and forgets the tokens on them."""
        kept = [self.page_spans(index) for index in range(len(self.pages)) if index not in indices]
        for index in indices:
            self.pool.release(self.pages[index])
            self.pages[index] = HOLE
        while self.pages and self.pages[-1] == HOLE:
            self.pages.pop()
        self.spans = _joined([span for spans in kept for span in spans])

    def fork(self) -> "PageRun":
        """A second run over the same pages; whoever writes to one of them first takes a copy."""
        other = PageRun(self.pool, self.page_size)
        other.pages, other.spans = list(self.pages), list(self.spans)
        for page in other.pages:
            if page != HOLE:
                self.pool.share(page)
        return other

    def _page_range(self, start: int, stop: int) -> range:
        return range(start // self.page_size, -(-stop // self.page_size)) if stop > start else range(0)

    def _needs_page(self, index: int) -> bool:
        page = self.page(index)
        return page == HOLE or self.pool.num_references(page) > 1


def _joined(spans: Sequence[Span]) -> list[Span]:
    """The same tokens in order, one span where a writer goes on."""
    joined: list[Span] = []
    for span in sorted(spans, key=lambda span: span.start):
        last = joined[-1] if joined else None
        if last and last.stop == span.start and last.writer == span.writer:
            joined[-1] = Span(last.start, span.stop, span.writer)
        else:
            joined.append(span)
    return joined
