"""How likely the next calls are to read the pages of an adapter or an A-group."""

import collections
from collections.abc import Iterable, Sequence

from lragent_jax.sharing import PageKey

WINDOW = 256
"""The rows that shares are counted over."""


class AdapterUse:
    """Shares of the last rows that read each key, and the sizes of the batches that they ran in."""

    def __init__(self, window: int = WINDOW):
        self._window = window
        self._rows: collections.deque[tuple[frozenset[PageKey], int]] = collections.deque()
        self._readers: collections.Counter[PageKey] = collections.Counter()
        self._batch_sizes = 0

    def note(self, rows: Sequence[Iterable[PageKey]], batch_size: int) -> None:
        """Rows have begun that read these keys, in a batch of that size with those that run already."""
        for keys in map(frozenset, rows):
            self._rows.append((keys, batch_size))
            self._readers.update(keys)
            self._batch_sizes += batch_size
        while len(self._rows) > self._window:
            keys, size = self._rows.popleft()
            self._readers.subtract(keys)
            self._batch_sizes -= size

    def expected(self, key: PageKey) -> float:
        """1 - (1 - share)^batch, FASTLIBRA's (arXiv 2505.03756): the chance that a batch has a row that reads `key`.

        One more row than were seen counts for every key, so that nothing is worth nothing.
        """
        num_rows = len(self._rows)
        share = (self._readers[key] + 1) / (num_rows + 1)
        return 1 - (1 - share) ** max(self._batch_sizes / max(num_rows, 1), 1)
