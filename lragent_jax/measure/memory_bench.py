"""What agents and trajectories cost in pages, counted by real engines over one layer of a model's heads."""

from collections.abc import Sequence
from typing import Any

from lragent_jax.engine import Engine
from lragent_jax.measure.batch_bench import fitting
from lragent_jax.measure.bench_model import BenchModel, narrow
from lragent_jax.measure.bench_setting import BenchSetting
from lragent_jax.measure.page_budget import num_copies
from lragent_jax.measure.trace_run import random_ids
from lragent_jax.models.errors import OutOfPagesError
from lragent_jax.sharing import SharingMode
from lragent_jax.trajectory import Trajectory


def measure_memory(setting: BenchSetting, counts: Sequence[int], pages: int = 8, opened: int = 4) -> dict[str, Any]:
    """Cache bytes by number of agents in each mode, and trajectories that can be open before anything is lost.

    Contexts are of so many pages. `opened`: how many trajectories under `none` the room is for. One layer stands for
    all: every layer has pages of the same size.
    """
    shared = BenchModel(narrow(setting.config), setting.dtype, setting.rank, num_agents=max(counts))
    by_mode: dict[str, dict[str, int]] = {
        mode: _by_readers(shared, setting, mode, counts, pages) for mode in ("none", "full", "base", "base_lr")
    }
    by_mode["pre_lr"] = {}
    for count in counts:
        model = BenchModel(shared.config, setting.dtype, setting.rank, num_agents=count, shared_a=False)
        by_mode["pre_lr"] |= _by_readers(model, setting, "pre_lr", [count], pages)
    return {
        "cache_bytes": by_mode, "tokens": pages * setting.page_size, "layers": 1,
        "opened": _opened(setting, pages, opened),
    }  # fmt: skip


def _engine(model: BenchModel, setting: BenchSetting, mode: SharingMode, pages: int, **options: Any) -> Engine:
    return model.engine(
        mode,
        (1 + pages) * setting.page_size,
        page_size=setting.page_size,
        prefill_buckets=(8, pages // 2 * setting.page_size),
        decode_block=1,
        **options,
    )


def _by_readers(
    model: BenchModel, setting: BenchSetting, mode: SharingMode, counts: Sequence[int], pages: int
) -> dict[str, int]:
    """Bytes in use when so many agents have read one context; in `pre_lr` one is enough: it writes for all."""
    engine = _engine(model, setting, mode, pages, num_pages=pages * len(model.agents), prefix_cache=False)
    found = {}
    with engine.trajectory() as trajectory:
        trajectory.append(random_ids(engine, pages * setting.page_size))
        for i, agent in enumerate(model.agents, 1):
            engine.next_token_logits(trajectory, agent)
            if i in counts:
                found[str(i)] = engine.cache_stats().bytes_used
    return found


def _opened(setting: BenchSetting, pages: int, opened: int) -> dict[str, Any]:
    """Half of every context is common. Into the bytes of `opened` trajectories under `none`: counted, and tried."""
    model = BenchModel(narrow(setting.config), setting.dtype, setting.rank)
    prefix, context = pages // 2 * setting.page_size, pages * setting.page_size
    page_bytes = setting.page_size * model.config.base_cache_bytes_per_token(setting.itemsize)
    cache_bytes = len(model.agents) * (pages // 2 + opened * (pages - pages // 2)) * page_bytes
    counted = fitting(model, setting, prefix, context, cache_bytes)
    tried = {mode: _open_all(model, setting, mode, pages, cache_bytes) for mode in ("none", "base_lr")}
    return {"counted": counted, "tried": tried, "agents": len(model.agents), "prefix": prefix, "context": context}


def _open_all(model: BenchModel, setting: BenchSetting, mode: SharingMode, pages: int, cache_bytes: int) -> int:
    """Opens trajectories that all agents read until one does not fit, or one has lost pages."""
    config, p = model.config, setting.page_size
    per_token = config.base_cache_bytes_per_token(setting.itemsize)
    if mode == "base_lr":
        per_token += config.low_rank_cache_bytes_per_token(setting.rank, setting.itemsize)
    num_pages = cache_bytes // (p * per_token)
    low_rank = {"num_low_rank_pages": num_pages} if mode == "base_lr" else {}
    engine = _engine(model, setting, mode, pages, num_pages=num_pages, **low_rank)
    common, own = pages // 2, pages - pages // 2
    copies = num_copies(mode, len(model.agents))
    beginning = random_ids(engine, common * p)
    held: list[Trajectory] = []
    while True:
        held.append(engine.trajectory().append(beginning).append(random_ids(engine, own * p, seed=1 + len(held))))
        try:
            for agent in model.agents:
                engine.next_token_logits(held[-1], agent)
        except OutOfPagesError:
            return len(held) - 1
        if engine.cache_stats().base.pages_used < copies * (common + len(held) * own):
            return len(held) - 1
