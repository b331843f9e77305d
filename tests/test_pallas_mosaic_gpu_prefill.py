"""The Hopper prefill kernel, interpreted: memory, waits and races watched, on any machine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_contract import Case, arguments, check, make_inputs, oracle
from mosaic_interpreter import in_interpreter

from lragent_jax.kernels.hopper import SHARED_MEMORY
from lragent_jax.kernels.lora_attention import expanded_rows
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu import expansion
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu import prefill as prefill_module
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.prefill import prefill
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.prefill_config import (
    BlockSizes,
    heuristic,
    shared_memory,
)

RAGGED = Case(
    "ragged: padding on both sides, a row with nothing, one without adapter, two tiles",
    rows=((100, 230, 2), (0, 5, 1), (-3, 20, 0), (0, 0, 1)), T=130, K=1, G=2, H=64, p=32, r_v=8, dtype="bfloat16",
)  # fmt: skip
KEYS = Case(
    "low-rank keys",
    rows=((20, 25, 1), (125, 150, 2), (7, 9, 0)),
    T=70,
    K=1,
    H=64,
    p=16,
    r_v=16,
    r_k=8,
    dtype="bfloat16",
)
LONG = Case(
    "more blocks of keys than slots",
    rows=((512, 640, 1), (300, 384, 2)), T=128, K=1, H=64, p=64, r_v=16, r_k=16, dtype="bfloat16",
)  # fmt: skip
SMALL = Case("rank 64", rows=((130, 150, 1),), T=20, K=1, H=128, p=64, r_v=16, r_k=64, dtype="bfloat16")
CASES = (
    RAGGED,
    Case("merged", rows=((250, 300, 0),), T=70, K=1, H=128, p=64, r_v=0, dtype="float16"),
    Case("pages longer than a block", rows=((250, 300, 1),), T=60, K=1, H=64, p=256, r_v=24, dtype="float16"),
    KEYS,
    SMALL,
    LONG,
)


EXPANDED_CASES = (
    RAGGED,
    KEYS,
    Case("values of pages longer than a block", rows=((250, 300, 1),), T=60, K=2, H=64, p=256, r_v=24, dtype="float16"),
    Case("values, pages of 16", rows=((130, 150, 1), (60, 64, 2)), T=20, K=1, H=128, p=16, r_v=64, dtype="bfloat16"),
    LONG,
)


@pytest.fixture
def expanded(monkeypatch):
    """Values of few queries are expanded, too, as those of many. (rows, targets) of every kernel that attends."""
    monkeypatch.setattr(expansion, "FLOP_PER_BYTE", 0)
    calls, attend_rows = [], prefill_module.attend_rows

    def spy(q, *args, targets, **keywords):
        calls.append((q.shape[0], targets))
        return attend_rows(q, *args, targets=targets, **keywords)

    monkeypatch.setattr(prefill_module, "attend_rows", spy)
    return calls


def run(case: Case, garbage: float = np.nan, **changes):
    args, keywords = arguments(make_inputs(case, garbage))
    keywords = {"rope_inv_freq": None} | keywords | {"sm_scale": case.H**-0.5, "return_lse": True, "interpret": True}
    return prefill(*args, **(keywords | changes))


@in_interpreter
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_oracle_amid_nan_without_races(case, capsys):
    check(case, run(case), oracle(make_inputs(case)))
    assert "RACE" not in capsys.readouterr().out


@in_interpreter
def test_other_block_sizes(capsys):
    for blocks in (BlockSizes(block_kv=64, num_stages=2), BlockSizes(block_kv=64, num_stages=3)):
        check(SMALL, run(SMALL, block_sizes=blocks), oracle(make_inputs(SMALL)))
    assert "RACE" not in capsys.readouterr().out


def test_what_pays_is_expanded(monkeypatch):
    """Keys always; values from where P L would cost as much."""
    expanded = []

    def attend_rows(q, *_, targets, **__):
        expanded.append(targets)
        return q, q[..., 0].astype(jnp.float32)

    monkeypatch.setattr(prefill_module, "attend_rows", attend_rows)
    for T, r_k in ((839, 0), (840, 0), (839, 16)):
        case = Case("many", rows=((0, T, 1),), T=T, K=1, G=4, H=128, p=64, r_v=16, r_k=r_k, dtype="bfloat16")
        run(case)
    assert expanded == [(), ("v",), ("k",)]
    assert [expansion.pays("v", T, 64, 8, 8) for T in (209, 210)] == [False, True]


@in_interpreter
@pytest.mark.parametrize("case", EXPANDED_CASES, ids=lambda case: case.name)
def test_expanded_values_equal_the_oracle_amid_nan_without_races(case, expanded, capsys):
    check(case, run(case), oracle(make_inputs(case)))
    assert expanded == [(len(case.rows), ("v", "k") if case.r_k else ("v",))]
    assert "RACE" not in capsys.readouterr().out


@in_interpreter
def test_rows_are_expanded_one_after_the_other_where_memory_is_short(expanded, monkeypatch):
    together = run(KEYS)
    monkeypatch.setattr(expanded_rows, "MAX_EXPANDED_BYTES", 1)
    apart = run(KEYS)
    assert [rows for rows, _ in expanded] == [3, 1, 1, 1]
    for one, other in zip(apart, together, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@in_interpreter
def test_programs_that_expand_several_blocks(expanded, monkeypatch, capsys):
    monkeypatch.setattr(expansion, "PROGRAMS", 2)
    jax.clear_caches()
    check(LONG, run(LONG), oracle(make_inputs(LONG)))
    jax.clear_caches()
    assert "RACE" not in capsys.readouterr().out


@in_interpreter
@pytest.mark.parametrize("values", ["as they are", "expanded"])
def test_what_may_not_be_read_changes_no_bit(values, request):
    if values == "expanded":
        request.getfixturevalue("expanded")
    results = (run(KEYS, garbage) for garbage in (np.nan, 3.0))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@in_interpreter
@pytest.mark.parametrize("values", ["as they are", "expanded"])
def test_an_adapter_that_does_not_exist_is_nan(values, request):
    if values == "expanded":
        request.getfixturevalue("expanded")
    (q, base, low_rank, lora_b, table, _), keywords = arguments(make_inputs(RAGGED, garbage=0.0))
    keywords |= {"sm_scale": 0.125, "return_lse": False, "interpret": True}
    adapter_ids = jnp.array([2, 99, -1, 1], jnp.int32)
    o = prefill(q, base, low_rank, lora_b, table, adapter_ids, **keywords)
    o = np.asarray(o, np.float32)
    assert np.isnan(o[1, :5]).all()
    assert np.isnan(o[2, 3:23]).all()
    assert not any(padding.any() for padding in (o[1, 5:], o[2, :3], o[2, 23:]))
    assert not np.isnan(o[[0, 3]]).any()


REFUSED = [
    ("not float32", Case("f32", rows=((0, 16, 1),), p=16, H=64)),
    ("not 96", Case("head dim", rows=((0, 16, 1),), p=16, H=96, dtype="bfloat16")),
    ("not 8", Case("pages", rows=((0, 16, 1),), p=8, H=64, dtype="bfloat16")),
    ("not 48", Case("pages", rows=((0, 16, 1),), p=48, H=64, dtype="bfloat16")),
    ("not 12", Case("rank", rows=((0, 16, 1),), p=16, H=64, r_v=12, dtype="bfloat16")),
    ("not 72", Case("rank of keys", rows=((0, 16, 1),), p=16, H=64, r_k=72, dtype="bfloat16")),
]


@pytest.mark.parametrize(("reason", "case"), REFUSED, ids=[reason for reason, _ in REFUSED])
def test_what_it_cannot_do_it_refuses(reason, case):
    with pytest.raises(NotImplementedError, match=reason):
        run(case)


def test_refuses_scales_that_turn_the_maximum_around():
    with pytest.raises(NotImplementedError, match="positive sm_scale, not -1"):
        run(RAGGED, sm_scale=-1.0)


@pytest.mark.parametrize(
    ("sizes", "match"),
    [((96, 2), "block_kv is 96"), ((128, 1), "num_stages is 1")],
)
def test_block_sizes_validate_themselves(sizes, match):
    with pytest.raises(ValueError, match=match):
        BlockSizes(*sizes)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_heuristic_fits_shared_memory(head_dim):
    for r_v in range(0, 65, 8):
        assert shared_memory(head_dim, r_v, heuristic()) <= SHARED_MEMORY


def test_it_traces_without_a_gpu():
    """On every supported JAX, those without the interpreter included."""
    args, keywords = arguments(make_inputs(KEYS))
    keywords |= {"sm_scale": 0.125, "return_lse": True}
    o, lse = jax.eval_shape(lambda *args: prefill(*args, **keywords), *args)
    assert (o.shape, o.dtype, lse.shape) == ((3, 70, 1, 64), jnp.bfloat16, (3, 70, 1))
