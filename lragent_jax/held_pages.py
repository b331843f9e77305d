"""Pages that running requests hold: all others can be had, but for the few that nobody could write again."""

from collections.abc import Iterable

from lragent_jax.executor import Row
from lragent_jax.page_run import HOLE
from lragent_jax.request import Request
from lragent_jax.sharing import PoolName


def held_pages(requests: Iterable[Request], pools: Iterable[PoolName]) -> dict[PoolName, set[int]]:
    """By pool, the pages of all requests that have some."""
    held: dict[PoolName, set[int]] = {name: set() for name in pools}
    for request in requests:
        if request.row is not None:
            add_pages(request.row, held)
    return held


def add_pages(row: Row, held: dict[PoolName, set[int]]) -> dict[PoolName, int]:
    """Adds a row's pages to those that are held; how many were not."""
    before = {name: len(pages) for name, pages in held.items()}
    for key, run in zip(row.keys, row.written, strict=True):
        held[key.pool].update(page for page in run.pages if page != HOLE)
    return {name: len(pages) - before[name] for name, pages in held.items()}
