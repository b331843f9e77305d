"""Shares and their differences, with 95 % intervals."""

import dataclasses
import math

Z = 1.959964
"""Of a normal distribution's 97.5 %."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def share(right: str) -> Estimate:
    """Of ones in a string of 0 and 1, with Wilson's interval."""
    n, p = len(right), right.count("1") / len(right)
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return Estimate(p, max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half)))


def paired_difference(right: str, reference: str) -> Estimate:
    """Of the shares of ones, over the same questions: `right` less `reference`.

    The interval is that of Agresti and Min (Statistics in Medicine 24, 2005): Wald's for paired shares, with half a
    question added to each of the four outcomes, so that it has a width where no outcome differs.
    """
    if len(right) != len(reference):
        raise ValueError(f"{len(right)} and {len(reference)} outcomes are not of the same questions")
    pairs = list(zip(right, reference, strict=True))
    gained, lost, n = pairs.count(("1", "0")), pairs.count(("0", "1")), len(pairs)
    adjusted = (gained - lost) / (n + 2)
    half = Z * math.sqrt(gained + lost + 1 - (gained - lost) ** 2 / (n + 2)) / (n + 2)
    return Estimate((gained - lost) / n, adjusted - half, adjusted + half)
