"""Who waits for whose pages: what a request lacks and another is just writing is read once.

A context's page under a key has a name, (key, hash of all token ids up to the page's end). Names only decide who waits:
what a request finds in the cache in the end is compared token by token.
"""

from collections.abc import Hashable

from lragent_jax.executor import Row
from lragent_jax.request import Request


def pages_needed_next(request: Request, row: Row) -> frozenset[Hashable]:
    """The first full page under each key that the request lacks and has to read."""
    names, length = _page_names(request), len(request.trajectory)
    firsts = [
        (key, missing[0][0] // run.page_size)
        for key, run in zip(row.keys, row.written, strict=True)
        if any(run is required for required in row.required) and (missing := run.missing(length))
    ]
    return frozenset((key, names[index]) for key, index in firsts if index < len(names))


def pages_written(request: Request, row: Row) -> frozenset[Hashable]:
    """The full pages that the request's prefill is going to write, or has just written."""
    names = _page_names(request)
    return frozenset(
        (key, names[index])
        for chunk in row.chunks
        for key, run, write_from in zip(chunk.runs.keys, chunk.runs.written, chunk.write_from, strict=True)
        if write_from < chunk.stop
        for index in range(write_from // run.page_size, min(-(-chunk.stop // run.page_size), len(names)))
    )


def _page_names(request: Request) -> list[Hashable]:
    """Of all full pages of the request's context, which only grows."""
    names, size = request.page_names, request.trajectory.page_size
    for start in range(len(names) * size, len(request.trajectory) - size + 1, size):
        names.append(hash((names[-1] if names else None, tuple(request.trajectory.ids_between(start, start + size)))))
    return names
