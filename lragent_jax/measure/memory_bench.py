"""What agents and trajectories cost in pages, counted by real engines over one layer of a model's heads."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lragent_jax.engine import Engine
from lragent_jax.measure.batch_bench import fitting
from lragent_jax.measure.bench_model import BenchModel, narrow
from lragent_jax.measure.bench_setting import BenchSetting
from lragent_jax.measure.page_budget import num_copies
from lragent_jax.measure.trace_run import random_ids
from lragent_jax.models.errors import OutOfPagesError
from lragent_jax.sharing import Sharing, SharingMode
from lragent_jax.trajectory import Trajectory

_COMMON, _OWN = 4, 4  # pages of a context that all trajectories begin with, and the rest
_PAGES = _COMMON + _OWN
_READERS = 3
_OPENED = 4  # trajectories under `none`, at least


class _Pools(NamedTuple):
    """Of the same bytes in all modes, so that few programs are compiled; low-rank pages are never what runs out."""

    merged: int
    split: int
    low_rank: int

    def options(self, mode: SharingMode) -> dict[str, int]:
        if Sharing(mode).merged:
            return {"num_pages": self.merged}
        return {"num_pages": self.split, "num_low_rank_pages": self.low_rank}


def measure_memory(setting: BenchSetting, counts: Sequence[int]) -> dict[str, Any]:
    """Cache bytes by number of agents in each mode, and trajectories that can be open before anything is lost.

    One layer stands for all: every layer has pages of the same size. `pre_lr` has an A-group for every agent, the
    other modes one for all. Three agents read what is opened: at least so many must be among `counts`.
    """
    model = BenchModel(narrow(setting.config), setting.dtype, setting.rank, num_agents=max(_READERS, *counts))
    num_pages = max(_PAGES * len(model.agents), _READERS * (_COMMON + _OPENED * _OWN))
    base = model.config.base_cache_bytes_per_token(setting.itemsize)
    low_rank = model.config.low_rank_cache_bytes_per_token(setting.rank, setting.itemsize)
    split = num_pages * base // (base + low_rank)
    pools = _Pools(num_pages, split, max(split, _PAGES * len(model.agents)))
    by_mode: dict[str, dict[str, int]] = {
        mode: _by_readers(_engine(model, setting, mode, pools, prefix_cache=False), counts)
        for mode in ("none", "full", "base", "base_lr")
    }
    by_mode["pre_lr"] = {}
    for count in counts:  # who has run a token has written it for all that are loaded
        apart = BenchModel(model.config, setting.dtype, setting.rank, num_agents=count, shared_a=False)
        bytes_used = _by_readers(_engine(apart, setting, "pre_lr", pools, prefix_cache=False), [count])
        by_mode["pre_lr"] |= bytes_used
    prefix, context = _COMMON * setting.page_size, _PAGES * setting.page_size
    adapters = list(model.adapters.values())[:_READERS]
    cache_bytes = num_pages * setting.page_size * base
    counted = fitting(model.config, adapters, setting, prefix, context, cache_bytes)
    tried = {mode: _open_all(_engine(model, setting, mode, pools)) for mode in ("none", "base_lr")}
    opened = {
        "agents": _READERS, "prefix": prefix, "context": context, "cache_bytes": cache_bytes, "counted": counted,
        "tried": tried,
    }  # fmt: skip
    return {"layers": 1, "tokens": context, "cache_bytes": by_mode, "opened": opened}


def _engine(model: BenchModel, setting: BenchSetting, mode: SharingMode, pools: _Pools, **options: Any) -> Engine:
    p = setting.page_size
    return model.engine(
        mode, (1 + _PAGES) * p, page_size=p, prefill_buckets=(8, _OWN * p), decode_block=1, **pools.options(mode),
        **options,
    )  # fmt: skip


def _by_readers(engine: Engine, counts: Sequence[int]) -> dict[str, int]:
    """Bytes in use when so many agents have read one context."""
    found = {}
    with engine.trajectory() as trajectory:
        trajectory.append(random_ids(engine, _PAGES * engine.cache_stats().page_size))
        for i, agent in enumerate(engine.agents, 1):
            engine.next_token_logits(trajectory, agent)
            if i in counts:
                found[str(i)] = engine.cache_stats().bytes_used
    return found


def _open_all(engine: Engine) -> int:
    """Opens trajectories that three agents read until one does not fit, or one has lost pages."""
    p, copies = engine.cache_stats().page_size, num_copies(engine.sharing, _READERS)
    beginning = random_ids(engine, _COMMON * p)
    held: list[Trajectory] = []
    while True:
        held.append(engine.trajectory().append(beginning).append(random_ids(engine, _OWN * p, seed=1 + len(held))))
        try:
            for agent in engine.agents[:_READERS]:
                engine.next_token_logits(held[-1], agent)
        except OutOfPagesError:
            return len(held) - 1
        if engine.cache_stats().base.pages_used < copies * (_COMMON + len(held) * _OWN):
            return len(held) - 1
