"""The memory warps of decode's streaming kernel: which pages come when, and where they go.

A copy takes its warp many instructions, so of many readers the copies would take longer than the bytes: the four
warps of the warpgroup share them, each with a program of its own.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.registers import pin
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.stream_shapes import (
    ANGLES,
    BASE,
    BLOCK_KV,
    KEYS,
    QUERIES,
    VALUES,
    WARPS,
    Shapes,
    turns,
)

MAX_AHEAD = 16  # page ids of low-rank pages that a warp's registers hold a block ahead
TOGETHER = 8  # readers beyond, looked up at a time: a multiple of the warps


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
    queries: list  # rows of the warp's slots
    low_rank: list["LowRankFeed"]
    followed: list[list]  # per feed, rows


def feeds(refs, item, warp: int, shapes: Shapes) -> list["LowRankFeed"]:
    """Of the pools of which the warp brings pages."""
    low_rank = []
    if shapes.brings_values(warp):
        parts = refs.readers, refs.readers.count[item], refs.low_rank_v, refs.v_smem, refs.v_ready
        low_rank.append(LowRankFeed(refs, *parts, shapes.joined, warp, VALUES))
    if shapes.brings_keys(warp):
        parts = refs.expanders, refs.expanders.count[item], refs.low_rank_k, refs.k_smem, refs.k_ready
        low_rank.append(LowRankFeed(refs, *parts, 1, warp, KEYS))
    return low_rank


def ask(refs, item, warp: int, shapes: Shapes) -> Asked:
    low_rank = feeds(refs, item, warp, shapes)
    asked = Asked(
        leader=refs.meta[item, 2] if warp == BASE else None,
        queries=[query_row(refs, item, slot) for slot in turns(warp, QUERIES, range(shapes.R))],
        low_rank=low_rank,
        followed=[feed.first_rows(item, shapes) for feed in low_rank],
    )
    if shapes.one_item:
        pin(refs.asked_for.at[warp])  # or it would all be behind the branch that an item without blocks takes
    return asked


def query_row(refs, item, slot):
    """Of a slot without a row the first one's queries come: a copy that nobody reads costs less than a branch."""
    return jnp.maximum(refs.rows[item, slot], 0)


def bring(refs, head, item, asked: Asked, span, num_blocks, before, warp: int, shapes: Shapes):
    """A memory warp: its share of the item's queries, then of block after block, into the stage read longest ago.

    `before` blocks of the lane have gone through the stages already; block j of the item is the lane's (before + j)-th.
    Page ids are looked up a block ahead, so that what a lookup takes is over when its turn comes.
    """
    leader, queries, low_rank, rows = asked

    def look_up(j):
        pages = range(shapes.pages_per_block if warp == BASE else 0)
        base = [page_of_block(j, span, refs.table.at[leader], shapes, i) for i in pages]
        return base, [feed.look_up(own, j, span, shapes) for feed, own in zip(low_rank, rows, strict=True)]

    first_pages = look_up(jnp.int32(0))
    if queries and not shapes.one_item:
        pl.when(before > 0)(lambda: plgpu.barrier_wait(queries_read(refs, shapes)))
    for slot, row in zip(turns(warp, QUERIES, range(shapes.R)), queries, strict=True):
        own = refs.q_smem.at[pl.ds(slot * shapes.G, shapes.G)]
        plgpu.copy_gmem_to_smem(refs.q.at[row, head], own, refs.q_ready)
    if shapes.r_k and warp == ANGLES:
        bring_expansion(refs, item, head)
    if warp not in shapes.block_warps:
        return

    def step(j, pages):
        base, low_rank_pages = pages
        turn = before + j
        stage, ready = lax.rem(turn, jnp.int32(shapes.stages)), lax.rem(turn, jnp.int32(shapes.ready))
        pl.when(turn >= shapes.stages)(lambda: plgpu.barrier_wait(refs.read.at[stage]))
        for i, page in enumerate(base):
            kv = refs.kv_smem.at[stage, pl.ds(i * shapes.page_slots, shapes.page_slots)]
            slots = refs.base.at[page, head, pl.ds(first_slot(j, shapes), shapes.page_slots)]
            plgpu.copy_gmem_to_smem(slots, kv, refs.kv_ready.at[ready])
        if warp == ANGLES and shapes.r_k:
            position = span[0] * shapes.p + j * BLOCK_KV
            angles = refs.rope.at[pl.ds(position, BLOCK_KV)]
            plgpu.copy_gmem_to_smem(angles, refs.rope_smem.at[stage], refs.kv_ready.at[ready])
        elif warp != BASE:  # none goes on without it: a warp that brings nothing else might miss phases of `read`
            plgpu.barrier_arrive(refs.kv_ready.at[ready])
        for feed, own in zip(low_rank, low_rank_pages, strict=True):
            feed.bring(item, j, turn, span, own, shapes)
        return look_up(j + 1)

    lax.fori_loop(0, num_blocks, step, first_pages)


def queries_read(refs, shapes: Shapes):
    """The barrier that tells when the next item's queries may come."""
    return refs.result_gone if shapes.one_at_a_time else refs.q_read


def drain(refs, num_blocks, warp: int, shapes: Shapes):
    """Waits until the last of the lane's blocks and queries are read: no barrier is left with a phase to come."""
    if turns(warp, QUERIES, range(shapes.R)):
        pl.when(num_blocks > 0)(lambda: plgpu.barrier_wait(queries_read(refs, shapes)))
    if warp not in shapes.block_warps:
        return

    def one(j, _):
        plgpu.barrier_wait(refs.read.at[lax.rem(j, jnp.int32(shapes.stages))])
        return

    lax.fori_loop(jnp.maximum(num_blocks - shapes.stages, 0), num_blocks, one, None)


def bring_expansion(refs, item, head):
    """B of every adapter whose keys are rebuilt."""

    def one(e, _):
        b = refs.lora_b_k.at[refs.expander_ids[item, e], :, head]
        plgpu.copy_gmem_to_smem(b, refs.b_smem.at[e], refs.b_ready.at[e])
        return

    lax.fori_loop(0, refs.expanders.count[item], one, None)


@dataclasses.dataclass(frozen=True)
class LowRankFeed:
    """Brings the warp's readers' low-rank pages of one pool, block by block.

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
    warp: int
    turn: int  # the warp that takes the first reader

    def own(self, numbers: int) -> list[int]:
        return turns(self.warp, self.turn, range(numbers))

    def ahead(self, shapes: Shapes) -> int:
        """Readers, all warps' together, whose page ids come looked up: whole buffers of them."""
        pools = bool(shapes.r_v) + bool(shapes.r_k)
        most = WARPS * MAX_AHEAD // (shapes.pages_per_block * pools) // self.joined * self.joined
        products = -(-shapes.readers // self.joined)
        return min(products * self.joined, max(self.joined, most))

    def rows_of(self, item, first, number: int, shapes: Shapes) -> list:
        """The rows whose tables the warp's of readers [first, first + number) follow; behind the last one its own."""
        most = self.readers.rows.shape[1]
        rows = [self.readers.rows[item, jnp.minimum(first + n, most - 1)] for n in self.own(number)]
        return [lax.div(row, jnp.int32(shapes.T)) for row in rows]

    def first_rows(self, item, shapes: Shapes) -> list:
        return self.rows_of(item, 0, self.ahead(shapes), shapes)

    def look_up(self, rows, j, span, shapes: Shapes) -> list[list]:
        """Page ids of block j, a list per row."""
        tables = [self.refs.low_rank_table.at[row] for row in rows]
        return [[page_of_block(j, span, table, shapes, i) for i in range(shapes.pages_per_block)] for table in tables]

    def bring(self, item, j, turn, span, pages: list[list], shapes: Shapes) -> None:
        """Block j of the readers, the lane's block number `turn`; `pages` are those of the first of them."""
        ahead = self.ahead(shapes)
        for n, own in zip(self.own(ahead), pages, strict=True):
            self._copy(jnp.int32(n // self.joined), n % self.joined, j, turn, own, shapes)
        if shapes.readers <= ahead:
            return
        together = max(TOGETHER, self.joined)

        def some(i, _):
            start = ahead + i * together
            looked_up = self.look_up(self.rows_of(item, start, together, shapes), j, span, shapes)
            for n, own in zip(self.own(together), looked_up, strict=True):
                self._copy(lax.div(start + n, jnp.int32(self.joined)), n % self.joined, j, turn, own, shapes)
            return

        left = jnp.maximum(self.count - ahead, 0)
        lax.fori_loop(0, lax.div(left + together - 1, jnp.int32(together)), some, None)

    def _copy(self, product, place: int, j, turn, pages: list, shapes: Shapes) -> None:
        """The block of a reader into its place of its buffer.

        Of a reader that is not there only a sign comes where there is one buffer: nobody's lanes are its own. Of
        several, rows of the others multiply this one by 0, which would make NaN of what happens to lie in it: the last
        reader's pages come again.
        """
        products, rank = -(-shapes.readers // self.joined), self.pool.shape[1]
        buffer = self.smem.at[low_rank_block(turn, product, products, shapes)]
        first = product * self.joined

        def tell(use) -> None:
            with_barrier(self.ready, turn, product, products, shapes, use)

        def bring_it() -> None:
            for i, page in enumerate(pages):
                slots = self.pool.at[page, :, pl.ds(first_slot(j, shapes), shapes.page_slots)]
                block = buffer.at[i, pl.ds(place * rank, rank)]
                tell(functools.partial(plgpu.copy_gmem_to_smem, slots, block))

        def only_tell() -> None:
            for _ in pages:
                tell(plgpu.barrier_arrive)

        if place == 0:
            pl.when(first < self.count)(bring_it)
            return
        needed = (first + place < self.count) | ((first < self.count) & (self.count > self.joined))
        pl.when(needed)(bring_it)
        pl.when((first < self.count) & ~needed)(only_tell)
