"""The plan of a step by itself: what it must never do, and that in the end everybody is served."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lragent_jax.scheduler import Limits, RunningRequest, StepPlan, WaitingRequest, batch_size, plan_step

LIMITS = Limits(batch_size=4, token_budget=32, prefill_batch_size=4, decode_block=16, mixed_block=4)


def waiting(id: int, pages: int = 1, chunks=(8,), needs=(), writes=()) -> WaitingRequest:
    return WaitingRequest(id, {"base": pages}, chunks, 9, 16, frozenset(needs), frozenset(writes))


def running(id: int, chunks=(), steps_left: int = 9, growth: int = 0, to_come: int = 0, **more) -> RunningRequest:
    return RunningRequest(id, chunks, steps_left, 16, {"base": growth}, {"base": to_come}, **more)


def plan(waiting=(), running=(), free: int = 100, limits: Limits = LIMITS) -> StepPlan:
    return plan_step(waiting, running, {"base": free}, limits)


def test_a_lone_request_is_read_and_goes_on_in_one_step():
    assert plan([waiting(3, chunks=(16, 8))]) == StepPlan((3,), ((3,), (3,)), (3,), 9, ())


def test_chunks_of_one_length_share_a_program_and_the_budget_counts_padding():
    rows = [waiting(i) for i in range(4)]
    assert plan(rows).prefill == ((0, 1, 2, 3),)
    three = dataclasses.replace(LIMITS, token_budget=31)
    assert plan(rows, limits=three).prefill == ((0, 1), (2,)), "a third row would be padded to four"
    alone = dataclasses.replace(LIMITS, prefill_batch_size=1)
    assert plan(rows, limits=alone).prefill == ((0,), (1,), (2,), (3,))
    mixed = [waiting(0, chunks=(16,)), waiting(1, chunks=(8,)), waiting(2, chunks=(16,))]
    assert plan(mixed).prefill == ((0, 2),)


def test_decoding_is_short_while_others_are_read():
    assert plan(running=[running(0, steps_left=30)]).num_steps == 16
    assert plan(running=[running(0, steps_left=30), running(1, chunks=(32, 32))]).num_steps == 4
    assert plan(running=[running(0, steps_left=30), running(1, chunks=(32,), steps_left=40)]).num_steps == 16
    assert plan(running=[running(0, steps_left=2), running(1, steps_left=3)]).num_steps == 3
    assert plan(running=[dataclasses.replace(running(0), max_steps=2), running(1)]).num_steps == 2
    assert plan(running=[running(0, steps_left=0)]) == StepPlan((), (), (), 0, ())


def test_who_came_first_is_not_overtaken():
    assert plan([waiting(1, pages=9), waiting(2)], [running(0)], free=8).admitted == ()
    assert plan([waiting(1, pages=8), waiting(2)], [running(0)], free=8).admitted == (1,)


def test_admission_leaves_room_for_half_of_what_may_come():
    assert plan([waiting(1, pages=5)], [running(0, to_come=8)], free=8).admitted == ()
    assert plan([waiting(1, pages=4)], [running(0, to_come=8)], free=8).admitted == (1,)
    assert plan([waiting(1, pages=5)], free=3).admitted == (1,), "alone: whether it fits the caller finds out"
    assert plan([waiting(1, pages=5), waiting(2, pages=0)], free=3).admitted == (1,)


def test_nobody_reads_what_another_is_reading():
    same = [waiting(i, needs={"a"}, writes={"a", "b"}) for i in range(3)]
    assert plan([*same, waiting(3, needs={"c"})]).admitted == (0, 3)
    assert plan([waiting(1, needs={"a"})], [running(0, chunks=(8,), writes=frozenset("a"))]).admitted == ()
    assert plan([waiting(1, needs={"a"})], [running(0, writes=frozenset("a"))]).admitted == (1,), "it has been read"


def test_the_last_to_come_gives_its_pages():
    rows = [running(0, growth=1), running(1, growth=1), running(2)]
    short = plan([waiting(3, pages=0)], rows, free=1)
    assert (short.preempted, short.decoded, short.admitted) == ((2,), (0,), ())
    assert plan(running=[running(0, growth=1)], free=0).preempted == ()
    assert plan(running=[running(0, growth=1)], free=0).decoded == (0,), "nobody else holds what it needs"


@dataclasses.dataclass
class Job:
    """A request as a caller sees it: pages for its context, and for each `per_page` tokens that it decodes."""

    id: int
    context: int
    chunks: tuple[int, ...]
    output: int
    prefix: str | None
    arrives: int
    left: list[int] = dataclasses.field(default_factory=list)  # chunks
    decoded: int = 0
    pages: int = 0
    waited: int = 0
    preempted: int = 0


PER_PAGE = 4
TOTAL_PAGES = 12


def pages_of(job: Job, decoded: int) -> int:
    return job.context + -(-decoded // PER_PAGE)


jobs = st.lists(
    st.tuples(
        st.integers(1, 4), st.lists(st.sampled_from([8, 16, 32]), min_size=1, max_size=3), st.integers(0, 30),
        st.sampled_from([None, "a", "b"]), st.integers(0, 12),
    ),
    min_size=1, max_size=12,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(jobs, st.integers(1, 5), st.integers(8, 12), st.integers(1, 4))
def test_everybody_is_served_and_nothing_is_overcommitted(drawn, num_rows, reserve, prefill_batch_size):
    """The loop that calls the plan, in a few lines: pages are counted, chunks and tokens are ticked off."""
    limits = Limits(
        batch_size=num_rows, token_budget=32, prefill_batch_size=prefill_batch_size, decode_block=8, mixed_block=3
    )
    ordered = sorted(drawn, key=lambda job: job[4])
    todo = [Job(i, context, tuple(chunks), output, prefix, at) for i, (context, chunks, output, prefix, at)
            in enumerate(ordered)]  # fmt: skip
    queue: list[Job] = []
    active: dict[int, Job] = {}
    shared: set[str | None] = set()
    finished: list[int] = []
    for step in range(600):
        queue += [job for job in todo if job.arrives == step]
        queue.sort(key=lambda job: job.id)
        free = TOTAL_PAGES - sum(job.pages for job in active.values())
        assert free >= 0
        descriptions = [
            RunningRequest(
                job.id, tuple(job.left), job.output - job.decoded, 8,
                {"base": max(0, pages_of(job, min(job.output, job.decoded + 8)) - job.pages) if not job.left else 0},
                {"base": pages_of(job, job.output) - job.pages}, frozenset({job.prefix} - {None}),
            )
            for job in active.values()
        ]  # fmt: skip
        looked_at: list[int] = []

        def ask(queue=queue, shared=shared, descriptions=descriptions, looked_at=looked_at):
            for job in list(queue):
                looked_at.append(job.id)
                needs = {job.prefix} - {None} - shared
                start = pages_of(job, min(job.output, job.decoded + (reserve if descriptions or queue[0] is not job
                                                                     else job.output)))  # fmt: skip
                yield WaitingRequest(job.id, {"base": start}, job.chunks, job.output - job.decoded, 8,
                                     frozenset(needs), frozenset(needs))  # fmt: skip

        result = plan_step(ask(), descriptions, {"base": free}, limits)
        check(result, descriptions, queue, looked_at, limits)
        for id in result.preempted:
            job = active.pop(id)
            job.pages, job.left, job.preempted = 0, [], job.preempted + 1
            queue.append(job)
        was_alone = not active
        for id in result.admitted:
            job = next(job for job in queue if job.id == id)
            queue.remove(job)
            first = was_alone and id == result.admitted[0]
            job.pages = pages_of(job, job.output if first else min(job.output, job.decoded + reserve))
            job.left = list(job.chunks)
            active[id] = job
        assert sum(job.pages for job in active.values()) <= TOTAL_PAGES, "more pages are promised than there are"
        for program in result.prefill:
            for id in program:
                active[id].left.pop(0)
                if not active[id].left:
                    shared |= {active[id].prefix} - {None}
        for id in result.decoded:
            job = active[id]
            job.decoded = min(job.output, job.decoded + result.num_steps)
            job.pages = max(job.pages, pages_of(job, job.decoded))
        for id in [id for id, job in active.items() if not job.left and job.decoded == job.output]:
            finished.append(id)
            del active[id]
        if len(finished) == len(todo):
            break
    assert sorted(finished) == [job.id for job in todo]
    assert todo[0].preempted == 0, "who came first gets on, always"


def check(result: StepPlan, running: list[RunningRequest], queue: list[Job], looked_at: list[int], limits: Limits):
    by_id = {request.id: request for request in running}
    assert len(by_id) - len(result.preempted) + len(result.admitted) <= limits.batch_size
    assert len(looked_at) <= len(queue)
    if result.preempted:
        assert result.preempted == (max(by_id),) != (min(by_id),)
        assert not result.admitted
    chunks = {request.id: list(request.chunks) for request in running if request.id not in result.preempted}
    chunks |= {job.id: list(job.chunks) for job in queue if job.id in result.admitted}
    used = 0
    for program in result.prefill:
        lengths = {chunks[id].pop(0) for id in program}
        assert len(lengths) == 1
        assert len(set(program)) == len(program)
        assert batch_size(len(program)) <= limits.prefill_batch_size
        used += batch_size(len(program)) * lengths.pop()
    assert used <= limits.token_budget
    if any(chunks.values()) or result.prefill:
        assert result.prefill, "as long as there is something to read, something is read"
    assert all(not chunks[id] for id in result.decoded), "nobody goes on before its context has been read"
    assert not set(result.decoded) & set(result.preempted)
    if result.decoded:
        assert 1 <= result.num_steps <= (limits.mixed_block if any(chunks.values()) else limits.decode_block)


@pytest.mark.parametrize(("rows", "padded"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_batches_are_padded_to_powers_of_two(rows, padded):
    assert batch_size(rows) == padded
