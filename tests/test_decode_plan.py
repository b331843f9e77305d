"""The plan of a decode step: every key of every row exactly once, pages that rows share once for all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lragent_jax.kernels.lora_attention import PageTable
from lragent_jax.kernels.lora_attention.decode_plan import DecodePlan, PlanSizes, plan_decode

p = 8


def make(table, q_starts, kv_lens, adapter_ids=None, low_rank=None, T=1, **sizes) -> DecodePlan:
    """The plan as numpy arrays, after `check` has seen it."""
    sizes = PlanSizes(**{"rows_per_item": 4, "pages_per_block": 1, "programs": 16, "heads": 2} | sizes)
    base, starts, lens = (jnp.asarray(x, jnp.int32) for x in (table, q_starts, kv_lens))
    low, ids = (None if x is None else jnp.asarray(x, jnp.int32) for x in (low_rank, adapter_ids))
    plan = jax.tree.map(np.asarray, plan_decode(PageTable(base, low, starts, lens), ids, T=T, page_size=p, sizes=sizes))
    check(plan, np.asarray(table), np.asarray(q_starts), np.asarray(kv_lens), adapter_ids, low_rank, T, sizes)
    return plan


def check(plan, table, q_starts, kv_lens, adapter_ids, low_rank, T, sizes):
    """What every plan must be, whatever the table."""
    B, W = table.shape
    positions = (q_starts[:, None] + np.arange(T)).reshape(-1)
    limits = np.where((positions >= 0) & (positions < np.repeat(kv_lens, T)), positions + 1, 0)
    covered = [[] for _ in limits]
    made = [[] for _ in limits]
    for (first, end), rows, parts, item_limits, readers, expanders in zip(*plan[:6], strict=True):
        assert 0 <= first <= end <= W
        assert (rows[0] >= 0) == (first < end)
        leader = rows[0] // T
        for slot, row in enumerate(rows):
            if row < 0:
                assert (parts[slot], item_limits[slot], readers[slot], expanders[slot]) == (0, 0, -1, -1)
                continue
            b = row // T
            assert (table[b, first:end] == table[leader, first:end]).all()
            assert item_limits[slot] == limits[row]
            assert 0 <= parts[slot] < sizes.max_parts(B, W)
            covered[row] += range(first, end)
            made[row].append(parts[slot])
            if adapter_ids is None or adapter_ids[b] == 0:
                assert (readers[slot], expanders[slot]) == (-1, -1)
                continue
            for other, same in ((readers[slot], False), (expanders[slot], True)):
                assert 0 <= other <= slot
                first_b = rows[other] // T
                assert (low_rank[b, first:end] == low_rank[first_b, first:end]).all()
                assert not same or adapter_ids[b] == adapter_ids[first_b]
    check_lanes(plan, sizes)
    for row, limit in enumerate(limits):
        needed = -(-limit // p)
        assert sorted(covered[row])[:needed] == list(range(needed))
        assert len(set(covered[row])) == len(covered[row])
        assert limit or not covered[row]
        assert sorted(made[row]) == list(range(plan.num_parts[row]))


def check_lanes(plan, sizes):
    """All items in order, each in one lane, and no lane longer than its part of the whole, rounded up."""
    lengths = -(-(plan.pages[:, 1] - plan.pages[:, 0]) // sizes.pages_per_block)
    taken = [item for first, end in plan.lanes for item in range(first, end)]
    assert taken == list(range((lengths > 0).sum()))
    assert np.all(lengths[len(taken) :] == 0)
    most = -(-lengths.sum() // len(plan.lanes))
    assert all(lengths[first:end].sum() <= most for first, end in plan.lanes)


def pages_read(plan) -> int:
    return int((plan.pages[:, 1] - plan.pages[:, 0]).sum())


def test_one_row_is_cut_into_a_wave_of_programs():
    plan = make(np.arange(64)[None], [500], [501], programs=16, heads=2)
    assert plan.num_parts.tolist() == [8]
    assert len(plan.pages) == 8  # no program starts for nothing
    assert pages_read(plan) == 63


def test_agents_of_one_trajectory_read_it_once():
    plan = make(np.tile(np.arange(64), (4, 1)), [500] * 4, [501] * 4, [1, 2, 3, 4], np.tile(np.arange(64), (4, 1)))
    assert pages_read(plan) == 63
    used = plan.pages[:, 0] < plan.pages[:, 1]
    assert np.all(plan.readers[used] == 0)
    assert np.all(plan.expanders[used] == [0, 1, 2, 3])


def test_a_row_without_adapter_beside_each_agent_reads_no_page_again():
    """As mode `rebase` decodes: every row twice."""
    table = np.tile([[0, 1, 2, 3], [0, 1, 4, 5]], (2, 1))
    plan = make(table, [30, 27] * 2, [31, 28] * 2, [1, 2, 0, 0], table)
    assert pages_read(plan) == len(np.unique(table))


def test_private_tails_follow_a_shared_prefix():
    table = np.arange(6 * 40).reshape(6, 40)
    table[:, :32] = table[0, :32]
    plan = make(table, [319] * 6, [320] * 6, rows_per_item=8)
    assert pages_read(plan) == 32 + 6 * 8


def test_more_rows_than_an_item_holds_are_several_items():
    plan = make(np.tile(np.arange(16), (6, 1)), [127] * 6, [128] * 6, rows_per_item=4)
    assert pages_read(plan) == 2 * 16


def test_tables_that_branch_at_every_page_are_planned_without_sharing():
    table = np.arange(4 * 32).reshape(4, 32)
    table[1::2, ::2] = table[::2, ::2]  # neighbours share every other page
    plan = make(table, [255] * 4, [256] * 4)
    assert pages_read(plan) == 4 * 32


def test_agents_with_their_own_low_rank_pages_are_told_apart():
    low_rank = np.arange(4 * 16).reshape(4, 16)
    low_rank[2] = low_rank[0]
    plan = make(np.tile(np.arange(16), (4, 1)), [127] * 4, [128] * 4, [1, 2, 3, 0], low_rank)
    used = plan.pages[:, 0] < plan.pages[:, 1]
    assert np.all(plan.readers[used] == [0, 1, 0, -1])
    assert np.all(plan.expanders[used] == [0, 1, 2, -1])


def test_low_rank_pages_that_part_in_the_middle_are_told_apart_where_they_do():
    low_rank = np.arange(2 * 16).reshape(2, 16)
    low_rank[1, :8] = low_rank[0, :8]
    plan = make(np.tile(np.arange(16), (2, 1)), [127] * 2, [128] * 2, [1, 2], low_rank, programs=4, heads=4)
    used = plan.pages[:, 0] < plan.pages[:, 1]
    assert used.sum() >= 1
    for (first, end), readers in zip(plan.pages[used], plan.readers[used], strict=True):
        assert readers[1] == (0 if end <= 8 else 1), (first, end)


def test_lanes_of_uneven_rows_are_even():
    """Whole rows per program would take the longest row's time; a wave of pieces of one length would not come out."""
    table = np.arange(5 * 64).reshape(5, 64)
    lens = np.array([512, 8, 160, 24, 96])
    plan = make(table, lens - 1, lens, programs=20, heads=2)
    assert [plan.pages[first:end, 1].sum() - plan.pages[first:end, 0].sum() for first, end in plan.lanes] == [10] * 10
    assert plan.num_parts.tolist() == [7, 1, 3, 1, 2]


def test_queries_that_are_padding_are_in_no_item():
    plan = make(np.arange(8).reshape(2, 4), [-1, 5], [3, 6], T=3, rows_per_item=2)
    assert plan.num_parts.tolist() == [0, 1, 1, 1, 0, 0]


@given(st.data())
def test_any_table(data):
    B, W, T = data.draw(st.sampled_from([(1, 4, 1), (3, 6, 2), (5, 5, 1)]))  # few: each is compiled
    few = st.integers(0, 6)  # few pages: rows meet by chance, too
    table, low_rank = (
        np.array(data.draw(st.lists(few, min_size=B * W, max_size=B * W))).reshape(B, W) for _ in range(2)
    )
    if data.draw(st.booleans()):
        table[:, : W // 2] = table[0, : W // 2]
    kv_lens = np.array(data.draw(st.lists(st.integers(0, W * p), min_size=B, max_size=B)))
    q_starts = kv_lens - np.array(data.draw(st.lists(st.integers(-1, T + 1), min_size=B, max_size=B)))
    adapter_ids = data.draw(st.lists(st.integers(0, 2), min_size=B, max_size=B))
    rows_per_item, programs = data.draw(st.sampled_from([(1, 4), (3, 64)]))
    make(
        table, q_starts, kv_lens, adapter_ids, low_rank, T=T,
        rows_per_item=rows_per_item, programs=programs, pages_per_block=data.draw(st.sampled_from([1, 2])),
    )  # fmt: skip


@pytest.mark.parametrize("field", ["rows_per_item", "pages_per_block", "programs", "heads"])
def test_sizes_are_checked(field):
    sound = {"rows_per_item": 1, "pages_per_block": 1, "programs": 1, "heads": 1}
    with pytest.raises(ValueError, match=f"{field} is 0"):
        PlanSizes(**sound | {field: 0})
