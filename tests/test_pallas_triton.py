"""The Triton kernels, interpreted on CPU: the contract on either way through them, and what either has of its own."""

import dataclasses

import jax
import numpy as np
import pytest
from attention_contract import AttentionContract, Case, arguments, check, make_inputs, oracle

from lragent_jax.kernels.interpret import interpreted
from lragent_jax.kernels.lora_attention import expanded_rows, pallas_triton
from lragent_jax.kernels.lora_attention.pallas_triton import (
    DecodeBlockSizes,
    PrefillBlockSizes,
    expansion,
    heuristic,
)


@pytest.fixture(autouse=True)
def on_cpu():
    with interpreted():
        yield


class TestDecode(AttentionContract):
    implementation = "pallas_triton"

    @pytest.fixture(autouse=True)
    def decode_always(self, monkeypatch):
        monkeypatch.setattr(pallas_triton, "heuristic", lambda *_: DecodeBlockSizes(32, rows_per_item=2, programs=8))


class TestPrefill(AttentionContract):
    implementation = "pallas_triton"

    @pytest.fixture(autouse=True)
    def prefill_always(self, monkeypatch):
        monkeypatch.setattr(pallas_triton, "heuristic", lambda *_: PrefillBlockSizes(16, 32))


class TestExpanded(TestPrefill):
    """Low-rank keys and values of few queries as those of many."""

    @pytest.fixture(autouse=True)
    def expand_always(self, monkeypatch):
        monkeypatch.setattr(expansion, "FLOP_PER_BYTE", 0)
        monkeypatch.setattr(expansion, "KEYS_FROM", 1)
        expanded, expand = [], pallas_triton.expand
        monkeypatch.setattr(pallas_triton, "expand", lambda x, **keywords: expanded.append(x) or expand(x, **keywords))
        return expanded

    @pytest.mark.parametrize("ranks", [(8, 0), (0, 4)])
    def test_it_does(self, expand_always, ranks):
        case = dataclasses.replace(PREFIX, r_v=ranks[0], r_k=ranks[1], H=32)
        check(case, attend(case, PrefillBlockSizes(16, 16)), oracle(make_inputs(case)))
        assert len(expand_always) == 1


def attend(case: Case, block_sizes, x=None):
    args, keywords = arguments(make_inputs(case) if x is None else x)
    keywords = {"rope_inv_freq": None} | keywords | {"sm_scale": case.sm_scale or case.H**-0.5, "return_lse": True}
    return pallas_triton.lora_attention(*args, **keywords, block_sizes=block_sizes)


PREFIX = Case(
    "one prefix, tails of their own", ((70, 72, 1), (70, 72, 2), (53, 55, 1), (61, 63, 0), (3, 5, 2), (70, 71, 3)),
    T=2, K=1, G=3, r_v=8, shared_pages=4, dtype="float32",
)  # fmt: skip
KEYS = dataclasses.replace(PREFIX, name="low-rank keys on one prefix", r_k=4, H=32)


@pytest.mark.parametrize(
    ("T", "ranks", "pays"),
    [(1239, (16, 0), False), (1240, (16, 0), True), (310, (64, 0), True), (127, (16, 16), False), (128, (0, 16), True),
     (10**6, (0, 0), False)],
)  # fmt: skip
def test_what_pays(T, ranks, pays):
    assert expansion.pays(T, 128, 4, *ranks) == pays


def test_rows_are_expanded_one_after_the_other_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(expansion, "KEYS_FROM", 1)
    expanded, expand = [], pallas_triton.expand
    monkeypatch.setattr(pallas_triton, "expand", lambda x, **keywords: expanded.append(x) or expand(x, **keywords))
    together = attend(KEYS, PrefillBlockSizes(16, 16))
    monkeypatch.setattr(expanded_rows, "MAX_EXPANDED_BYTES", 1)
    apart = attend(KEYS, PrefillBlockSizes(16, 16))
    assert [len(x.adapter_ids) for x in expanded] == [6] + 6 * [1]
    for one, other in zip(apart, together, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        (KEYS, DecodeBlockSizes(16, rows_per_item=4, programs=6)),  # several readers per item, two pages per block
        (PREFIX, DecodeBlockSizes(64, rows_per_item=8, programs=1)),  # items as long as can be
        (PREFIX, PrefillBlockSizes(16, 16)),
        (KEYS, PrefillBlockSizes(16, 16)),
    ],
    ids=str,
)
def test_whatever_the_blocks(case, sizes):
    check(case, attend(case, sizes), oracle(make_inputs(case)))


@pytest.mark.parametrize("case", [PREFIX, KEYS], ids=lambda case: case.name)
def test_low_rank_pages_of_their_own_over_one_base(case):
    """Every row its A-group: an item's rows share the base and nothing else."""
    x = make_inputs(case)
    P, B = len(x.base), len(case.rows)
    pools = (pool if pool is None else np.concatenate([pool * (b + 1) for b in range(B)]) for pool in x[2:4])
    low_rank_v, low_rank_k = (None if pool is None else pool.astype(case.dtype) for pool in pools)
    table = np.where((x.low_rank_table >= 0) & (x.low_rank_table < P), x.low_rank_table + P * np.arange(B)[:, None], -1)
    x = x._replace(low_rank_v=low_rank_v, low_rank_k=low_rank_k, low_rank_table=table.astype(np.int32))
    check(case, attend(case, DecodeBlockSizes(16, rows_per_item=8, programs=6), x), oracle(x))


def test_blocks_are_parts_of_pages():
    case = Case("long pages", ((130, 133, 1), (60, 63, 2)), T=3, p=64, r_k=8, H=32)
    for sizes in (DecodeBlockSizes(16), PrefillBlockSizes(16, 32)):
        check(case, attend(case, sizes), oracle(make_inputs(case)))


@pytest.mark.parametrize("sizes", [DecodeBlockSizes(16, rows_per_item=4), PrefillBlockSizes(16, 16)], ids=str)
def test_merged_modes_hold_nothing_of_low_rank_caches(sizes):
    def products(case):
        return str(jax.make_jaxpr(lambda: attend(case, sizes))()).count("dot_general")

    merged = dataclasses.replace(PREFIX, r_v=0)
    loops = 1 if isinstance(sizes, DecodeBlockSizes) else 2
    assert products(merged) == 2 * loops
    assert products(PREFIX) > products(merged)


# Block sizes.


@pytest.mark.parametrize("wrong", [{"block_kv": 8}, {"block_kv": 48}, {"num_warps": 3}, {"num_stages": 0}])
@pytest.mark.parametrize("kind", [DecodeBlockSizes, PrefillBlockSizes])
def test_block_sizes_validate_themselves(kind, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))}; it must be"):
        kind(**wrong)


@pytest.mark.parametrize("p", [8, 16, 64, 128])
@pytest.mark.parametrize(("H", "itemsize"), [(64, 2), (96, 2), (128, 2), (256, 2), (128, 4)])
@pytest.mark.parametrize(("r_v", "r_k"), [(0, 0), (16, 0), (64, 0), (16, 16)])
def test_heuristic_fits_into_shared_memory(p, H, itemsize, r_v, r_k):
    for kilobytes in (99, 163, 227):
        sizes = heuristic(1, 4096, 4, H, p, r_v, r_k, itemsize, kilobytes * 1024)
        assert isinstance(sizes, PrefillBlockSizes)
        lanes = 2 * max(64, 2 ** (H - 1).bit_length()) + r_v + r_k
        needs = sizes.block_q * H + sizes.num_stages * sizes.block_kv * lanes
        assert needs * itemsize <= kilobytes * 1024
        assert isinstance(heuristic(8, 1, 4, H, p, r_v, r_k, itemsize, kilobytes * 1024), DecodeBlockSizes)


# What it refuses.


@pytest.mark.parametrize(("changes", "reason"), [({"p": 24}, "pages of 24 slots"), ({"H": 272}, "head dim 272")])
def test_refuses(changes, reason):
    with pytest.raises(NotImplementedError, match=reason):
        attend(dataclasses.replace(PREFIX, **changes), None)
