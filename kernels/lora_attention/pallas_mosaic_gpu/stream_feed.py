"""The memory warpgroup of decode's streaming kernel: which pages come when, and where they go."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.registers import WGMMA, load, pin
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.stream_shapes import BLOCK_KV, Shapes

MAX_AHEAD = 16  # page ids of low-rank pages that registers hold a block ahead
TOGETHER = 8  # readers beyond, looked up at a time


def page_of_block(j, span, table, shapes: Shapes, i: int):
    """The page that holds block j of the item's range; `i`: which of them, where a block takes several.

    Columns past the range are read as its last: always a page that may be read, and its keys are masked.
    """
    first, end = span
    per_page = jnp.int32(shapes.blocks_per_page)
    column = first + (j * shapes.pages_per_block + i if shapes.blocks_per_page == 1 else lax.div(j, per_page))
    return table[jnp.minimum(column, end - 1)]


def first_slot(j, shapes: Shapes):
    """Where in its page block j begins."""
    return lax.rem(j, jnp.int32(shapes.blocks_per_page)) * BLOCK_KV


def low_rank_block(j, product, products: int, shapes: Shapes):
    """Which of the stages' low-rank buffers holds what product number `product` of the lane's block j reads."""
    return lax.rem(j, jnp.int32(shapes.stages)) * products + product


def with_barrier(ready, j, product, products: int, shapes: Shapes, use) -> None:
    """use(the barrier that tells of such a buffer): of the warpgroup's whose turn the lane's block j is."""
    turn, own = lax.div(j, jnp.int32(shapes.compute)), lax.rem(j, jnp.int32(shapes.compute))
    index = lax.rem(turn, jnp.int32(shapes.stages)) * products + product
    for warpgroup, barriers in enumerate(ready):
        pl.when(own == warpgroup)(lambda barriers=barriers: use(barriers.at[index]))


class Asked(NamedTuple):
    """What an item's first bytes depend on. It is asked for at once: every lookup that waits for another takes as long
    as the copy itself, and the compiler moves none past a copy or a branch."""

    leader: Any  # the row whose table is followed
    queries: list  # rows; none where they are looked up when their turn comes
    low_rank: list["LowRankFeed"]
    followed: list[list]  # per feed, rows


def ask(refs, item, shapes: Shapes) -> Asked:
    low_rank = []
    if shapes.r_v:
        count, joined = refs.readers.count[item], shapes.joined
        low_rank.append(LowRankFeed(refs, refs.readers, count, refs.low_rank_v, refs.v_smem, refs.v_ready, joined))
    if shapes.r_k:
        count = refs.expanders.count[item]
        low_rank.append(LowRankFeed(refs, refs.expanders, count, refs.low_rank_k, refs.k_smem, refs.k_ready, 1))
    asked = Asked(
        leader=refs.meta[item, 2],
        queries=[query_row(refs, item, slot) for slot in range(shapes.R if shapes.asks_ahead else 0)],
        low_rank=low_rank,
        followed=[feed.first_rows(item, shapes) for feed in low_rank],
    )
    if shapes.one_item:
        pin(refs.asked_for)  # or it would all be behind the branch that an item without blocks takes
    return asked


def query_row(refs, item, slot):
    return jnp.maximum(refs.rows[item, slot], 0)


def bring(refs, head, item, asked: Asked, span, num_blocks, before, shapes: Shapes):
    """The memory warpgroup: the item's queries, then block after block into the stage that was read longest ago.

    `before` blocks of the lane have gone through the stages already; block j of the item is the lane's (before + j)-th.
    Page ids are looked up a block ahead, so that what a lookup takes is over when its turn comes.
    """
    leader, queries, low_rank, rows = asked

    def look_up(j):
        base = [page_of_block(j, span, refs.table.at[leader], shapes, i) for i in range(shapes.pages_per_block)]
        return base, [feed.look_up(own, j, span, shapes) for feed, own in zip(low_rank, rows, strict=True)]

    first_pages = look_up(jnp.int32(0)) if shapes.asks_ahead else None
    if not shapes.one_item:
        pl.when(before > 0)(lambda: plgpu.barrier_wait(queries_read(refs, shapes)))
    for slot in range(shapes.R):
        row = queries[slot] if queries else query_row(refs, item, slot)
        plgpu.copy_gmem_to_smem(refs.q.at[row, head], refs.q_smem.at[pl.ds(slot * shapes.G, shapes.G)], refs.q_ready)
    if shapes.r_k:
        bring_expansion(refs, item, head)

    def step(j, pages):
        base, low_rank_pages = pages
        turn = before + j
        stage, ready = lax.rem(turn, jnp.int32(shapes.stages)), lax.rem(turn, jnp.int32(shapes.ready))
        pl.when(turn >= shapes.stages)(lambda: plgpu.barrier_wait(refs.read.at[stage]))
        for i, page in enumerate(base):
            kv = refs.kv_smem.at[stage, pl.ds(i * shapes.page_slots, shapes.page_slots)]
            slots = refs.base.at[page, head, pl.ds(first_slot(j, shapes), shapes.page_slots)]
            plgpu.copy_gmem_to_smem(slots, kv, refs.kv_ready.at[ready])
        if shapes.r_k:
            position = span[0] * shapes.p + j * BLOCK_KV
            angles = refs.rope.at[pl.ds(position, BLOCK_KV)]
            plgpu.copy_gmem_to_smem(angles, refs.rope_smem.at[stage], refs.kv_ready.at[ready])
        for feed, own in zip(low_rank, low_rank_pages, strict=True):
            feed.bring(item, j, turn, span, own, shapes)
        return look_up(j + 1)

    lax.fori_loop(0, num_blocks, step, look_up(jnp.int32(0)) if first_pages is None else first_pages)


def queries_read(refs, shapes: Shapes):
    """The barrier that tells when the next item's queries may come."""
    return refs.result_gone if shapes.one_at_a_time else refs.q_read


def drain(refs, num_blocks, shapes: Shapes):
    """Waits until the last of the lane's blocks and queries are read: no barrier is left with a phase to come."""
    pl.when(num_blocks > 0)(lambda: plgpu.barrier_wait(queries_read(refs, shapes)))

    def one(j, _):
        plgpu.barrier_wait(refs.read.at[lax.rem(j, jnp.int32(shapes.stages))])
        return

    lax.fori_loop(jnp.maximum(num_blocks - shapes.stages, 0), num_blocks, one, None)


def bring_expansion(refs, item, head):
    """B of every adapter whose keys are rebuilt, and the queries in the layout that the matrix unit reads."""

    def one(e, _):
        b = refs.lora_b_k.at[refs.expander_ids[item, e], :, head]
        plgpu.copy_gmem_to_smem(b, refs.b_smem.at[e], refs.b_ready.at[e])
        return

    lax.fori_loop(0, refs.expanders.count[item], one, None)
    plgpu.barrier_wait(refs.q_ready)
    refs.q_tiled[...] = load(refs.q_smem, WGMMA, optimized=False)
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.q_tiled_ready)


@dataclasses.dataclass(frozen=True)
class LowRankFeed:
    """Brings every reader's low-rank pages of one pool, block by block.

    Page ids of the first readers come looked up; those of more readers than registers hold are looked up when their
    turn comes, some at a time, so that the reads' latencies overlap.
    """

    refs: Any
    readers: Any
    count: Any  # of the item's
    pool: Any
    smem: Any
    ready: Any
    joined: int  # readers whose blocks lie in one buffer, under one barrier

    def ahead(self, shapes: Shapes) -> int:
        """Readers whose page ids come looked up: whole buffers of them."""
        pools = bool(shapes.r_v) + bool(shapes.r_k)
        most = MAX_AHEAD // (shapes.pages_per_block * pools) // self.joined * self.joined
        products = -(-shapes.readers // self.joined)
        return min(products * self.joined, max(self.joined, most))

    def rows_of(self, item, first, number: int, shapes: Shapes) -> list:
        """The rows whose tables readers [first, first + number) follow; behind the last reader its own again."""
        most = self.readers.rows.shape[1]
        rows = [self.readers.rows[item, jnp.minimum(first + n, most - 1)] for n in range(number)]
        return [lax.div(row, jnp.int32(shapes.T)) for row in rows]

    def first_rows(self, item, shapes: Shapes) -> list:
        return self.rows_of(item, 0, self.ahead(shapes), shapes)

    def look_up(self, rows, j, span, shapes: Shapes) -> list[list]:
        """Page ids of block j, a list per row."""
        tables = [self.refs.low_rank_table.at[row] for row in rows]
        return [[page_of_block(j, span, table, shapes, i) for i in range(shapes.pages_per_block)] for table in tables]

    def bring(self, item, j, turn, span, pages: list[list], shapes: Shapes) -> None:
        """Block j of all readers, the lane's block number `turn`; `pages` are those of the first of them."""
        count, ahead = self.count, len(pages)
        for first in range(0, ahead, self.joined):
            self._copy(jnp.int32(first), count, j, turn, pages[first : first + self.joined], shapes)
        if shapes.readers <= ahead:
            return
        together = max(TOGETHER, self.joined)

        def some(i, _):
            start = ahead + i * together
            looked_up = self.look_up(self.rows_of(item, start, together, shapes), j, span, shapes)
            for n in range(0, together, self.joined):
                self._copy(start + n, count, j, turn, looked_up[n : n + self.joined], shapes)
            return

        lax.fori_loop(0, lax.div(jnp.maximum(count - ahead, 0) + together - 1, jnp.int32(together)), some, None)

    def _copy(self, first, count, j, turn, pages: list[list], shapes: Shapes) -> None:
        """Blocks of the readers from `first` on into their buffer.

        Of the readers that are not there only a sign comes where there is one buffer: nobody's lanes are theirs. Of
        several, rows of the others multiply this one by 0, which would make NaN of what happens to lie in it: the last
        reader's pages come again.
        """
        products, rank = -(-shapes.readers // self.joined), self.pool.shape[1]
        product = lax.div(first, jnp.int32(self.joined))
        buffer = self.smem.at[low_rank_block(turn, product, products, shapes)]

        def tell(use) -> None:
            with_barrier(self.ready, turn, product, products, shapes, use)

        def bring_one(n: int) -> None:
            for i, page in enumerate(pages[n]):
                slots = self.pool.at[page, :, pl.ds(first_slot(j, shapes), shapes.page_slots)]
                block = buffer.at[i, pl.ds(n * rank, rank)]
                tell(functools.partial(plgpu.copy_gmem_to_smem, slots, block))

        def only_tell() -> None:
            for _ in range(shapes.pages_per_block):
                tell(plgpu.barrier_arrive)

        @pl.when(first < count)
        def _():
            bring_one(0)
            for n in range(1, self.joined):
                needed = (first + n < count) | (count > self.joined)
                pl.when(needed)(functools.partial(bring_one, n))
                pl.when(~needed)(only_tell)
