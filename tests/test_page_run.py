"""Page pools and page runs, against a model that keeps every token's page in a dictionary."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lragent_jax.models.errors import OutOfPagesError
from lragent_jax.page_pool import PagePool
from lragent_jax.page_run import HOLE, PageCopy, PageRun, Span

PAGE_SIZE = 8


def test_pool_hands_out_each_page_once_and_takes_it_back():
    pool = PagePool(3)
    pages = {pool.allocate() for _ in range(3)}
    assert pages == {0, 1, 2}
    with pytest.raises(OutOfPagesError, match="all 3 pages"):
        pool.allocate()
    pool.release(1)
    assert pool.allocate() == 1


def test_pool_refuses_to_free_twice_or_share_a_free_page():
    pool = PagePool(2)
    page = pool.allocate()
    pool.release(page)
    with pytest.raises(ValueError, match="free"):
        pool.release(page)
    with pytest.raises(ValueError, match="free"):
        pool.share(page)


def test_pool_grows_without_moving_pages():
    pool = PagePool(1)
    assert pool.allocate() == 0
    pool.grow(3)
    assert {pool.allocate(), pool.allocate()} == {1, 2}
    assert pool.num_free == 0


def written(run: PageRun, start: int, stop: int, writer: str | None) -> list[PageCopy]:
    copies = run.prepare(start, stop)
    run.commit(start, stop, writer)
    return copies


def test_a_slot_keeps_its_first_writer():
    run = PageRun(PagePool(8), PAGE_SIZE)
    written(run, 0, 10, "plan")
    run.commit(4, 14, "action")
    assert run.spans == [Span(0, 10, "plan"), Span(10, 14, "action")]


def test_spans_of_one_writer_join():
    run = PageRun(PagePool(8), PAGE_SIZE)
    written(run, 0, 10, "plan")
    written(run, 10, 12, "plan")
    assert run.spans == [Span(0, 12, "plan")]


def test_holes_are_missing_and_take_no_page():
    run = PageRun(PagePool(8), PAGE_SIZE)
    written(run, 20, 26, None)
    assert run.pages[:2] == [HOLE, HOLE]
    assert run.pool.num_used == 2
    assert run.missing(30) == [(0, 20), (26, 30)]


def test_writing_after_a_fork_copies_the_last_page_only():
    pool = PagePool(8)
    run = PageRun(pool, PAGE_SIZE)
    written(run, 0, 12, None)
    fork = run.fork()
    assert pool.num_used == 2
    copies = written(fork, 12, 14, "plan")
    assert copies == [PageCopy(source=run.pages[1], target=fork.pages[1])]
    assert fork.pages[0] == run.pages[0]
    assert written(run, 12, 14, "action") == []  # nobody else holds the page any more


def test_truncate_inside_a_page_keeps_it():
    run = PageRun(PagePool(8), PAGE_SIZE)
    written(run, 0, 20, None)
    run.truncate(9)
    assert (len(run.pages), run.pool.num_used, run.missing(20)) == (2, 2, [(9, 20)])


def test_the_record_outlives_pages_and_not_the_last_trace_of_a_writer_who_left():
    run = PageRun(PagePool(8), PAGE_SIZE)
    written(run, 0, 16, "plan")
    written(run, 16, 24, None)
    run.give_up([0, 2])
    assert run.missing(24) == [(0, 8), (16, 24)]
    assert run.spans == [Span(0, 16, "plan"), Span(16, 24, None)]
    run.writer_unloaded("plan")
    assert run.spans == [Span(8, 16, "plan", rebuildable=False), Span(16, 24, None)], "what is gone, nobody can rebuild"
    run.give_up([1])
    assert run.spans == [Span(16, 24, None)]
    run.commit(0, 24, "action")
    assert run.spans == [Span(0, 24, "action")]
    assert run.held == [], "on no page"


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["write", "fork", "truncate", "free"]),
        st.integers(0, 5),
        st.integers(0, 40),
        st.integers(1, 20),
    ),
    max_size=30,
)


@given(OPERATIONS)
def test_runs_never_leak_or_share_what_may_not_be_shared(operations):
    pool = PagePool(512)
    runs, tokens = [PageRun(pool, PAGE_SIZE)], [dict[int, int]()]  # token -> the value written there
    device: dict[int, dict[int, int]] = {}  # page -> slot -> value
    for stamp, (operation, which, start, count) in enumerate(operations):
        i = which % len(runs)
        run = runs[i]
        if operation == "write":
            for copy in run.prepare(start, start + count):
                device[copy.target] = dict(device[copy.source])
            for position in range(start, start + count):
                if position not in tokens[i]:
                    tokens[i][position] = stamp
                    device.setdefault(run.pages[position // PAGE_SIZE], {})[position % PAGE_SIZE] = stamp
            run.commit(start, start + count, str(stamp))
        elif operation == "fork":
            runs.append(run.fork())
            tokens.append(dict(tokens[i]))
        elif operation == "truncate":
            run.truncate(start)
            tokens[i] = {position: value for position, value in tokens[i].items() if position < start}
        elif len(runs) > 1:
            run.truncate(0)
            del runs[i], tokens[i]
        for run, held in zip(runs, tokens, strict=True):
            assert {p for span in run.spans for p in range(span.start, span.stop)} == set(held)
            for position, value in held.items():
                assert device[run.pages[position // PAGE_SIZE]][position % PAGE_SIZE] == value
        in_use = {page for run in runs for page in run.pages if page != HOLE}
        assert pool.num_used == len(in_use)
    for run in runs:
        run.truncate(0)
    assert pool.num_used == 0
