"""Every program that calls can need, compiled before the first of them: lowered one after another, compiled together.

Python traces and lowers a program, which threads cannot share out; the compiler works without Python's lock, and so
does reading what it left in the persistent cache. Then every program runs once on rows that read and write nothing,
in the engine's own cache: calls find it as any call leaves it.
"""

import contextlib
import dataclasses
import gc
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from lragent_jax import generation
from lragent_jax.chunks import bucket_for
from lragent_jax.dispatcher import wait_for_nobody
from lragent_jax.sampling import SamplingArrays, sampling_arrays
from lragent_jax.scheduler import batch_size

if TYPE_CHECKING:
    from lragent_jax.executor import DecodeBatch, Executor

Progress = Callable[[int, int, str], None]
Lower = Callable[[], jax.stages.Lowered]

_MAX_THREADS = 8
"""Compilations at a time: each takes memory, on GPUs the device's too, and has threads of its own."""


class WarmupTimes(NamedTuple):
    """How many programs there are, and seconds: until all were lowered, then until all were compiled, then run once."""

    num_programs: int
    lower_s: float
    compile_s: float
    run_s: float


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a batch is padded to: rows, columns of their page tables, and low-rank tables that they may write."""

    batch: int
    width: int
    num_tables: int


@dataclasses.dataclass(frozen=True)
class Prefill:
    """One program: so many tokens of every row, that write base pages or only low-rank ones.

    last_only: of long chunks, whether only the last token's hidden states are made. Scoring asks for all of them.
    """

    shape: Shape
    num_tokens: int
    write_base: bool
    last_only: bool

    def __str__(self) -> str:
        scored = generation.has_last_only(self.num_tokens) and not self.last_only
        return f"{'scored ' * scored}prefill of {self.shape.batch} x {self.num_tokens}"


class Warmup:
    """The programs of batches of these sizes, over contexts of at most `max_tokens` (by default the model's longest).

    Without `scoring` those are left out that only scoring a recorded output takes: scores, and of every long chunk a
    second program, which makes the hidden states of all of its tokens.
    """

    def __init__(
        self, executor: "Executor", batch_sizes: Sequence[int], max_tokens: int | None = None, scoring: bool = True
    ):
        self._executor, self._scoring = executor, scoring
        batches = {batch_size(min(size, executor.max_batch_size)) for size in batch_sizes}

        def shapes(batches: Iterable[int]) -> list[Shape]:
            return [
                Shape(batch, width, num_tables)
                for batch in sorted(set(batches))
                for width in _widths(executor.widths(batch), max_tokens, executor.cache.page_size)
                for num_tables in executor.low_rank_table_counts()
            ]

        self.decodes = shapes(batch_size(max(batch, executor.min_batch_size)) for batch in batches)
        most = 1 << executor.prefill_batch_size.bit_length() - 1
        prefills = shapes(min(batch, most) for batch in batches)
        write_base = (True, False) if executor.skips_base else (True,)
        self.prefills = [
            Prefill(shape, num_tokens, writes, last_only)
            for shape, num_tokens, writes in itertools.product(prefills, executor.prefill_buckets, write_base)
            if shape.batch == 1 or shape.batch * num_tokens <= executor.token_budget
            for last_only in (True, False)
            if last_only == generation.has_last_only(num_tokens) or (not last_only and scoring and shape.batch == 1)
        ]

    def __call__(self, progress: Progress | None = None) -> WarmupTimes:
        programs = list(self.programs())
        total = len(programs) + len(self.prefills) + len(self.decodes) + 1

        def show(done: int, what: str) -> None:
            if progress:
                progress(done, total, what)

        lower_s, compile_s = compile_side_by_side(programs, show)
        started, done = time.perf_counter(), len(programs)
        for i, prefill in enumerate(self.prefills):
            show(done + i, f"first {prefill}")
            self._run_prefill(prefill)
        done += len(self.prefills)
        for i, shape in enumerate(self.decodes):
            show(done + i, f"first decode of {shape.batch} rows")
            self._executor.decode(self._blank_decode(shape), 1)
        self._executor.cache.warmup()
        jax.block_until_ready(self._executor.cache.arrays)
        show(total, "ready")
        return WarmupTimes(len(programs), lower_s, compile_s, time.perf_counter() - started)

    def programs(self) -> Iterator[tuple[str, Lower]]:
        """All but the few that compile in next to no time, by what they do; the longest to compile come first."""
        for shape in self.decodes:
            yield f"decode of {shape.batch} rows", lambda shape=shape: self._lower_decode(shape)
        for batch in sorted({prefill.shape.batch for prefill in self.prefills}):
            for draws, what in ((True, "sampling"), (False, "the likeliest tokens")):
                yield f"{what} of {batch} rows", lambda batch=batch, draws=draws: self._lower_begin(batch, draws)
        for prefill in self.prefills:
            yield str(prefill), lambda prefill=prefill: self._lower_prefill(prefill)
        for num_tokens in self._executor.prefill_buckets if self._scoring else ():
            yield f"scores of {num_tokens} tokens", lambda num_tokens=num_tokens: self._lower_unembed(num_tokens)

    def _lower_prefill(self, prefill: Prefill) -> jax.stages.Lowered:
        args, options = self._executor.prefill_arguments(*self._blank_prefill(prefill))
        return generation.prefill.lower(*args, **options)

    def _lower_decode(self, shape: Shape) -> jax.stages.Lowered:
        args, options = self._executor.decode_arguments(self._blank_decode(shape), 1)
        return generation.decode.lower(*args, **options)

    def _lower_begin(self, batch: int, draws: bool) -> jax.stages.Lowered:
        shape = batch, self._executor.cache.config.vocab_size
        logits = jax.ShapeDtypeStruct(shape, np.float32, sharding=self._executor.home)
        zeros = np.zeros(batch, np.int32)
        sampling = _blank_sampling(batch)
        return generation.begin.lower(self._executor.slots, logits, sampling, zeros, zeros, zeros, draws=draws)

    def _lower_unembed(self, num_tokens: int) -> jax.stages.Lowered:
        executor = self._executor
        shape = 1, num_tokens, executor.cache.config.width
        hidden = jax.ShapeDtypeStruct(shape, executor.cache.dtype, sharding=executor.home)
        return generation.unembed.lower(*executor.unembed_arguments(hidden))

    def _run_prefill(self, prefill: Prefill) -> None:
        executor, batch = self._executor, prefill.shape.batch
        logits, hidden = executor.run_prefill(*self._blank_prefill(prefill))
        executor.begin(logits, [], [], _blank_sampling(batch), [])
        if batch == 1 and self._scoring and not prefill.last_only:
            # Not run: all scores of the longest chunk would need gigabytes. On a mesh they lie where XLA has put them.
            generation.unembed.lower(*executor.unembed_arguments(hidden)).compile()

    def _blank_prefill(self, prefill: Prefill) -> tuple[Any, ...]:
        batch = prefill.shape.batch
        tokens = np.zeros((batch, prefill.num_tokens), np.int32)
        return (
            tokens,
            np.zeros(batch, np.int32),
            self._blank_table(prefill.shape),
            prefill.write_base,
            prefill.last_only,
        )

    def _blank_decode(self, shape: Shape) -> "DecodeBatch":
        empty = self._executor.decode_batch([], [], _blank_sampling(shape.batch), shape.batch)
        return dataclasses.replace(empty, table=self._blank_table(shape))

    def _blank_table(self, shape: Shape):
        return self._executor.blank_table(shape.batch, shape.width, shape.num_tables)


def compile_side_by_side(
    programs: Sequence[tuple[str, Lower]], show: Callable[[int, str], None]
) -> tuple[float, float]:
    """Compiles what each returns, several at a time; `show` is told how many are done, from this thread.

    The functions of `jax.jit` whose `lower` that was find their programs when they are called. Returns the seconds
    until all were lowered, and from then on until all were compiled. Raises what the first compilation to fail raised.
    """
    started = time.perf_counter()
    number = max(2, min(os.cpu_count() or 1, _MAX_THREADS))
    threads = ThreadPoolExecutor(number, thread_name_prefix="compile", initializer=wait_for_nobody)
    try:
        compiling = []
        with collector_paused():
            for what, lower in programs:
                show(sum(program.done() for program in compiling), what)
                compiling.append(threads.submit(lower().compile))
        lowered = time.perf_counter()
        for done, program in enumerate(as_completed(compiling)):
            program.result()
            show(done + 1, "compiling")
        return lowered - started, time.perf_counter() - lowered
    finally:
        threads.shutdown(cancel_futures=True)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Python's collector of cycles does not run meanwhile, in no thread.

    A program being traced is very many objects that stay. To walk over them, and over everything that was imported,
    again and again takes a part of the time that is felt, and next to nothing is found.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _widths(widths: Sequence[int], max_tokens: int | None, page_size: int) -> Sequence[int]:
    """Those that tables of contexts of so many tokens come in."""
    if max_tokens is None:
        return widths
    widest = bucket_for(min(-(-max_tokens // page_size), widths[-1]), widths)
    return [width for width in widths if width <= widest]


def _blank_sampling(batch: int) -> SamplingArrays:
    return sampling_arrays([], [], (), batch)
