"""Low-rank pages written in place, page by page, against the scatter that other platforms use."""

import jax.numpy as jnp
import numpy as np
import pytest

from lragent_jax.kernels.interpret import interpreted
from lragent_jax.kernels.page_update import update_pages
from lragent_jax.kernels.page_write import LowRank, Projections, Rotation
from lragent_jax.models import cache_view
from lragent_jax.models.cache_view import LayerCache, PageTable

P, R, PAGE = 14, 8, 16


def table_of(q_starts, kv_lens, write_from) -> PageTable:
    """Two tables per row, of pages that are in one table only; what is behind a row's keys exists nowhere."""
    B, W = len(q_starts), 3
    pages = np.random.default_rng(0).permutation(P)[: 2 * B * W].reshape(2, B, W).astype(np.int32)
    held = np.arange(W) * PAGE < np.array(kv_lens)[:, None]
    zeros = np.zeros(B, np.int32)
    return PageTable(
        q_starts=np.array(q_starts, np.int32), kv_lens=np.array(kv_lens, np.int32), base=pages[0],
        base_write_from=zeros, low_rank=np.where(held, pages, 2**30).astype(np.int32),
        low_rank_write_from=np.array(write_from, np.int32), group_ids=np.zeros((2, B), np.int32), read_slots=zeros,
    )  # fmt: skip


def written(pool, low_rank, table: PageTable, implementation: str):
    B, T = low_rank.shape[1:3]
    projections, angles = Projections(jnp.zeros((B, T, 2, 4))), jnp.zeros((B, T, 2))
    cache = LayerCache(kv=jnp.zeros((1, 1, PAGE, 8)), low_rank_v=None, low_rank_k=pool)
    _, cache = cache_view.rotate_and_write(
        projections, Rotation(angles, angles), LowRank(k=low_rank), cache, table, implementation
    )
    return cache.low_rank_k


@pytest.mark.parametrize(
    ("T", "q_starts", "kv_lens", "write_from"),
    [
        (1, (15, 16), (16, 17), ((0, 0), (0, 2**30))),
        (20, (10, 0), (30, 7), ((0, 3), (14, 2**30))),
        (33, (0, 5), (33, 5), ((0, 0), (40, 0))),
    ],
)
def test_pages_equal_a_scatter(T, q_starts, kv_lens, write_from):
    rng = np.random.default_rng(1)
    pool = jnp.asarray(rng.standard_normal((P, R, PAGE)), jnp.float32)
    low_rank = jnp.asarray(rng.standard_normal((2, 2, T, R)), jnp.float32)
    table = table_of(q_starts, kv_lens, write_from)
    want = written(pool, low_rank, table, "xla")
    with interpreted():
        got = written(pool, low_rank, table, "pallas_mosaic_tpu")
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    assert not np.array_equal(np.asarray(want), np.asarray(pool))


def test_pages_without_new_slots_are_not_touched(monkeypatch):
    monkeypatch.setattr("lragent_jax.kernels.page_update.MAX_BUFFER_BYTES", 2 * 4 * R * PAGE)  # two pages at a time
    pool = jnp.zeros((P, R, PAGE), jnp.float32)
    pages = jnp.array([3, 2**31 - 1, 0, -1, 5, 0], jnp.int32)
    first, end = jnp.array([0, 0, 4, 8, 15, 16], jnp.int32), jnp.array([16, 0, 6, 8, 16, 5], jnp.int32)
    contents = jnp.ones((6, R, PAGE)).at[5].set(jnp.nan)  # names a page that another one writes to
    with interpreted():
        got = np.asarray(update_pages(pool, pages, first, end, contents))
    want = np.zeros((P, R, PAGE))
    want[3], want[0, :, 4:6], want[5, :, 15] = 1, 1, 1
    np.testing.assert_array_equal(got, want)
