"""The roofline on paper: what a trace prefills in each mode, and figures that can be checked by hand."""

import pytest

from lragent_jax.measure.react_trace import react_trace
from lragent_jax.measure.roofline import Roofline, predict, prefilled
from lragent_jax.measure.tpu_chips import Chip
from lragent_jax.models.config import LlamaConfig

CONFIG = LlamaConfig.preset("llama-3.1-8b")
CHIP = Chip("slow", hbm=0, hbm_per_s=1e9, flop_per_s=1e12)


def test_what_a_trace_prefills():
    calls = react_trace(8192)
    assert len(calls) == 17
    assert sum(new + decoded for _, new, decoded in calls) == 33_680
    shared, alone = prefilled(calls, "base_lr"), prefilled(calls, "none")
    assert sum(tokens for tokens, _ in shared) == 33_680 - 280
    assert [context for _, context in shared] == [context for _, context in alone]
    assert sum(tokens for tokens, _ in alone) == 100_584  # 3.0 times as many


def test_decode_is_weights_and_pages_over_bandwidth():
    weights = 2 * (CONFIG.num_layers * sum(a * b for a, b in CONFIG.projection_shapes().values()) + 128_256 * 4096)
    pages = 1000 * 2 * CONFIG.num_layers * (2 * 8 * 128 + 16)
    assert Roofline(CHIP, 1, CONFIG, rank=16).decode_s(1000) == pytest.approx((weights + pages) / 1e9)
    low_rank = 1000 * 2 * CONFIG.num_layers * 16
    sharded = Roofline(CHIP, 8, CONFIG, rank=16).decode_s(1000)
    assert sharded == pytest.approx(((weights + pages - low_rank) / 8 + low_rank) / 1e9)


def test_modes_are_ordered_as_their_work_is():
    none, base_lr, full = (
        predict(Roofline(CHIP, 1, CONFIG, rank=16), mode, 8192) for mode in ("none", "base_lr", "full")
    )
    assert full["ttft_s"] < base_lr["ttft_s"] < none["ttft_s"]
    assert none["decode_ms_per_token"] == full["decode_ms_per_token"] < base_lr["decode_ms_per_token"]
    assert base_lr["ttft_s"] / full["ttft_s"] < 1.05
