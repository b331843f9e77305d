"""Broken variants of the attention operation: each must fail the contract's check in every case it concerns."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from attention_contract import CASES, Case, Inputs, check, make_inputs, oracle, rotate_half


@dataclasses.dataclass(frozen=True)
class Mutant:
    name: str
    run: Callable[[Inputs], tuple[np.ndarray, np.ndarray]]
    concerns: Callable[[Case], object]  # whether a case could notice it


def changed(**changes):
    """The oracle on arguments of which some were computed anew from all of them."""
    return lambda x: oracle(x._replace(**{name: change(x) for name, change in changes.items()}))


def with_average(average):
    return lambda x: oracle(x, average=average)


def weights_in_halves(scores):
    """Weights of two blocks of keys, each under its own maximum: an online softmax that forgot to rescale."""
    middle = len(scores) // 2
    blocks = [block for block in (scores[:middle], scores[middle:]) if len(block)]
    return np.concatenate([np.exp(block - block.max()) for block in blocks])


def low_rank_not_normalised(scores, v, low_rank_v, b):
    weights = np.exp(scores - scores.max())
    return weights @ v / weights.sum() + weights @ low_rank_v @ b, scores.max() + np.log(weights.sum())


def nothing_rescaled(scores, v, low_rank_v, b):
    weights = weights_in_halves(scores)
    return (weights @ v + weights @ low_rank_v @ b) / weights.sum(), scores.max() + np.log(weights.sum())


def low_rank_not_rescaled(scores, v, low_rank_v, b):
    weights = np.exp(scores - scores.max())
    o = weights @ v + weights_in_halves(scores) @ low_rank_v @ b
    return o / weights.sum(), scores.max() + np.log(weights.sum())


def no_maximum_subtracted(scores, v, low_rank_v, b):
    with np.errstate(over="ignore", invalid="ignore"):
        weights = np.exp(scores.astype(np.float32))
        return (weights @ v + weights @ low_rank_v @ b) / weights.sum(), np.log(weights.sum())


def lse_in_base_two(scores, v, low_rank_v, b):
    weights = np.exp(scores - scores.max())
    lse = scores.max() + np.log(weights.sum())
    return (weights @ v + weights @ low_rank_v @ b) / weights.sum(), lse / np.log(2)


def interleaved_rope(x, positions, inv_freq):
    angles = (positions[:, None] * inv_freq)[:, None]
    even, odd = x[..., ::2], x[..., 1::2]
    pairs = even * np.cos(angles) - odd * np.sin(angles), odd * np.cos(angles) + even * np.sin(angles)
    return np.stack(pairs, -1).reshape(x.shape)


def rope_one_position_late(x, positions, inv_freq):
    return rotate_half(x, positions + 1, inv_freq)


def output_for_padding(x: Inputs):
    o, lse = oracle(x)
    return np.where(np.isneginf(lse)[..., None], 1e-3, o), lse


def lse_for_padding(x: Inputs):
    o, lse = oracle(x)
    return o, np.where(np.isneginf(lse), -1e30, lse)


def next_adapter(x: Inputs):
    """Every adapter's id replaced by the next one in use."""
    used = np.unique(x.adapter_ids[x.adapter_ids > 0])
    following = dict(zip(used, np.roll(used, -1), strict=True)) | {0: 0}
    return np.array([following[i] for i in x.adapter_ids])


def any_adapter(x: Inputs):
    return np.where(x.adapter_ids == 0, x.adapter_ids.max(), x.adapter_ids)


def through(dtype, *names):
    """Some arguments rounded to a narrower type on the way."""
    return changed(**{name: lambda x, name=name: getattr(x, name).astype(dtype) for name in names})


def live(case: Case) -> list[tuple[int, int, int]]:
    """Rows with a query that sees a key."""
    return [row for row in case.rows if max(row[0], 0) < min(row[0] + case.T, row[1])]


def adapters_used(case: Case) -> set[int]:
    return {adapter for _, _, adapter in live(case)} - {0} if case.r_v or case.r_k else set()


def reads_something(case: Case) -> bool:
    return bool(live(case))


def low_rank_values(case: Case) -> bool:
    return bool(case.r_v and adapters_used(case))


def low_rank_keys(case: Case) -> bool:
    return bool(case.r_k and adapters_used(case))


def padded(case: Case) -> bool:
    return any(q_start < 0 or q_start + case.T > kv_len for q_start, kv_len, _ in case.rows)


def last_key_seen(case: Case) -> bool:
    return any(q_start + case.T >= kv_len for q_start, kv_len, _ in live(case))


def exact(case: Case) -> bool:
    return case.dtype == "float32" and reads_something(case)


MUTANTS = (
    Mutant("scores not scaled", changed(sm_scale=lambda x: 1.0), reads_something),
    Mutant("sm_scale ignored", changed(sm_scale=lambda x: None), lambda case: case.sm_scale is not None),
    Mutant("a query misses its own key", changed(q_starts=lambda x: x.q_starts - 1), reads_something),
    Mutant(
        "a query sees one slot more",
        changed(q_starts=lambda x: x.q_starts + 1, kv_lens=lambda x: x.kv_lens + 1),
        reads_something,
    ),
    Mutant("the newest key is missing", changed(kv_lens=lambda x: np.maximum(x.kv_lens - 1, 0)), last_key_seen),
    Mutant(
        "K and V in each other's lanes", changed(base=lambda x: np.roll(x.base, x.q.shape[-1], -1)), reads_something
    ),
    Mutant(
        "query heads dealt out in turn",
        lambda x: oracle(x, kv_head=lambda n, N, K: n % K),
        lambda case: case.G > 1 and case.K > 1 and reads_something(case),
    ),
    Mutant(
        "pages in physical order",
        changed(base_table=lambda x: np.arange(x.base_table.size).reshape(x.base_table.shape)),
        reads_something,
    ),
    Mutant(
        "another row's pages",
        changed(base_table=lambda x: np.roll(x.base_table, 1, 0)),
        lambda case: reads_something(case) and not case.shared_pages,
    ),
    Mutant("low-rank cache ignored", changed(adapter_ids=lambda x: 0 * x.adapter_ids), adapters_used),
    Mutant("low-rank values ignored", changed(low_rank_v=lambda x: None), low_rank_values),
    Mutant("low-rank keys ignored", changed(low_rank_k=lambda x: None), low_rank_keys),
    Mutant("low-rank keys without RoPE", changed(inv_freq=lambda x: 0 * x.inv_freq), low_rank_keys),
    Mutant("low-rank keys with interleaved RoPE", lambda x: oracle(x, rope=interleaved_rope), low_rank_keys),
    Mutant("low-rank keys one position late", lambda x: oracle(x, rope=rope_one_position_late), low_rank_keys),
    Mutant("low-rank pages from the base table", changed(low_rank_table=lambda x: x.base_table), adapters_used),
    Mutant("B of another adapter", changed(adapter_ids=next_adapter), lambda case: len(adapters_used(case)) > 1),
    Mutant(
        "an adapter where there is none",
        changed(adapter_ids=any_adapter),
        lambda case: adapters_used(case) and 0 in {adapter for _, _, adapter in live(case)},
    ),
    Mutant(
        "B of another kv head",
        changed(b_v=lambda x: np.roll(x.b_v, 1, 2)),
        lambda case: low_rank_values(case) and case.K > 1,
    ),
    Mutant("B applied to sums that were not divided by l", with_average(low_rank_not_normalised), low_rank_values),
    Mutant("o_lr not rescaled with the maximum", with_average(low_rank_not_rescaled), low_rank_values),
    Mutant("nothing rescaled with the maximum", with_average(nothing_rescaled), reads_something),
    Mutant("no maximum subtracted", with_average(no_maximum_subtracted), lambda case: case.q_scale > 1),
    Mutant("lse in base 2", with_average(lse_in_base_two), reads_something),
    Mutant("padding queries with an output", output_for_padding, padded),
    Mutant("padding queries with a finite lse", lse_for_padding, padded),
    Mutant("f32 scores in TF32", through(np.float16, "q", "base"), exact),
    Mutant(
        "f32 values in TF32", lambda x: (oracle(x._replace(base=x.base.astype(np.float16)))[0], oracle(x)[1]), exact
    ),
    Mutant(
        "f32 low-rank values in TF32",
        through(np.float16, "low_rank_v", "b_v"),
        lambda case: case.dtype == "float32" and low_rank_values(case),
    ),
    Mutant(
        "f32 low-rank keys in TF32",
        through(np.float16, "low_rank_k", "b_k"),
        lambda case: case.dtype == "float32" and low_rank_keys(case),
    ),
)


def notices(case: Case, mutant: Mutant) -> bool:
    x = make_inputs(case, garbage=0.5)  # not NaN, which would give mutants away that read too much
    want = oracle(x)
    check(case, want, want)
    try:
        check(case, mutant.run(x), want)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_case_concerned_notices(mutant):
    cases = [case for case in CASES if mutant.concerns(case)]
    assert cases
    assert [case.name for case in cases if not notices(case, mutant)] == []
