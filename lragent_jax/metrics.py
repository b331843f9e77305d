"""What an engine has done and is doing: counters, and times of which the latest are kept."""

import collections
import dataclasses
from collections.abc import Iterable

import numpy as np

from lragent_jax.executor import Row
from lragent_jax.paged_cache import CacheStats
from lragent_jax.request import Request
from lragent_jax.sharing import PoolName

_KEPT = 4096


@dataclasses.dataclass(frozen=True)
class Latency:
    """Seconds: how often, on average, and the percentiles of the latest 4096; zeros before the first."""

    count: int = 0
    mean: float = 0.0
    p50: float = 0.0
    p99: float = 0.0


@dataclasses.dataclass(frozen=True)
class EngineMetrics:
    """Sums since the engine was made, but for what is said to be now.

    Attributes:
      num_finished, num_cancelled, num_failed: requests that have ended, and how.
      num_preempted: how often a request gave its pages to others and went on later.
      num_waiting, num_prefilling, num_decoding: requests now.
      num_steps: of the scheduler; mean_batch_size: requests that decoded in a step that decoded any.
      ttft: from a request's arrival to its first token on the host.
      inter_token: between two tokens of a request, averaged over those that came together.
      num_cached_tokens: tokens of prompts that were read from the cache.
      num_prefilled_tokens: tokens that were run for first tokens, each as often as it was.
      num_recomputed_tokens: tokens that were run again because their request had been interrupted.
      num_generated_tokens: stop ids included, and what a stop string cut off not.
      hit_rates: by pool, the share of tokens looked for at admission that the cache had; the prompt's own pages count.
      cache: pages and bytes now.
    """

    num_finished: int
    num_cancelled: int
    num_failed: int
    num_preempted: int
    num_waiting: int
    num_prefilling: int
    num_decoding: int
    num_steps: int
    mean_batch_size: float
    ttft: Latency
    inter_token: Latency
    num_cached_tokens: int
    num_prefilled_tokens: int
    num_recomputed_tokens: int
    num_generated_tokens: int
    hit_rates: dict[PoolName, float]
    cache: CacheStats


class Times:
    """Durations as they come."""

    def __init__(self):
        self._count, self._sum = 0, 0.0
        self._latest: collections.deque[float] = collections.deque(maxlen=_KEPT)

    def add(self, seconds: float, count: int = 1) -> None:
        self._count += count
        self._sum += seconds * count
        self._latest.extend([seconds] * count)

    def latency(self) -> Latency:
        if not self._count:
            return Latency()
        p50, p99 = np.percentile(list(self._latest), [50, 99])
        return Latency(self._count, self._sum / self._count, float(p50), float(p99))


class Metrics:
    """Counts what a batcher does; whoever calls a method holds the cache's lock."""

    def __init__(self):
        self.num_cancelled = self.num_preempted = self.num_failed = self.num_finished = 0
        self._ttft, self._inter_token = Times(), Times()
        self._num_steps = 0
        self._num_cached = self._num_prefilled = self._num_recomputed = self._num_generated = 0
        self._batch_sizes = Times()
        self._looked_for: collections.Counter[PoolName] = collections.Counter()
        self._found: collections.Counter[PoolName] = collections.Counter()

    def count_admission(self, request: Request, row: Row) -> None:
        """A request got its pages, for the first time or after it was interrupted."""
        length = len(request.trajectory)
        for key, run in zip(row.keys, row.written, strict=True):
            if any(run is required for required in row.required):
                self._looked_for[key.pool] += length
                self._found[key.pool] += length - sum(stop - start for start, stop in run.missing(length))
        if not request.generated.token_ids:
            request.num_cached_tokens = row.num_cached_tokens
            self._num_cached += row.num_cached_tokens

    def count_prefill(self, request: Request, num_tokens: int) -> None:
        if request.generated.token_ids:
            self._num_recomputed += num_tokens
        else:
            request.num_prefilled_tokens += num_tokens
            self._num_prefilled += num_tokens

    def count_tokens(self, request: Request, num_tokens: int, now: float) -> None:
        """Tokens of a request have come."""
        self._num_generated += num_tokens
        if request.last_token_at is None:
            request.first_token_at = now
            self._ttft.add(now - request.arrived_at)
        else:
            self._inter_token.add((now - request.last_token_at) / num_tokens, num_tokens)
        request.last_token_at = now

    def count_step(self, num_decoded: int) -> None:
        self._num_steps += 1
        if num_decoded:
            self._batch_sizes.add(num_decoded)

    def snapshot(self, running: Iterable[Request], num_waiting: int, cache: CacheStats) -> EngineMetrics:
        num_by_state = collections.Counter(request.state for request in running)
        return EngineMetrics(
            num_finished=self.num_finished,
            num_cancelled=self.num_cancelled,
            num_failed=self.num_failed,
            num_preempted=self.num_preempted,
            num_waiting=num_waiting,
            num_prefilling=num_by_state["prefilling"],
            num_decoding=num_by_state["decoding"],
            num_steps=self._num_steps,
            mean_batch_size=self._batch_sizes.latency().mean,
            ttft=self._ttft.latency(),
            inter_token=self._inter_token.latency(),
            num_cached_tokens=self._num_cached,
            num_prefilled_tokens=self._num_prefilled,
            num_recomputed_tokens=self._num_recomputed,
            num_generated_tokens=self._num_generated,
            hit_rates={pool: self._found[pool] / count for pool, count in self._looked_for.items() if count},
            cache=cache,
        )
