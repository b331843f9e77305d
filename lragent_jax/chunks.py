"""What a call still has to run, cut into chunks that compiled programs exist for."""

import dataclasses
import itertools
from collections.abc import Sequence

from lragent_jax.page_run import PageRun


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens [start, stop) to run, and the position from which each written run still lacks them."""

    start: int
    stop: int
    write_from: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def writes(self) -> bool:
        return any(position < self.stop for position in self.write_from)

    def query(self) -> "Chunk":
        """The same tokens once more, to write nothing."""
        return dataclasses.replace(self, write_from=(self.stop,) * len(self.write_from))


def plan_chunks(
    length: int,
    required: Sequence[PageRun],
    written: Sequence[PageRun],
    buckets: Sequence[int],
    *,
    read_apart: bool = False,
) -> list[Chunk]:
    """The chunks after which all `required` runs hold tokens [0, length) and the last token's logits are known.

    A slot is written once: in each chunk what a written run lacks is a suffix, which one position describes. If
    nothing lacks the last token, it runs again as a query that writes nothing. With `read_apart` it does so in any
    case, in a chunk of its own.
    """
    gaps = _union([gap for run in required for gap in run.missing(length)])
    if not read_apart and (not gaps or gaps[-1][1] < length):
        gaps.append((length - 1, length))
    borders = sorted({stop for run in written for _, stop in run.missing(length)})  # written again from here on
    chunks = []
    for start, stop in gaps:
        cuts = [start, *(border for border in borders if start < border < stop), stop]
        for piece_start, piece_stop in itertools.pairwise(cuts):
            for a, b in _split(piece_start, piece_stop, buckets):
                chunks.append(Chunk(a, b, tuple(_first_missing(run, a, b) for run in written)))
    if read_apart:
        chunks.append(Chunk(length - 1, length, (length,) * len(written)))
    return chunks


def bucket_for(size: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `size`."""
    return next(bucket for bucket in buckets if bucket >= size)


def _split(start: int, stop: int, buckets: Sequence[int]) -> list[tuple[int, int]]:
    """Cuts an interval so that little of each program's work is padding: at most a third above the smallest bucket."""
    pieces = []
    while start < stop:
        left = stop - start
        fitting = [bucket for bucket in buckets if bucket <= left]
        size = fitting[-1] if fitting else left
        if left <= buckets[-1] and bucket_for(left, buckets) <= 1.5 * left:
            size = left
        pieces.append((start, start + size))
        start += size
    return pieces


def _first_missing(run: PageRun, start: int, stop: int) -> int:
    missing = [max(a, start) for a, b in run.missing(stop) if b > start]
    return missing[0] if missing else stop


def _union(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged
