"""Who is admitted, prefilled, decoded and preempted in the next step: a plain function, without a model or a device."""

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence

from lragent_jax.sharing import PoolName

Pages = Mapping[PoolName, int]
"""How many pages of which pool; a pool that is not named needs none."""


def batch_size(num_rows: int) -> int:
    """The rows of the program that runs `num_rows`: the smallest power of two that holds them."""
    return 1 << max(num_rows - 1, 0).bit_length()


@dataclasses.dataclass(frozen=True)
class Limits:
    """`batch_size` requests have pages at a time. `token_budget` tokens are prefilled in a step, in programs of
    `prefill_batch_size` rows at most, padding included in both; and a row decodes `decode_block` tokens in it, or
    `mixed_block` while others still have to be prefilled.
    """

    batch_size: int
    token_budget: int
    prefill_batch_size: int
    decode_block: int
    mixed_block: int


@dataclasses.dataclass(frozen=True)
class WaitingRequest:
    """A request without pages. Ids say who came first: the smaller, the earlier.

    `pages`: what its admission takes, pages for a step's tokens included, and those that it finds in the cache and
    nobody else holds. `chunks`: the
    padded lengths of its prefill. `needs`: the next pages that it lacks, by any name; `writes`: all that it will write.
    `steps_left`, `max_steps` as in `RunningRequest`.
    """

    id: int
    pages: Pages
    chunks: tuple[int, ...]
    steps_left: int
    max_steps: int
    needs: frozenset[Hashable] = frozenset()
    writes: frozenset[Hashable] = frozenset()


@dataclasses.dataclass(frozen=True)
class RunningRequest:
    """A request with pages: prefilled as long as it has `chunks` left, decoded then.

    `steps_left`: the most tokens that it may decode yet. `max_steps`: the most between two looks of its reader.
    `growth`: pages that it must get before its next tokens. `to_come`: what its longest output takes beyond those it
    has.
    """

    id: int
    chunks: tuple[int, ...]
    steps_left: int
    max_steps: int
    growth: Pages = dataclasses.field(default_factory=dict)
    to_come: Pages = dataclasses.field(default_factory=dict)
    writes: frozenset[Hashable] = frozenset()


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Ids. `prefill`: for each program, the requests that run their next chunk in it, all of one padded length."""

    admitted: tuple[int, ...]
    prefill: tuple[tuple[int, ...], ...]
    decoded: tuple[int, ...]
    num_steps: int
    preempted: tuple[int, ...]


def plan_step(
    waiting: Iterable[WaitingRequest], running: Sequence[RunningRequest], free: Pages, limits: Limits
) -> StepPlan:
    """The next step. `waiting` is asked for one request after the other, earliest first, as far as there is room.

    * Who came first goes first, in everything. A request that does not fit keeps all later ones waiting; only one that
      waits for pages which another is just writing lets them pass, because it will find those in the cache.
    * Admission leaves free half of what running requests may still come to need: outputs mostly end before their limit.
      A request that nobody is beside is always admitted; whether it fits at all is for the caller to find out.
    * Rows whose growth does not fit sit out. While there are any, the request that came last is preempted and nobody
      is admitted. The first of all is never preempted: somebody always gets on, and in turn everybody.
    * A row whose last chunk runs in this step decodes in it.
    """
    left = dict(free)
    running = sorted(running, key=lambda request: request.id)
    grown = {request.id for request in running if _take(left, request.growth)}
    preempted: tuple[int, ...] = ()
    if len(running) == 1:
        grown = {running[0].id}
    elif len(grown) < len(running):
        preempted = (running[-1].id,)
        running = running[:-1]
    admitted = [] if preempted else _admitted(waiting, running, left, limits)
    chunks = {request.id: request.chunks for request in (*running, *admitted)}
    prefill, num_run = _prefill(chunks, limits)
    unread = {id for id, sizes in chunks.items() if num_run.get(id, 0) < len(sizes)}
    grown.update(request.id for request in admitted)
    decoded = [r for r in (*running, *admitted) if r.id not in unread and r.id in grown and r.steps_left]
    num_steps = min([limits.mixed_block if unread else limits.decode_block, *(r.max_steps for r in decoded)])
    return StepPlan(
        admitted=tuple(request.id for request in admitted),
        prefill=tuple(prefill),
        decoded=tuple(r.id for r in decoded),
        num_steps=min(num_steps, max((r.steps_left for r in decoded), default=0)),
        preempted=preempted,
    )


def _take(left: dict[PoolName, int], pages: Pages) -> bool:
    """Takes pages off what is left, if there are enough of every pool."""
    if any(left.get(pool, 0) < count for pool, count in pages.items() if count):
        return False
    for pool, count in pages.items():
        left[pool] = left.get(pool, 0) - count
    return True


def _admitted(
    waiting: Iterable[WaitingRequest], running: Sequence[RunningRequest], left: dict[PoolName, int], limits: Limits
) -> list[WaitingRequest]:
    for pool in left:
        left[pool] -= sum(request.to_come.get(pool, 0) for request in running) // 2
    being_written = {page for request in running if request.chunks for page in request.writes}
    admitted: list[WaitingRequest] = []
    if len(running) >= limits.batch_size:
        return admitted
    for request in waiting:
        if request.needs & being_written:
            continue
        fits = _take(left, request.pages)
        if not fits and (running or admitted):
            break
        admitted.append(request)
        being_written |= request.writes
        if not fits or len(running) + len(admitted) >= limits.batch_size:
            break
    return admitted


def _prefill(chunks: Mapping[int, tuple[int, ...]], limits: Limits) -> tuple[list[tuple[int, ...]], dict[int, int]]:
    """The programs of one step, and how many chunks each request runs in them."""
    budget = limits.token_budget
    programs: list[tuple[int, ...]] = []
    num_run: dict[int, int] = dict.fromkeys(sorted(chunks), 0)
    while ready := [(id, chunks[id][i]) for id, i in num_run.items() if i < len(chunks[id])]:
        size = ready[0][1]
        members: list[int] = []
        for id, length in ready:
            rows = batch_size(len(members) + 1)
            if length == size and rows <= limits.prefill_batch_size and rows * size <= budget:
                members.append(id)
        if not members:
            break
        budget -= batch_size(len(members)) * size
        programs.append(tuple(members))
        for id in members:
            num_run[id] += 1
    return programs, num_run
