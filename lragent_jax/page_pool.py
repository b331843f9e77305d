"""Which pages of a pool are in use, and by how many page runs."""

from lragent_jax.models.errors import OutOfPagesError


class PagePool:
    """Hands out page indices and counts who holds each one. Knows nothing of what is on a page."""

    def __init__(self, num_pages: int):
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack; the lowest page comes first
        self._kept: set[int] = set()
        self.num_kept_alone = 0
        """Pages that the prefix cache keeps and nobody else holds."""

    @property
    def num_pages(self) -> int:
        return len(self._references)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def allocate(self) -> int:
        """A free page, held once; raises `OutOfPagesError` when there is none."""
        if not self._free:
            raise OutOfPagesError(f"all {self.num_pages} pages are in use")
        page = self._free.pop()
        self._references[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more holder of a page in use."""
        if not self._references[page]:
            raise ValueError(f"page {page} is free and cannot be shared")
        self._references[page] += 1
        self.num_kept_alone -= self._references[page] == 2 and page in self._kept

    def release(self, page: int) -> None:
        """One holder less; the last one frees the page."""
        if not self._references[page]:
            raise ValueError(f"page {page} is free already")
        self._references[page] -= 1
        if not self._references[page]:
            self._free.append(page)
        self.num_kept_alone += self._references[page] == 1 and page in self._kept

    def keep(self, page: int) -> None:
        """`share` for the prefix cache, which holds a page once."""
        self.share(page)
        self._kept.add(page)

    def let_go(self, page: int) -> None:
        """`release` for the prefix cache."""
        self._kept.remove(page)
        self.num_kept_alone -= self._references[page] == 1
        self.release(page)

    def is_kept(self, page: int) -> bool:
        """Whether the prefix cache holds the page."""
        return page in self._kept

    def num_references(self, page: int) -> int:
        """How many runs hold the page."""
        return self._references[page]

    def grow(self, num_pages: int) -> None:
        """Adds pages up to `num_pages`; those that exist keep their indices."""
        added = range(self.num_pages, num_pages)
        self._references.extend(0 for _ in added)
        self._free[:0] = reversed(added)
