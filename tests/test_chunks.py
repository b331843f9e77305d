"""The plan of what to run: everything missing exactly once, in chunks that programs exist for."""

import dataclasses

from hypothesis import example, given
from hypothesis import strategies as st

from lragent_jax.chunks import plan_chunks
from lragent_jax.page_pool import PagePool
from lragent_jax.page_run import PageRun

BUCKETS = (4, 16, 64)
INTERVALS = st.lists(st.tuples(st.integers(0, 90), st.integers(1, 30)), max_size=4)


def run_with(intervals) -> PageRun:
    run = PageRun(PagePool(64), 8)
    for start, count in intervals:
        run.prepare(start, start + count)
        run.commit(start, start + count, None)
    return run


@dataclasses.dataclass(eq=False)
class Runs:
    """What one adapter reads and writes."""

    required: list[PageRun]
    written: list[PageRun]
    writer_content: str | None = None


def nobody(content: str | None) -> None:
    """No writer is loaded."""


def covered(run: PageRun) -> set[int]:
    return {position for span in run.spans for position in range(span.start, span.stop)}


@example(1, [[(0, 1)], []], False)
@given(st.integers(1, 120), st.lists(INTERVALS, min_size=1, max_size=3), st.booleans())
def test_a_plan_writes_every_missing_slot_once(length, runs, all_required):
    written = [run_with(intervals) for intervals in runs]
    required = written if all_required else written[:1]
    chunks = plan_chunks(length, Runs(required, written), nobody, BUCKETS)
    wanted = set().union(*(set(range(length)) - covered(run) for run in required))
    ran = [position for chunk in chunks for position in range(chunk.start, chunk.stop)]
    assert len(ran) == len(set(ran)), "a token runs twice"
    assert set(ran) == wanted | {length - 1}, "what is missing runs, and the last token always does"
    assert ran == sorted(ran), "a token may only run after those before it"
    for chunk in chunks:
        assert 0 < chunk.num_tokens <= BUCKETS[-1]
        here = set(range(chunk.start, chunk.stop))
        for run, write_from in zip(written, chunk.write_from, strict=True):
            # A token that nobody who is required lacks runs for its logits alone.
            assert set(range(write_from, chunk.stop)) == (here - covered(run) if here & wanted else set())


def test_a_fully_read_context_runs_its_last_token_as_a_query():
    run = run_with([(0, 20)])
    (chunk,) = plan_chunks(20, Runs([run], [run]), nobody, BUCKETS)
    assert (chunk.start, chunk.stop, chunk.write_from) == (19, 20, (20,))


def test_little_of_a_chunk_is_padding():
    empty = run_with([])
    for length in range(1, 500):
        chunks = plan_chunks(length, Runs([empty], [empty]), nobody, BUCKETS)
        padded = sum(min(b for b in BUCKETS if b >= chunk.num_tokens) for chunk in chunks)
        assert padded <= 1.5 * length + BUCKETS[0]
