"""Sets of token positions as sorted, disjoint intervals [start, stop)."""

from collections.abc import Iterable

Interval = tuple[int, int]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The positions that are in any of them; neighbours join."""
    merged: list[Interval] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        elif start < stop:
            merged.append((start, stop))
    return merged


def intersection(one: Iterable[Interval], other: list[Interval]) -> list[Interval]:
    """The positions that are in both sets."""
    return [(max(a, c), min(b, d)) for a, b in one for c, d in other if max(a, c) < min(b, d)]


def difference(one: Iterable[Interval], other: list[Interval]) -> list[Interval]:
    """The positions of `one` that are not in `other`."""
    left = []
    for start, stop in one:
        for a, b in other:
            if b <= start or a >= stop:
                continue
            if a > start:
                left.append((start, a))
            start = max(start, b)
        if start < stop:
            left.append((start, stop))
    return left
