"""LRAgent's ReAct trace (arXiv 2602.01053, Table 12): its calls, what each mode reads for them, and chunks that fit."""

Call = tuple[str, int, int]
"""(agent, new tokens, decoded tokens)"""

_SMALL_BUCKETS = (16, 48, 192, 576)
_CHUNK = 4096
_CATCH_UP = 72  # tokens beyond C that an agent reads with them, at most


def react_trace(chunk: int) -> list[Call]:
    """The 17 calls; `chunk` tokens (C in the paper's table) are read in each of the four turns."""
    turn = [("plan", chunk, 32), ("plan", 8, 8), ("action", 8, 8)]
    opening = [("plan", 512, 32), ("plan", 8, 8), ("action", 8, 8)]
    return [*opening, *(turn * 4), ("reflect", 32, 32), ("reflect", 8, 8)]


def num_tokens(calls: list[Call]) -> int:
    """The length of the context at the end."""
    return sum(new + decoded for _, new, decoded in calls)


def spans(calls: list[Call], mode: str) -> list[tuple[int, int]]:
    """Tokens [start, stop) that calls run before their first ones, in order, cut where what they write changes.

    The token that a call samples last has not been run: it belongs to the next call. Agents that keep something for
    themselves (`none`: all of it, `base`: low-rank pages) run what others have read; in `base` without writing base
    pages, apart from what is new.
    """
    length, written, read, found = 0, 0, {}, []
    for agent, new, decoded in calls:
        length += new
        start = read.get(agent, 0) if mode in ("none", "base") else written
        if mode == "base" and start < written:
            found.append((start, written))
            start = written
        found.append((start, length))
        length += decoded
        read[agent] = written = length - 1
    return found


def mean_context(calls: list[Call], mode: str) -> float:
    """How many tokens a token that is run attends to, on average; attention's FLOP per token grow with it."""
    found = spans(calls, mode)
    return sum((stop - start) * (start + stop + 1) / 2 for start, stop in found) / sum(b - a for a, b in found)


def trace_buckets(chunk: int) -> list[int]:
    """Chunk lengths for which all modes run the trace in few programs with little padding.

    The largest takes a turn's tokens in equal parts of about 4096, together with what an agent has to catch up on.
    """
    turn = chunk + _CATCH_UP
    parts = max(1, round(turn / _CHUNK))
    multiple = 64 if turn > 1024 else 16
    largest = -(-turn // (parts * multiple)) * multiple
    return sorted({*_SMALL_BUCKETS, largest})
