"""What one adapter reads and writes of one trajectory."""

import dataclasses

from lragent_jax.adapter_registry import LoadedAdapter
from lragent_jax.page_run import PageRun
from lragent_jax.sharing import PageKey
from lragent_jax.trajectory import Trajectory


@dataclasses.dataclass(eq=False)
class AdapterRuns:
    """The page runs of a trajectory that passes under one adapter read and write, its own low-rank run first."""

    trajectory: Trajectory
    adapter: LoadedAdapter
    writer: LoadedAdapter  # the adapter, or the empty one of passes that write for all agents
    base_run: PageRun
    recomputed_run: PageRun | None
    low_rank_runs: list[PageRun]
    group_rows: list[int]  # the bank's A-group of each low-rank run
    reads_low_rank: bool  # whether the first of them is the adapter's own
    keys: list[PageKey]  # of the written runs

    @property
    def full_rank_runs(self) -> list[PageRun]:
        return [self.base_run] if self.recomputed_run is None else [self.base_run, self.recomputed_run]

    @property
    def written(self) -> list[PageRun]:
        return [*self.full_rank_runs, *self.low_rank_runs]

    @property
    def required(self) -> list[PageRun]:
        return [*self.full_rank_runs, *self.low_rank_runs[: int(self.reads_low_rank)]]

    @property
    def required_keys(self) -> list[PageKey]:
        return self.keys[: len(self.required)]

    @property
    def writer_content(self) -> str | None:
        """Whose name stands on what a pass writes."""
        return self.writer.keys.content
