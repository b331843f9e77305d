"""LRAgent's trace: what each mode runs of it, and chunk lengths that suit it."""

import pytest

from lragent_jax.chunks import bucket_for, plan_chunks
from lragent_jax.measure.react_trace import mean_context, num_tokens, react_trace, spans, trace_buckets
from lragent_jax.page_pool import PagePool
from lragent_jax.page_run import PageRun


class Reader:
    """Somebody with one empty run."""

    def __init__(self):
        self.required = self.written = [PageRun(PagePool(0), 64)]
        self.writer_content = None


LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768)


@pytest.mark.parametrize("chunk", [8, 8192])
def test_every_token_is_run_once_and_read_by_whom_the_mode_says(chunk):
    calls = react_trace(chunk)
    last = num_tokens(calls) - 1  # the token sampled last is not run
    decoded = sum(count - 1 for _, _, count in calls)
    assert sum(stop - start for start, stop in spans(calls, "base_lr")) == last - decoded
    for mode in ("none", "base"):
        # plan runs all but the ends that others wrote, action all up to its last call, reflect everything.
        assert sum(stop - start for start, stop in spans(calls, mode)) > 2.5 * (last - decoded)
    assert all(0 <= start < stop <= last for mode in ("none", "base", "base_lr") for start, stop in spans(calls, mode))


def test_spans_by_hand():
    calls = [("a", 10, 3), ("b", 4, 2), ("a", 5, 1)]
    assert spans(calls, "base_lr") == [(0, 10), (12, 17), (18, 24)]
    assert spans(calls, "none") == [(0, 10), (0, 17), (12, 24)]
    assert spans(calls, "base") == [(0, 10), (0, 12), (12, 17), (12, 18), (18, 24)]
    assert mean_context(calls, "base_lr") == pytest.approx(
        (sum(range(1, 11)) + sum(range(13, 18)) + sum(range(19, 25))) / 21
    )


@pytest.mark.parametrize("chunk", LENGTHS)
@pytest.mark.parametrize("mode", ["none", "base", "base_lr"])
def test_buckets_leave_little_padding_and_few_pieces(chunk, mode):
    """A chunk reads all weights once: no mode may be made slow by chunks that suit another."""
    buckets = trace_buckets(chunk)
    assert len(buckets) <= 5
    run, padded, pieces, least = 0, 0, 0, 0
    for start, stop in spans(react_trace(chunk), mode):
        chunks = plan_chunks(stop - start, Reader(), lambda content: None, buckets)
        run += stop - start
        padded += sum(bucket_for(chunk.num_tokens, buckets) for chunk in chunks)
        pieces += len(chunks)
        least += -(-(stop - start) // buckets[-1])
    assert padded <= (1.16 if chunk > 256 else 1.3) * run
    assert pieces <= 1.5 * least + 6
