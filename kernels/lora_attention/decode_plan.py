"""Which pages a decode kernel streams, for which rows, in which pieces: data computed from the page table.

Rows whose tables name the same page in the same column read the same keys there. The batch's tables form, column by
column, a tree of such classes of rows (all rows in their common prompt, the agents of one trajectory behind it, single
rows at the end); a *node* is a range of columns over which the class stays the same. A node is cut into *items*: a
range of columns for at most R rows, streamed once for all of them by one program per kv head. Every item leaves one
partial result per row, and partial results of a row are merged by their maxima and sums (Flash-Decoding's split of the
keys; the shared prefix as in Hydragen, arXiv 2402.05099, here for any tree, found without being told).

Everything is computed on the device, since lengths grow there, and depends on the table alone: XLA merges the copies
that the layers of a model ask for.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from lragent_jax.kernels.lora_attention.arguments import PageTable

MAX_DEPTH = 8  # nodes along a row's path; tables that branch more often are planned without sharing


@dataclasses.dataclass(frozen=True)
class PlanSizes:
    """What a kernel asks of a plan.

    rows_per_item: R, rows whose queries one program holds. pages_per_block: columns that a program reads at a time.
    programs: programs that run at once on the device. heads: programs that every lane takes, one per kv head.
    """

    rows_per_item: int
    pages_per_block: int
    programs: int
    heads: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}; it must be at least 1")

    def max_depth(self, B: int) -> int:
        return 1 if B == 1 else MAX_DEPTH

    @property
    def num_lanes(self) -> int:
        """As many as the device has at once: with one more, all would wait for it."""
        return max(1, self.programs // self.heads)

    def max_parts(self, B: int, W: int) -> int:
        """C: the most partial results that a row can have: one per node, and one more per end of a lane inside."""
        return min(self.num_lanes - 1, -(-W // self.pages_per_block)) + self.max_depth(B)

    def max_tiles(self, B: int, T: int) -> int:
        """The most (node, group of R rows) pairs; plans that would need more are made without sharing."""
        return B * -(-T // self.rows_per_item) + (0 if B == 1 else B + -(-B * T // self.rows_per_item))

    def max_items(self, B: int, T: int) -> int:
        """I: the most items."""
        return self.max_tiles(B, T) + self.num_lanes - 1


class DecodePlan(NamedTuple):
    """Rows are (batch row, query token) pairs, batch-major: row = b T + t."""

    pages: Int32[Array, "I 2"]  # columns [first, end) of the page table; the same twice where there is no such item
    rows: Int32[Array, "I R"]  # whose queries the item holds, −1 where none; every item has a row in slot 0
    parts: Int32[Array, "I R"]  # which of its row's partial results this is; 0 where there is no row
    limits: Int32[Array, "I R"]  # the row sees keys at positions < limit; 0 where there is no row
    readers: Int32[Array, "I R"]  # first slot with the same low-rank pages in that range; −1: no row, or no adapter
    expanders: Int32[Array, "I R"]  # first slot with the same low-rank pages and the same adapter; −1 likewise
    num_parts: Int32[Array, " M"]  # of every row
    lanes: Int32[Array, "lanes 2"]  # items [first, end) of every lane


class Nodes(NamedTuple):
    """D nodes per batch row, led by it (the first of its class): columns [first, end), equal where there is none."""

    first: Int32[Array, "B D"]
    end: Int32[Array, "B D"]
    leader: Int32[Array, "B W"]  # the batch row that leads the class of row b in column w


def before(x: Int32[Array, "... n"]) -> Int32[Array, "... n"]:
    """Sums of the earlier entries. As a masked sum: for these few entries one fused loop beats a scan's many."""
    earlier = jnp.tri(x.shape[-1], k=-1, dtype=bool)
    return jnp.where(earlier, x[..., None, :], 0).sum(-1)


def query_limits(page_table: PageTable, T: int) -> Int32[Array, "B T"]:
    """How many keys each query sees; 0 for padding."""
    positions = page_table.q_starts[:, None] + jnp.arange(T, dtype=jnp.int32)
    return jnp.where((positions >= 0) & (positions < page_table.kv_lens[:, None]), positions + 1, 0)


def find_nodes(table: Int32[Array, "B W"], num_pages: Int32[Array, " B"], depth: int) -> tuple[Nodes, Bool[Array, ""]]:
    """The nodes of the tree, and whether all of them fit into `depth` per row."""
    B, W = table.shape
    columns = jnp.arange(W, dtype=jnp.int32)
    held = columns < num_pages[:, None]
    if B == 1:
        nodes = Nodes(jnp.zeros((1, 1), jnp.int32), num_pages[:, None], jnp.zeros((1, W), jnp.int32))
        return nodes, jnp.bool_(True)
    same = (table[:, None] == table[None]) & held[:, None] & held[None]  # [B, B, W]
    leader = jnp.argmax(same, axis=1).astype(jnp.int32)
    changed = jnp.any(same[..., 1:] != same[..., :-1], axis=1)
    border = held & jnp.pad(changed, ((0, 0), (1, 0)), constant_values=True)

    at, borders = jnp.full(B, -1, jnp.int32), []
    for _ in range(depth + 1):
        at = jnp.min(jnp.where(border & (columns > at[:, None]), columns, num_pages[:, None]), axis=1)
        borders.append(at)
    edges = jnp.stack(borders, axis=1)
    first, end = edges[:, :-1], edges[:, 1:]
    led = jnp.take_along_axis(leader, jnp.minimum(first, W - 1), axis=1) == jnp.arange(B, dtype=jnp.int32)[:, None]
    return Nodes(first, jnp.where(led, end, first), leader), jnp.all(edges[:, -1] == num_pages)


def node_rows(nodes: Nodes, limits: Int32[Array, "B T"], page_size: int) -> Bool[Array, "n M"]:
    """Which rows belong to which node (n = B D, in the order of `nodes`): their class, and they see a key of it."""
    (B, T), W = limits.shape, nodes.leader.shape[1]
    first, led = nodes.first.reshape(-1), (nodes.end > nodes.first).reshape(-1)
    leading = jnp.repeat(jnp.arange(B, dtype=jnp.int32), nodes.first.shape[1])
    member = led[:, None] & (nodes.leader.T[jnp.minimum(first, W - 1)] == leading[:, None])  # [n, B]
    sees = limits.reshape(-1)[None] > first[:, None] * page_size
    return jnp.repeat(member, T, axis=1) & sees


def low_rank_keys(page_table: PageTable, adapted: Bool[Array, " B"], num_pages: Int32[Array, " B"], first, end):
    """Per item and batch row a number that is equal for rows that read the same low-rank pages in [first, end).

    Two rows may be told apart although they read the same pages: where what they share begins or ends inside the range.
    """
    assert page_table.low_rank is not None
    B, W = page_table.low_rank.shape
    own = jnp.arange(B, dtype=jnp.int32)
    if B == 1:
        return jnp.zeros((first.shape[0], 1), jnp.int32)
    columns = jnp.arange(W, dtype=jnp.int32)
    reads = adapted[:, None] & (columns < num_pages[:, None])
    low_rank = page_table.low_rank
    same = (low_rank[:, None] == low_rank[None]) & reads[:, None] & reads[None]
    leader = jnp.argmax(same, axis=1).astype(jnp.int32)
    changes = jnp.pad(leader[:, 1:] != leader[:, :-1], ((0, 0), (1, 0)))
    inside = (columns > first[:, None]) & (columns < end[:, None])  # [I, W]
    mixed = jnp.any(changes[None] & inside[:, None], axis=-1)
    return jnp.where(mixed, B + own, leader.T[jnp.minimum(first, W - 1)])


def first_equal(keys: Int32[Array, "I R"], valid: Bool[Array, "I R"]) -> Int32[Array, "I R"]:
    """The first valid slot of the item with the same key; −1 where not valid."""
    same = (keys[:, :, None] == keys[:, None]) & valid[:, None]
    return jnp.where(valid, jnp.argmax(same, axis=-1), -1).astype(jnp.int32)


class Items(NamedTuple):
    """What lanes have of tiles, in order; `exists` where there is such an item."""

    exists: Bool[Array, " I"]
    node: Int32[Array, " I"]
    tile: Int32[Array, " I"]  # of the node
    part: Int32[Array, " I"]  # of the tile
    first: Int32[Array, " I"]  # block of the node
    end: Int32[Array, " I"]
    lane: Int32[Array, " I"]
    parts_of_tile: Int32[Array, " tiles"]  # of all nodes, one after the other
    first_tile: Int32[Array, " n"]  # of every node


def place_of_each(starts: Int32[Array, " n"], counts: Int32[Array, " n"], numbers: int):
    """Of each number below `numbers`: the i with it in [starts[i], starts[i] + counts[i]), and whether there is one."""
    number = jnp.arange(numbers, dtype=jnp.int32)
    index = jnp.sum(number[:, None] >= starts + counts, axis=1, dtype=jnp.int32)
    return jnp.minimum(index, starts.shape[0] - 1), index < starts.shape[0]


def cut(blocks: Int32[Array, " n"], tiles: Int32[Array, " n"], sizes: PlanSizes, B: int, T: int) -> Items:
    """Lanes of one length through the blocks of all tiles, `tiles` of every node and `blocks` in each."""
    first_tile = before(tiles)
    node, exists = place_of_each(first_tile, tiles, sizes.max_tiles(B, T))
    blocks_of_tile = jnp.where(exists, blocks[node], 0)
    start = before(blocks_of_tile)
    length = jnp.maximum(-(-jnp.sum(blocks_of_tile) // sizes.num_lanes), 1)
    first_lane = start // length
    parts_of_tile = jnp.where(blocks_of_tile > 0, (start + blocks_of_tile - 1) // length - first_lane + 1, 0)
    first_item = before(parts_of_tile)
    tile, exists = place_of_each(first_item, parts_of_tile, sizes.max_items(B, T))
    part = jnp.where(exists, jnp.arange(exists.shape[0], dtype=jnp.int32) - first_item[tile], 0)
    lane = first_lane[tile] + part
    return Items(
        exists=exists,
        node=node[tile],
        tile=tile - first_tile[node[tile]],
        part=part,
        first=jnp.maximum(lane * length - start[tile], 0),
        end=jnp.minimum((lane + 1) * length - start[tile], blocks_of_tile[tile]),
        lane=jnp.where(exists, lane, sizes.num_lanes),
        parts_of_tile=parts_of_tile,
        first_tile=first_tile,
    )


@functools.partial(jax.jit, static_argnames=("T", "page_size", "sizes"))
def plan_decode(
    page_table: PageTable, adapter_ids: Int32[Array, " B"] | None, *, T: int, page_size: int, sizes: PlanSizes
) -> DecodePlan:
    """The plan for T queries per row. `page_table.low_rank` and `adapter_ids` may be None: nobody reads then."""
    B, W = page_table.base.shape
    R, D = sizes.rows_per_item, sizes.max_depth(B)
    limits = query_limits(page_table, T)
    num_pages = -(-limits.max(axis=1) // page_size)
    nodes, fits = find_nodes(page_table.base, num_pages, D)
    rows_of_node = node_rows(nodes, limits, page_size)
    if B > 1:
        tiles = -(-rows_of_node.sum(axis=1) // R)
        fits &= tiles.sum() <= sizes.max_tiles(B, T)
        alone = Nodes(
            jnp.zeros((B, D), jnp.int32),
            jnp.zeros((B, D), jnp.int32).at[:, 0].set(num_pages),
            jnp.broadcast_to(jnp.arange(B, dtype=jnp.int32)[:, None], (B, W)),
        )
        nodes = Nodes(*(jnp.where(fits, shared, own) for shared, own in zip(nodes, alone, strict=True)))
        rows_of_node = node_rows(nodes, limits, page_size)
    first, end = nodes.first.reshape(-1), nodes.end.reshape(-1)
    rank = before(rows_of_node.astype(jnp.int32))  # which of its node's rows a row is, [n, M]
    tiles = -(-rows_of_node.sum(axis=1) // R)
    blocks = -(-(end - first) // sizes.pages_per_block)
    items = cut(blocks, tiles, sizes, B, T)
    node, exists = items.node, items.exists
    item_first = jnp.where(exists, first[node] + items.first * sizes.pages_per_block, 0)
    item_end = jnp.where(exists, jnp.minimum(first[node] + items.end * sizes.pages_per_block, end[node]), 0)

    slot = items.tile[:, None] * R + jnp.arange(R, dtype=jnp.int32)  # [I, R]: which of its node's rows
    here = (rows_of_node[node] & exists[:, None])[:, None]
    here &= rank[node][:, None] == slot[..., None]  # [I, R, M]
    all_rows = jnp.arange(B * T, dtype=jnp.int32)
    rows = jnp.max(jnp.where(here, all_rows, -1), axis=-1)
    own_tile = jnp.minimum(items.first_tile[:, None] + rank // R, items.parts_of_tile.shape[0] - 1)
    own_parts = jnp.where(rows_of_node, items.parts_of_tile[own_tile], 0)  # [n, M]
    offset = before(own_parts.T).T[node]  # [I, M]: partial results from the row's earlier nodes
    there, index = rows >= 0, jnp.maximum(rows, 0)
    parts = jnp.where(there, jnp.take_along_axis(offset, index, axis=1) + items.part[:, None], 0)
    readers = expanders = jnp.full_like(rows, -1)
    if page_table.low_rank is not None and adapter_ids is not None:
        keys = low_rank_keys(page_table, adapter_ids != 0, num_pages, item_first, item_end)
        keys, ids = jnp.take_along_axis(keys, index // T, axis=1), adapter_ids[index // T]
        readers = first_equal(keys, there & (ids != 0))
        same_adapter = first_equal(ids, there & (ids != 0))
        expanders = first_equal(keys * R + same_adapter, there & (ids != 0))
    return DecodePlan(
        pages=jnp.stack([item_first, item_end], axis=1),
        rows=rows,
        parts=parts,
        limits=jnp.where(there, limits.reshape(-1)[index], 0),
        readers=readers,
        expanders=expanders,
        num_parts=own_parts.sum(axis=0),
        lanes=jnp.sum(items.lane < jnp.arange(sizes.num_lanes)[:, None, None] + jnp.arange(2)[:, None], axis=-1),
    )
