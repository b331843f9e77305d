"""Bytes known before anything is allocated are those that engines allocate and count."""

import jax
import pytest

from lragent_jax.measure.bench_model import BenchModel, narrow
from lragent_jax.measure.page_budget import PageBudget, num_fitting, pool_options, step_weight_bytes
from lragent_jax.models.config import LlamaConfig
from lragent_jax.sharing import SharingMode

CONFIG = narrow(LlamaConfig.preset("llama-3.1-8b"))
MODES = ("none", "full", "base", "base_lr", "pre_lr", "rebase")


@pytest.fixture(scope="module")
def model() -> BenchModel:
    return BenchModel(CONFIG, "float32", rank=8)


@pytest.mark.parametrize("mode", MODES)
def test_the_bytes_of_the_pools(model, mode):
    pools = pool_options([mode], len(model.agents), num_pages=5)[mode]
    engine = model.engine(mode, 64, page_size=8, prefill_buckets=(8,), **pools)
    stats = engine.cache_stats()
    want = stats.base.bytes_total + stats.low_rank.bytes_total
    assert PageBudget(CONFIG, 8, 4, page_size=8).pool_bytes(**pools) == want > 0


def test_modes_side_by_side_share_the_shapes_of_their_pools():
    options = pool_options(MODES, 3, 10)
    assert options["none"] == options["full"] == {"num_pages": 30}
    assert options["base"] == options["base_lr"] == options["pre_lr"] == {"num_pages": 10, "num_low_rank_pages": 30}
    assert pool_options(["full"], 3, 10)["full"] == {"num_pages": 10}  # alone it needs no more


def test_a_step_reads_all_weights_but_the_embedding():
    config = LlamaConfig.preset("llama-3.1-8b")
    shapes = sum(a * b for a, b in config.projection_shapes().values())
    norms = (2 * config.num_layers + 1) * config.width
    weights = 2 * (config.num_layers * shapes + 2 * config.vocab_size * config.width + norms)
    read = step_weight_bytes(config, weights, 2)
    assert read == pytest.approx(15.0e9, rel=2e-3)
    # 64 contexts of 4k that have 2k in common: 11.1 ms at 2.93 TB/s.
    budget = PageBudget(config, 8, 2, 64)
    assert (read + budget.step_bytes(2048 + 64 * 2048)) / 2.93e12 == pytest.approx(11.1e-3, rel=5e-3)


def test_what_fits_is_three_times_as_much_when_three_agents_share(model):
    def fit(mode: SharingMode, cache_bytes: int) -> int:
        return num_fitting(
            CONFIG, list(model.adapters.values()), mode, cache_bytes=cache_bytes, itemsize=2, page_size=64,
            prefix=2048, context=4096,
        )  # fmt: skip

    page = 64 * CONFIG.base_cache_bytes_per_token(2)
    assert fit("none", 3 * (32 + 7 * 32) * page) == 7
    assert fit("none", 3 * (32 + 7 * 32) * page - 1) == 6
    assert fit("full", 3 * (32 + 7 * 32) * page) == 23
    assert fit("base_lr", 3 * (32 + 7 * 32) * page) == 22
    assert fit("none", 10) == 0


def test_dropped_engines_leave_nothing_behind(model):
    def held() -> int:
        return sum(array.nbytes for array in jax.live_arrays())

    engine = model.engine("none", 64, page_size=8, num_pages=512, prefill_buckets=(8,))
    pools = engine.cache_stats().base.bytes_total
    before = held()
    del engine
    engine = model.engine("none", 64, page_size=8, num_pages=1, prefill_buckets=(8,))
    assert held() <= before - 0.99 * pools
    del engine
