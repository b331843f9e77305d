"""Many trajectories that begin alike, decoded together."""

from collections.abc import Sequence
from typing import Any

from lragent_jax.measure.bench_model import BenchModel
from lragent_jax.measure.bench_setting import BenchSetting, say
from lragent_jax.measure.page_budget import num_fitting
from lragent_jax.measure.trace_bench import missing_bytes, profiled
from lragent_jax.measure.trace_run import decode_step, exactly, random_ids, wall_seconds
from lragent_jax.models.adapter import Adapter
from lragent_jax.models.config import LlamaConfig


def batch_context(setting: BenchSetting, context: int) -> int:
    """The longest that contexts get which measure `context` tokens on average."""
    return context + (setting.repeats + 8) * (1 + setting.steps)


def measure_batch(model: BenchModel, setting: BenchSetting, rows: int, prefix: int, context: int) -> dict[str, Any]:
    """A decode step of `rows` trajectories under all agents, and of one of them; what would fit of such trajectories.

    `base_lr`, contexts of about `context` tokens, the first `prefix` of them common: read once, and in a step, too.
    """
    grown = (1 + setting.repeats) * (1 + setting.steps)
    own = max(1, context - prefix - grown // 2)
    common_pages = prefix // setting.page_size
    num_pages = common_pages + rows * (setting.budget.pages(batch_context(setting, context)) + 1 - common_pages)
    pools = {"num_pages": num_pages, "num_low_rank_pages": num_pages}
    buckets = (16, -(-own // 16) * 16)
    if missing := missing_bytes(model, setting, pools, max(rows * 16, buckets[-1]), rows * context):
        say(f"a batch of {rows} needs {missing['bytes_needed']:,} bytes, the device has {missing['bytes_limit']:,}")
        return missing
    engine = model.engine(
        "base_lr", batch_context(setting, context), **pools, prefill_buckets=buckets, **setting.engine_options()
    )
    compiling = engine.warmup(batch_sizes=(1, rows), scoring=False)
    agents = [model.agents[i % len(model.agents)] for i in range(rows)]
    beginning = random_ids(engine, prefix)
    trajectories = [
        engine.trajectory().append(beginning).append(random_ids(engine, own, seed=1 + i)) for i in range(rows)
    ]

    def read() -> None:
        for trajectory, agent in zip(trajectories, agents, strict=True):
            engine.generate(trajectory, agent, exactly(1))

    reading_s = wall_seconds(read)
    together = decode_step(engine, trajectories, agents, setting.steps, setting.repeats)
    distinct = prefix + rows * (together["context"] - prefix)
    profile = profiled(engine, trajectories, agents, setting.steps, together["ms"]) if setting.profile else None
    one = decode_step(engine, trajectories[:1], agents[:1], setting.steps, setting.repeats)
    say(f"{rows} rows: {together['ms']:.2f} ms per step, one: {one['ms']:.2f} ms; "
        f"contexts read in {reading_s:.1f} s; {compiling.num_programs} programs compiled or fetched in "
        f"{compiling.lower_s + compiling.compile_s:.1f} s")  # fmt: skip
    cache_bytes = _left_for_caches(model, setting, context)
    result = {
        "rows": rows, "prefix": prefix, "context": together["context"], "ms": together["ms"],
        "floor_ms": setting.step_floor_ms(model.weight_bytes, distinct), "one_ms": one["ms"],
        "one_floor_ms": setting.step_floor_ms(model.weight_bytes, one["context"]), "reading_s": reading_s,
        "cache_bytes": cache_bytes,
        "fitting": fitting(model.config, list(model.adapters.values()), setting, prefix, context, cache_bytes),
    }  # fmt: skip
    return result | ({"profile": {f"{rows} rows on {context:,} tokens": profile}} if profile else {})


def fitting(
    config: LlamaConfig, adapters: Sequence[Adapter], setting: BenchSetting, prefix: int, context: int, cache_bytes: int
) -> dict[str, int]:
    """Trajectories that fit into the bytes in each mode when the agents of these adapters all read them."""
    return {
        mode: num_fitting(
            config, adapters, mode, cache_bytes=cache_bytes, itemsize=setting.itemsize, page_size=setting.page_size,
            prefix=prefix, context=context,
        )
        for mode in ("none", "base_lr")
    }  # fmt: skip


def _left_for_caches(model: BenchModel, setting: BenchSetting, chunk: int) -> int:
    """Bytes that weights and activations leave of the device; of 80 GB where nobody knows what it holds."""
    return (setting.device_bytes or 80 * 10**9) - model.weight_bytes - setting.budget.activation_bytes(chunk, chunk)
