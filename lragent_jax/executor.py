"""Runs batches: chunks of what their rows still lack, then token after token."""

import collections
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from lragent_jax import generation
from lragent_jax.adapter_registry import BASE_MODEL_ROW, AdapterRegistry, LoadedAdapter
from lragent_jax.adapter_runs import AdapterRuns
from lragent_jax.chunks import Chunk, bucket_for, plan_chunks
from lragent_jax.flat_tree import FlatTree
from lragent_jax.generation import Slots
from lragent_jax.kernels.lora_attention.dispatch import default_platform, platforms_of
from lragent_jax.models.cache_view import NEVER, PageTable, RecomputedPages
from lragent_jax.models.errors import InputError, LRAgentError, OutOfPagesError
from lragent_jax.page_run import HOLE, PageRun
from lragent_jax.paged_cache import Claim, PagedCache
from lragent_jax.prefix_tree import Reused
from lragent_jax.sampling import SamplingArrays
from lragent_jax.scheduler import batch_size
from lragent_jax.sharing import PoolName, Sharing
from lragent_jax.trajectory import Trajectory


@dataclasses.dataclass(eq=False)
class Row(AdapterRuns):
    """One trajectory under one adapter, for the length of a call."""

    reused: list[Reused] = dataclasses.field(default_factory=list)  # pages from the prefix cache
    chunks: list[Chunk[AdapterRuns]] = dataclasses.field(default_factory=list)

    @property
    def is_read_apart(self) -> bool:
        """Whether a token that was run to be cached runs again, under the row's adapter, for its logits."""
        return self.writer is not self.adapter

    @property
    def num_prefilled_tokens(self) -> int:
        """Tokens run, each as often as it was."""
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens that were not run."""
        num_run = end = 0
        for chunk in self.chunks:  # none begins in front of a gap that an earlier one left
            num_run += max(chunk.stop - max(chunk.start, end), 0)
            end = max(end, chunk.stop)
        return end - num_run

    def num_new_pages(self, start: int, stop: int) -> dict[PoolName, int]:
        """Pages that tokens [start, stop) take where those in front of them have theirs."""
        size = self.base_run.page_size
        num_pages = -(-stop // size) - -(-start // size)
        num_runs: collections.Counter[PoolName] = collections.Counter(key.pool for key in self.keys)
        return {pool: count * num_pages for pool, count in num_runs.items()}

    def release_unused(self) -> None:
        """Returns the pages that were reserved and not needed."""
        self.trajectory.release_unused()

    def give_up_reused(self) -> None:
        """Returns what the prefix cache had: the call is not going to run."""
        while self.reused:
            self.reused.pop().give_back()

    def share(self) -> None:
        """Lets other contexts with the same beginning have what is on its full pages."""
        self.trajectory.share()

    def visit(self) -> None:
        """Counts, for eviction, that the call begins to read."""
        self.trajectory.visit(dict(zip(self.keys, self.written, strict=True)))

    def commit(self, start: int, stop: int) -> None:
        """Records that the row has written tokens [start, stop)."""
        for run in self.written:
            run.commit(start, stop, self.writer_content)

    def preempt(self) -> None:
        """Lets all its pages go, in the middle of the call; see `Trajectory.preempt`.

        Whoever goes on with the call opens a row anew, whose plan rebuilds what was written as it was.
        """
        self.trajectory.preempt()


@dataclasses.dataclass(frozen=True)
class DecodeBatch:
    """The rows of a decode step as host arrays, padded to a compiled batch; `slot_ids` [B] is where they stand."""

    slot_ids: np.ndarray
    adapter_ids: np.ndarray
    sampling: SamplingArrays
    table: PageTable


class Executor:
    """The compiled programs of one engine over its weights, adapters and caches.

    `prefill_buckets` and `table_widths` are the sizes that programs are compiled for; every batch is padded up to
    them and to a power of two. It has `max_batch_size` rows at most, in decoding `min_batch_size` at least, in prefill
    `prefill_batch_size` rows and `token_budget` tokens. So their number is bounded and nothing compiles after a
    `Warmup`. `home`: see `Devices.home`.
    """

    def __init__(
        self,
        graphdef,
        params,
        registry: AdapterRegistry,
        cache: PagedCache,
        sharing: Sharing,
        *,
        prefill_buckets: Sequence[int],
        table_widths: Sequence[int],
        decode_block: int,
        max_batch_size: int,
        min_batch_size: int,
        token_budget: int,
        prefill_batch_size: int,
        implementation: str | None,
        prefix_cache: bool,
        home: Sharding | None = None,
    ):
        self.graphdef, self.params = graphdef, params
        self._flat_params = FlatTree(params)
        self.registry, self.cache, self.sharing = registry, cache, sharing
        self.prefill_buckets, self.table_widths = tuple(prefill_buckets), tuple(table_widths)
        self.decode_block, self.implementation = decode_block, implementation
        self.max_batch_size, self.min_batch_size = max_batch_size, min_batch_size
        self.token_budget, self.prefill_batch_size = token_budget, prefill_batch_size
        self.prefix_cache, self.home = prefix_cache, home
        self.forget_slots()

    def forget_slots(self) -> None:
        """Nobody stands anywhere."""
        self.slots = jax.device_put(Slots.empty(self.max_batch_size), self.home)

    def open_row(self, trajectory: Trajectory, adapter: LoadedAdapter) -> Row:
        """The row, with every page that its runs lack and somebody else has written for the same tokens.

        Its pages stay until the trajectory is preempted or its `extending` ends.
        """
        row = Row(**self._runs(trajectory, adapter))
        row.reused = self._open(row)
        return row

    def _runs(self, trajectory: Trajectory, adapter: LoadedAdapter) -> dict[str, Any]:
        """The fields of `AdapterRuns`."""
        own = self.sharing.low_rank_key(adapter.keys)
        low_rank = self.sharing.written_low_rank_keys(adapter.keys, self.registry.keys)
        recomputed = self.sharing.recomputed_key(adapter.keys) if self.cache.recomputed_layers else None
        base = self.sharing.base_key(adapter.keys)
        return {
            "trajectory": trajectory,
            "adapter": adapter,
            "writer": BASE_MODEL_ROW if self.sharing.writes_without_adapter else adapter,
            "base_run": trajectory.run(base),
            "recomputed_run": None if recomputed is None else trajectory.run(recomputed),
            "low_rank_runs": [trajectory.run(key) for key in low_rank],
            "group_rows": [self.registry.group_row(key) for key in low_rank],
            "reads_low_rank": own is not None,
            "keys": [base, *([] if recomputed is None else [recomputed]), *low_rank],
        }

    def _open(self, runs: AdapterRuns) -> list[Reused]:
        by_key = dict(zip(runs.keys, runs.written, strict=True))
        return runs.trajectory.open(by_key, beside=self.sharing.keys_rest_on_each_other)

    def share(self, rows: Sequence[Row]) -> None:
        """Lets other contexts that begin like these rows have their full pages, if the engine is to."""
        for row in rows if self.prefix_cache else ():
            row.share()

    def reserve(self, rows: Sequence[Row], num_new_tokens: Sequence[int]) -> None:
        """Plans the rows' prefill and gives them pages, for so many new tokens each; all of them or none.

        Raises `OutOfPagesError`, and changes nothing, if even without everything that may be evicted too few are free.
        """
        self.cache.note_calls([row.required_keys for row in rows])
        try:
            self.cache.reserve([claim for row, count in zip(rows, num_new_tokens, strict=True)
                                for claim in self.plan(row, count)])  # fmt: skip
        except OutOfPagesError:
            for row in rows:
                row.give_up_reused()
            raise
        for row in rows:
            row.visit()

    def plan(self, row: Row, num_new_tokens: int) -> list[Claim]:
        """Sets the chunks that bring the row up to date, and returns what it will write with the new tokens.

        What the trajectory has on record and on no page comes first, under the adapters that wrote it.
        """
        length, writers = len(row.trajectory), dict[str | None, AdapterRuns | None]()

        def writer_of(content: str | None) -> AdapterRuns | None:
            if content not in writers:
                adapter = self.registry.find_content(content)
                writers[content] = None if adapter is None else self._open_writer(row, adapter)
            return writers[content]

        # Not the row itself, which holds the chunks: a cycle would keep a trajectory that its caller has dropped.
        reader = AdapterRuns(**self._runs(row.trajectory, row.adapter))
        row.chunks = plan_chunks(length, reader, writer_of, self.prefill_buckets, read_apart=row.is_read_apart)
        claims = [
            Claim(run, write_from, chunk.stop)
            for chunk in row.chunks
            for run, write_from in zip(chunk.runs.written, chunk.write_from, strict=True)
        ]
        return claims + [Claim(run, length, length + num_new_tokens) for run in row.written]

    def _open_writer(self, row: Row, adapter: LoadedAdapter) -> AdapterRuns:
        runs = AdapterRuns(**self._runs(row.trajectory, adapter))
        row.reused += self._open(runs)
        return runs

    def chunks(self, row: Row, length: int) -> list[Chunk[AdapterRuns]]:
        """What brings the row's pages up to `length` tokens, of which nobody has run those that are missing."""
        return plan_chunks(length, row, lambda content: None, self.prefill_buckets)

    def pools_read(self, adapter: LoadedAdapter) -> list[PoolName]:
        """The pools that hold a whole context which this adapter reads."""
        rules = self.sharing
        keys = (rules.base_key(adapter.keys), rules.recomputed_key(adapter.keys), rules.low_rank_key(adapter.keys))
        return [key.pool for key in keys if key is not None and self.cache.pools[key.pool].num_pages]

    def padded_length(self, chunk: Chunk) -> int:
        """Tokens of the program that runs the chunk."""
        return bucket_for(chunk.num_tokens, self.prefill_buckets)

    def prefill(self, rows: Sequence[Row]) -> jax.Array:
        """Runs all rows' chunks; the logits [B, V] behind each row's last token, B padded to a bucket."""
        rounds = max(len(row.chunks) for row in rows)
        logits = None
        for i in range(rounds):
            # Rows with fewer chunks start later: all of them end in the last round, whose logits are everybody's.
            chunks = [row.chunks[i - rounds] if len(row.chunks) >= rounds - i else None for row in rows]
            logits, _ = self.run_chunks(rows, chunks)
        assert logits is not None
        return logits

    def run_chunks(
        self, rows: Sequence[Row], chunks: Sequence[Chunk[AdapterRuns] | None], *, last_only: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """One chunk of every row that has one, in one program; the last logits [B, V] and hidden states.

        Those are of all tokens, [B, T, D], unless `last_only` lets the program leave them out. A chunk may run under
        another adapter than its row, to rebuild what that one wrote.
        """
        batch = batch_size(len(rows))
        num_tokens = bucket_for(max(chunk.num_tokens for chunk in chunks if chunk), self.prefill_buckets)
        tokens, adapter_ids = np.zeros((batch, num_tokens), np.int32), np.zeros(batch, np.int32)
        table = self._table([chunk.runs if chunk else row for row, chunk in zip(rows, chunks, strict=True)], batch)
        for b, (row, chunk) in enumerate(zip(rows, chunks, strict=True)):
            if chunk is None:
                continue
            tokens[b, : chunk.num_tokens] = row.trajectory.ids_between(chunk.start, chunk.stop)
            table.q_starts[b], table.kv_lens[b] = chunk.start, chunk.stop
            _set_write_from(table, b, chunk.runs, chunk.write_from)
            adapter_ids[b] = _runner(chunk).bank_row
        write_base = any(chunk.write_from[0] < chunk.stop for chunk in chunks if chunk)
        logits, hidden = self.run_prefill(tokens, adapter_ids, table, write_base, last_only)
        for chunk in chunks:
            if chunk is not None:
                _commit(chunk)
        return logits, hidden

    def read_chunk(self, row: Row, chunk: Chunk[AdapterRuns]) -> jax.Array:
        """Runs a chunk of one row; the hidden states [1, T, D] that the row's adapter has there."""
        _, hidden = self.run_chunks([row], [chunk], last_only=False)
        if row.is_read_apart:
            _, hidden = self.run_chunks([row], [chunk.query()], last_only=False)
        return hidden

    def begin(
        self, logits: jax.Array, slot_ids: Sequence[int | None], kv_lens: Sequence[int], sampling: SamplingArrays,
        index: Sequence[int],
    ) -> jax.Array:  # fmt: skip
        """The first tokens [B] behind a prefill; rows with a slot decode from there.

        `index`: how many tokens a row generated before it was interrupted.
        """
        batch = logits.shape[0]
        tokens, self.slots = generation.begin(
            self.slots, logits, sampling, self._padded_slots(slot_ids, batch), _padded(kv_lens, batch),
            _padded(index, batch), draws=bool(np.any(sampling.temperature > 0)),
        )  # fmt: skip
        return tokens

    def decode_batch(
        self, rows: Sequence[Row], slot_ids: Sequence[int], sampling: SamplingArrays, batch: int
    ) -> DecodeBatch:
        """What decoding these rows needs beside their slots; the same from step to step while they have their pages."""
        return DecodeBatch(
            slot_ids=self._padded_slots(slot_ids, batch),
            adapter_ids=_padded([row.adapter.bank_row for row in rows], batch),
            sampling=sampling,
            table=self.decode_table(rows, batch),
        )

    def decode_table(self, rows: Sequence[Row], batch: int | None = None) -> PageTable:
        """The table that decoding reads and writes by; how long rows are, their slots know."""
        table = self._table(rows, batch or batch_size(len(rows)))
        for b, row in enumerate(rows):
            _set_write_from(table, b, row, [0] * len(row.written))
        return table

    def decode(self, batch: DecodeBatch, num_steps: int) -> jax.Array:
        """Up to `num_steps` (at most `decode_block`) tokens per row: [B, decode_block], -1 behind a row's end."""
        args, options = self.decode_arguments(batch, num_steps)
        with self.said_of_implementation():
            out, self.slots, self.cache.arrays = generation.decode(*args, **options)
        return out

    def decode_arguments(self, batch: DecodeBatch, num_steps: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Those of `generation.decode`."""
        args = (
            self.graphdef, self._flat_params, self.registry.flat_bank, self.cache.arrays, self.slots, batch.slot_ids,
            batch.sampling, batch.adapter_ids, batch.table, np.int32(num_steps),
        )  # fmt: skip
        return args, {
            "block": self.decode_block,
            "write_without_adapter": self.sharing.writes_without_adapter,
            "implementation": self.implementation,
        }

    def _padded_slots(self, slot_ids: Sequence[int | None], batch: int) -> np.ndarray:
        """Slot ids [B]; that of a row without one, and of padding, is out of range."""
        padded = np.full(batch, self.max_batch_size, np.int32)
        padded[: len(slot_ids)] = [self.max_batch_size if slot is None else slot for slot in slot_ids]
        return padded

    def _table(self, rows: Sequence[AdapterRuns], batch: int) -> PageTable:
        """The rows' pages, with lengths and write-from positions that run and write nothing yet."""
        width = max((len(run.pages) for row in rows for run in row.written), default=1)
        width = bucket_for(max(width, 1), self.widths(batch))
        table = self.blank_table(batch, width, self._num_low_rank_tables(rows))
        for b, row in enumerate(rows):
            table.base[b, : len(row.base_run.pages)] = _indices(row.base_run)
            if table.recomputed is not None and row.recomputed_run is not None:
                table.recomputed.pages[b, : len(row.recomputed_run.pages)] = _indices(row.recomputed_run)
            for g, run in enumerate(row.low_rank_runs):
                table.low_rank[g, b, : len(run.pages)] = _indices(run)
                table.group_ids[g, b] = row.group_rows[g]
        return table

    def widths(self, batch: int) -> Sequence[int]:
        """The widths of page tables that programs of so many rows are compiled for.

        Rows are compared column by column, each with each. One row is not: how wide its table is makes no difference.
        """
        return self.table_widths[-1:] if batch == 1 else self.table_widths

    def blank_table(self, batch: int, width: int, num_tables: int) -> PageTable:
        """Host arrays to fill in; as they are, no row runs or writes anything."""
        layers = self.cache.recomputed_layers
        recomputed = RecomputedPages(np.zeros((batch, width), np.int32), np.full(batch, NEVER, np.int32), layers)
        return PageTable(
            q_starts=np.zeros(batch, np.int32),
            kv_lens=np.zeros(batch, np.int32),
            base=np.zeros((batch, width), np.int32),
            base_write_from=np.full(batch, NEVER, np.int32),
            low_rank=np.zeros((num_tables, batch, width), np.int32),
            low_rank_write_from=np.full((num_tables, batch), NEVER, np.int32),
            group_ids=np.zeros((num_tables, batch), np.int32),
            read_slots=np.zeros(batch, np.int32),
            recomputed=recomputed if layers else None,
        )

    def _num_low_rank_tables(self, rows: Sequence[AdapterRuns]) -> int:
        """One, or enough for all A-groups: two numbers, so that programs stay few."""
        if not self.cache.low_rank_ranks:
            return 0
        return 1 if all(len(row.low_rank_runs) <= 1 for row in rows) else batch_size(len(self.registry.a_groups))

    def low_rank_table_counts(self) -> Sequence[int]:
        """All that `_num_low_rank_tables` returns."""
        counts = {self._num_low_rank_tables([])}
        if self.cache.low_rank_ranks and self.sharing.writes_other_groups:
            counts.add(batch_size(len(self.registry.a_groups)))
        return sorted(counts)

    @property
    def skips_base(self) -> bool:
        """Whether there are programs that write low-rank pages alone.

        Where all agents share one A-group, tokens lack those alone only when they were evicted: rare enough to project
        K and V for nothing, a few percent of the work, rather than to compile every prefill twice.
        """
        return self.sharing.skips_base and (self.sharing.mode == "base" or len(self.registry.a_groups) > 1)

    def run_prefill(
        self, tokens, adapter_ids, table: PageTable, write_base: bool, last_only: bool
    ) -> tuple[jax.Array, jax.Array]:
        """`generation.prefill` over the engine's caches: logits and hidden states."""
        args, options = self.prefill_arguments(tokens, adapter_ids, table, write_base, last_only)
        with self.said_of_implementation():
            logits, hidden, self.cache.arrays = generation.prefill(*args, **options)
        return logits, hidden

    @contextlib.contextmanager
    def said_of_implementation(self) -> Iterator[None]:
        """One of attention that was asked for and does not fit is the caller's to change."""
        try:
            yield
        except NotImplementedError as reason:
            raise self._does_not_fit(str(reason)) from reason
        except ValueError as error:  # a kernel of another platform that nothing but JAX's lowering balks at
            platforms, here = platforms_of(self.implementation), default_platform()
            if isinstance(error, LRAgentError) or not platforms or here in platforms:
                raise
            raise self._does_not_fit(f"it is written for {', '.join(platforms)}, and this is {here}") from error

    def _does_not_fit(self, reason: str) -> InputError:
        return InputError(
            f"implementation={self.implementation!r} cannot run this model here: {reason}; without implementation, "
            "the first that can is taken"
        )

    def prefill_arguments(
        self, tokens, adapter_ids, table: PageTable, write_base: bool, last_only: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Those of `generation.prefill`; of short chunks there is one program, which returns all hidden states."""
        args = (
            self.graphdef, self._flat_params, self.registry.flat_bank, self.cache.arrays, tokens, adapter_ids, table,
        )  # fmt: skip
        return args, {
            "write_base": write_base or not self.skips_base,
            "last_only": last_only and generation.has_last_only(tokens.shape[1]),
            "implementation": self.implementation,
        }

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits f32 [1, T, V] of one row's hidden states [1, T, D]."""
        return generation.unembed(*self.unembed_arguments(hidden))

    def unembed_arguments(self, hidden: jax.Array | jax.ShapeDtypeStruct) -> tuple[Any, ...]:
        """Those of `generation.unembed`."""
        return self.graphdef, self._flat_params, hidden


def _padded(values: Sequence[int], batch: int) -> np.ndarray:
    padded = np.zeros(batch, np.int32)
    padded[: len(values)] = values
    return padded


def _runner(chunk: Chunk[AdapterRuns]) -> LoadedAdapter:
    """Who runs a chunk: the writer if it writes anything, otherwise the adapter, as a query."""
    return chunk.runs.writer if chunk.writes else chunk.runs.adapter


def _commit(chunk: Chunk[AdapterRuns]) -> None:
    for run, write_from in zip(chunk.runs.written, chunk.write_from, strict=True):
        run.commit(write_from, chunk.stop, chunk.runs.writer_content)


def _indices(run: PageRun) -> list[int]:
    return [0 if page == HOLE else page for page in run.pages]


def _set_write_from(table: PageTable, b: int, row: AdapterRuns, write_from: Sequence[int]) -> None:
    """Fills in the positions from which row `b` writes each of its runs."""
    table.base_write_from[b] = write_from[0]
    num_full_rank = len(row.full_rank_runs)
    if table.recomputed is not None and num_full_rank > 1:
        table.recomputed.write_from[b] = write_from[1]
    table.low_rank_write_from[: len(row.low_rank_runs), b] = write_from[num_full_rank:]
