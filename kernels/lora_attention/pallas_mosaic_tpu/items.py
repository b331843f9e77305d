"""What the programs of a grid read and whose queries they hold, as scalars in SMEM."""

from typing import NamedTuple

from jaxtyping import Array, Int32


class Items(NamedTuple):
    """I items of R slots each; per-slot arrays are flat, item-major (SMEM pads rows of two-dimensional ones)."""

    first: Int32[Array, " I"]  # columns [first, end) of the page table
    end: Int32[Array, " I"]
    base_rows: Int32[Array, " I"]  # the row of the base table
    seen_by_all: Int32[Array, " I"]  # every query that is no padding sees the keys before this one
    seen_by_any: Int32[Array, " I"]  # no query sees a key from this one on
    any_reader: Int32[Array, " I"]  # whether a slot has low-rank pages
    q_starts: Int32[Array, " I*R"]  # position of the slot's first query
    kv_lens: Int32[Array, " I*R"]
    readers: Int32[Array, " I*R"]  # see decode_plan.DecodePlan
    reader_ends: Int32[Array, " I*R"]  # of a first reader: no query that reads its pages sees a key from this one on
    expanders: Int32[Array, " I*R"]
    low_rank_rows: Int32[Array, " I*R"]  # the row of the low-rank table
    adapter_ids: Int32[Array, " I*R"]  # as given: they need not exist
