"""What a call still has to run, cut into chunks that compiled programs exist for."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

from lragent_jax.intervals import Interval, difference, union
from lragent_jax.page_run import PageRun


class Passes(Protocol):
    """Passes under one adapter: the runs that they have to read, all that they write, and the name they write under."""

    @property
    def required(self) -> Sequence[PageRun]: ...

    @property
    def written(self) -> Sequence[PageRun]: ...

    @property
    def writer_content(self) -> str | None: ...


P = TypeVar("P", bound=Passes)


@dataclasses.dataclass(frozen=True)
class Chunk(Generic[P]):
    """Tokens [start, stop) to run under `runs`, and the position from which each of its written runs lacks them."""

    start: int
    stop: int
    write_from: tuple[int, ...]
    runs: P

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def writes(self) -> bool:
        return any(position < self.stop for position in self.write_from)

    def query(self) -> "Chunk[P]":
        """The same tokens once more, to write nothing."""
        return dataclasses.replace(self, write_from=(self.stop,) * len(self.write_from))


def plan_chunks(
    length: int,
    reader: P,
    writer_of: Callable[[str | None], P | None],
    buckets: Sequence[int],
    *,
    read_apart: bool = False,
) -> list[Chunk[P]]:
    """The chunks after which all runs that `reader` requires hold [0, length) and the last token's logits are known.

    What is on record and on no page is rebuilt as it was: under the adapter that wrote it (`writer_of` its content
    hash), behind what that one read, which is rebuilt before where it is gone, too. Whatever has no record, or one
    whose writer is not loaded any more (None), `reader` runs and writes, in all its runs.

    A slot is written once: in each chunk what a written run lacks is a suffix, which one position describes. If
    nothing lacks the last token, or another adapter wrote it, it runs again as a query that writes nothing. With
    `read_apart` it does so in any case, in a chunk of its own.
    """
    plan = _Plan(length, reader, writer_of)
    passes = _merged(plan.passes())
    chunks = [
        Chunk(a, b, tuple(min(max(position, a), b) for position in each.write_from), each.runs)
        for each in passes
        for a, b in _split(each.start, each.stop, buckets)
    ]
    if read_apart or not chunks or chunks[-1].runs is not reader or chunks[-1].stop < length:
        chunks.append(Chunk(length - 1, length, (length,) * len(reader.written), reader))
    return chunks


@dataclasses.dataclass(frozen=True)
class _Job(Generic[P]):
    """Tokens [start, stop) of a run that passes under `by` have to write."""

    start: int
    stop: int
    run: PageRun
    by: P
    rebuilds: bool


class _Plan(Generic[P]):
    """Which passes write what, found from what the reader lacks back to what the writers of that read."""

    def __init__(self, length: int, reader: P, writer_of: Callable[[str | None], P | None]):
        self.reader, self._writer_of = reader, writer_of
        self._jobs: list[_Job[P]] = []
        self._add_jobs(length)

    def passes(self) -> list[Chunk[P]]:
        """In an order in which everything is there before it is read; every written run lacks all of a pass or none."""
        runs = {id(run): run for job in self._jobs for run in job.by.written}.values()
        borders = {border for run in runs for edges in _edges(run) for border in edges}
        cuts = sorted(borders.union(*((job.start, job.stop) for job in self._jobs)))
        passes = []
        for start, stop in itertools.pairwise(cuts):
            if jobs := [job for job in self._jobs if job.start <= start and stop <= job.stop]:
                passes += self._passes_between(start, stop, jobs)
        return passes

    def _add_jobs(self, length: int) -> None:
        covered: dict[int, int] = {}  # reader -> how far what it lacks was looked at
        assigned: dict[int, list[Interval]] = {}  # run -> what somebody is going to write
        todo = [(self.reader, length)]
        while todo:
            reader, stop = todo.pop(0)
            start, covered[id(reader)] = covered.get(id(reader), 0), max(stop, covered.get(id(reader), 0))
            for run in reader.required:
                lacking = difference([(max(a, start), b) for a, b in run.missing(stop) if b > start],
                                     assigned.get(id(run), []))  # fmt: skip
                assigned[id(run)] = union([*assigned.get(id(run), []), *lacking])
                for a, b in lacking:
                    jobs = self._jobs_for(run, a, b, reader)
                    self._jobs += jobs
                    todo += [(job.by, job.stop) for job in jobs]

    def _jobs_for(self, run: PageRun, start: int, stop: int, reader: P) -> list[_Job[P]]:
        jobs = []
        for span in run.recorded(start, stop):
            writer = self._passes_of(span.writer)
            if writer is not None and any(run is other for other in writer.written):
                jobs.append(_Job(span.start, span.stop, run, writer, rebuilds=True))
        new = difference([(start, stop)], [(job.start, job.stop) for job in jobs])
        return jobs + [_Job(a, b, run, reader, rebuilds=False) for a, b in new]

    def _passes_of(self, writer: str | None) -> P | None:
        return self.reader if writer == self.reader.writer_content else self._writer_of(writer)

    def _passes_between(self, start: int, stop: int, jobs: list[_Job[P]]) -> list[Chunk[P]]:
        filled: set[int] = set()
        passes = []
        for runs in self._in_order(jobs):
            written = _written_at(start, runs, [job for job in jobs if job.by is runs], filled)
            filled |= written
            if written:
                write_from = tuple(start if id(run) in written else stop for run in runs.written)
                passes.append(Chunk(start, stop, write_from, runs))
        return passes

    def _in_order(self, jobs: list[_Job[P]]) -> Iterable[P]:
        """Who has jobs, those whose pages others read before the others, the reader last if it can be.

        Two may wait for each other if adapters came and went in between: then the base pages' writer goes first.
        """
        left = list({id(job.by): job.by for job in jobs}.values())
        left.sort(key=lambda runs: runs is self.reader)
        while left:
            waiting = {
                id(runs) for runs in left for job in jobs
                if job.by is not runs and any(job.by is other for other in left)
                and any(job.run is run for run in runs.required)
            }  # fmt: skip
            base = [runs for runs in left if any(job.by is runs and job.run is runs.required[0] for job in jobs)]
            runs = next((runs for runs in left if id(runs) not in waiting), (base or left)[0])
            left = [other for other in left if other is not runs]
            yield runs


def _written_at(position: int, runs: Passes, jobs: Sequence[_Job], filled: set[int]) -> set[int]:
    """Which runs a pass at `position` writes: those it has to, and all others in which the token is its to write.

    That is what has its name on record, and beside a token that is new, whatever has no record.
    """
    to_write = {id(job.run) for job in jobs} | {id(run) for run in runs.required}  # it cannot read what is not there
    is_new = any(not job.rebuilds for job in jobs)
    written = set()
    for run in runs.written:
        if run.holds(position) or id(run) in filled:
            continue
        record = run.recorded(position, position + 1)
        is_its_own = record[0].writer == runs.writer_content if record else is_new
        if id(run) in to_write or is_its_own:
            written.add(id(run))
    return written


def bucket_for(size: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `size`."""
    return next(bucket for bucket in buckets if bucket >= size)


def _edges(run: PageRun) -> Iterable[Interval]:
    """Where what a run holds, or who wrote it, changes."""
    return [*run.held, *((span.start, span.stop) for span in run.spans)]


def _merged(passes: Iterable[Chunk[P]]) -> list[Chunk[P]]:
    """Passes that go on under the same adapter as one, as long as what each run lacks is a suffix."""
    merged: list[Chunk[P]] = []
    for each in passes:
        last = merged[-1] if merged else None
        if last is None or last.runs is not each.runs or last.stop != each.start or _stops_writing(last, each):
            merged.append(each)
            continue
        write_from = tuple(
            before if before < last.stop else after
            for before, after in zip(last.write_from, each.write_from, strict=True)
        )
        merged[-1] = Chunk(last.start, each.stop, write_from, each.runs)
    return merged


def _stops_writing(last: Chunk[P], each: Chunk[P]) -> bool:
    """Whether a run lacks the end of `last` and not the beginning of `each`."""
    return any(
        before < last.stop and after > each.start
        for before, after in zip(last.write_from, each.write_from, strict=True)
    )


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
