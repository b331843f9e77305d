"""Recorded outputs under an agent: the logits that it would have sampled them from."""

import time
from collections.abc import Sequence

import numpy as np

from lragent_jax.adapter_registry import LoadedAdapter
from lragent_jax.executor import Executor
from lragent_jax.outputs import ScoreOutput
from lragent_jax.trajectory import Trajectory


def score(
    executor: Executor, trajectory: Trajectory, ids: Sequence[int], adapter: LoadedAdapter, started: float
) -> ScoreOutput:
    """Prefills what the adapter lacks, then runs `ids` as if it had generated them; they join the trajectory.

    `started`: when the call began, in seconds of `time.perf_counter`. Whoever calls holds the cache's lock and the
    trajectory. Raises `OutOfPagesError` before anything is run; if something goes wrong later, no token joins.
    """
    row = executor.open_row(trajectory, adapter)
    length = len(trajectory)
    executor.reserve([row], [max(len(ids) - 1, 0)])
    try:
        logits = [np.asarray(executor.prefill([row]))[:1]]
        ttft_s = time.perf_counter() - started
        trajectory.join(ids)
        if len(ids) > 1:
            for chunk in executor.chunks(row, length + len(ids) - 1):
                hidden = executor.read_chunk(row, chunk)
                logits.append(np.asarray(executor.unembed(hidden))[0, : chunk.num_tokens])
    except BaseException:
        executor.cache.is_doubtful = True
        trajectory.truncate(length)
        raise
    finally:
        row.release_unused()
    executor.share([row])
    return ScoreOutput(
        logits=np.concatenate(logits),
        num_prefilled_tokens=row.num_prefilled_tokens,
        num_cached_tokens=row.num_cached_tokens,
        ttft_s=ttft_s,
    )
