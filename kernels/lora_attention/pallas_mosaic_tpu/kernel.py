"""The program that both paths run: one tile of queries, all kv heads, against the pages that it reads.

An *item* is a range of columns of one row's page table and the queries that read it. They lie in slots: in prefill one
slot of many tokens, in decode one slot per batch row, of one token. Base pages are streamed once for all slots,
low-rank pages once per slot that is the first to read them. Blocks of pages come by DMA into one half of a buffer while
the other half is worked on; nothing else touches the pools.

H = 64: K and V of a slot share its 128 lanes. q is zero in V's lanes, so that whole rows are multiplied, and the
result is taken from V's lanes: lanes are never cut.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lragent_jax.kernels.lora_attention.pallas_mosaic_tpu.block_sizes import LANES
from lragent_jax.kernels.lora_attention.pallas_mosaic_tpu.items import Items
from lragent_jax.kernels.lora_attention.pallas_mosaic_tpu.layouts import lanes

# The score of a key that a query does not see; see xla.UNSEEN.
UNSEEN = -1e30
LOG2_E = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class Config:
    """What a program is compiled for.

    n: pages per block, of which m are worked on at a time; m divides n. R: slots per item; tokens: of a slot, a power
    of two. groups: how many groups of query rows a kv head has, in `q` [1, K, groups, rows, width]; rows: of a group,
    in the order (query head, slot, token), then padding.
    """

    K: int
    H: int
    p: int
    n: int
    m: int
    R: int
    tokens: int
    r_v: int
    r_k: int
    groups: int
    rows: int
    W: int
    sm_scale: float
    dtype: jnp.dtype

    @property
    def width(self) -> int:
        """Lanes of a query and of a result."""
        return lanes(self.H)

    @property
    def block(self) -> int:
        """Keys per block."""
        return self.n * self.p

    @property
    def step(self) -> int:
        """Keys that are worked on at a time."""
        return self.m * self.p

    @property
    def units(self) -> int:
        """Groups of query rows, of all kv heads."""
        return self.K * self.groups

    @property
    def units_at_once(self) -> int:
        """Units whose probabilities meet the low-rank values in one product: enough to fill the matrix unit."""
        units = min(self.units, max(1, LANES // self.rows))
        while self.units % units:
            units -= 1
        return units

    def scratch_shapes(self) -> dict:
        def f32(*shape):
            return pltpu.VMEM(shape, jnp.float32)

        K, n, R, p = self.K, self.n, self.R, self.p
        return {
            "base": pltpu.VMEM((2, n, K, p, 2 * self.H), self.dtype),
            "low_rank_v": pltpu.VMEM((2, n, R, self.r_v, p), self.dtype) if self.r_v else None,
            "low_rank_k": pltpu.VMEM((2, n, R, self.r_k, p), self.dtype) if self.r_k else None,
            "b_k": pltpu.VMEM((R, K, self.r_k, self.H), self.dtype) if self.r_k else None,
            "cos": f32(self.H // 2, self.step) if self.r_k else None,
            "sin": f32(self.H // 2, self.step) if self.r_k else None,
            "keys": pltpu.VMEM((self.width, self.step), self.dtype) if self.r_k else None,
            "scores": f32(self.rows, self.step) if self.r_k else None,
            "o": f32(self.units, self.rows, self.width),
            "o_lr": f32(self.units, self.rows, R * self.r_v) if self.r_v else None,
            "m": f32(self.units, self.rows, LANES),
            "l": f32(self.units, self.rows, LANES),
            "semaphores": pltpu.SemaphoreType.DMA((2, 3)),
        }


def matmul(a, b, contract=((1,), (0,))):
    """a b in f32; f32 operands are not rounded."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


TRANSPOSED = ((1,), (1,))  # a bᵀ


class Item:
    """One item's scalars, buffers and arithmetic, while a program is traced."""

    def __init__(self, config: Config, i, items: Items, tables, q, inv_freq, pools, scratch: dict):
        self.c, self.i, self.items, self.q, self.inv_freq = config, i, items, q, inv_freq
        self.base_table, self.low_rank_table = tables
        self.base_pool, self.v_pool, self.k_pool = pools
        self.s = scratch
        self.first, self.end = items.first[i], items.end[i]

    def slot_scalar(self, ref, slot):
        return ref[self.i * self.c.R + slot]

    def per_row(self, ref, missing=0):
        """A slot's scalar for each query row, i32 [rows, 1]."""
        slot, out = self.slot_of_row(), jnp.full((self.c.rows, 1), missing, jnp.int32)
        for s in range(self.c.R):
            out = jnp.where(slot == s, self.slot_scalar(ref, s), out)
        return out

    def token_of_row(self):
        row = lax.broadcasted_iota(jnp.int32, (self.c.rows, 1), 0)
        return row & (self.c.R * self.c.tokens - 1)

    def slot_of_row(self):
        return self.token_of_row() >> (self.c.tokens.bit_length() - 1)

    def limits(self):
        """Keys that each query row sees, i32 [rows, 1]; 0 for padding."""
        position = self.per_row(self.items.q_starts) + (self.token_of_row() & (self.c.tokens - 1))
        return jnp.where((position >= 0) & (position < self.per_row(self.items.kv_lens)), position + 1, 0)

    # Reading pages.

    def for_pages(self, block, do):
        """Calls do(t, column) for the block's pages that there are."""
        for t in range(self.c.n):
            column = self.first + block * self.c.n + t
            pl.when(column < self.end)(functools.partial(do, t, column))

    def for_slots(self, firsts, do):
        """Calls do(slot) for the slots that are the first with what they read."""

        def one(slot, _):
            pl.when(self.slot_scalar(firsts, slot) == slot)(lambda: do(slot))
            return 0

        if self.c.R == 1:
            one(0, 0)
        else:
            lax.fori_loop(0, self.c.R, one, 0)

    def copies(self, block, start: bool):
        """Starts the DMAs of a block, or waits for them."""
        half = block % 2

        def run(pool, page, buffer, which):
            copy = pltpu.make_async_copy(pool.at[page], buffer, self.s["semaphores"].at[half, which])
            if start:
                copy.start()
            else:
                copy.wait()

        def base(t, column):
            page = self.base_table[self.items.base_rows[self.i] * self.c.W + column]
            run(self.base_pool, page, self.s["base"].at[half, t], 0)

        def low_rank(t, column, slot):
            page = self.low_rank_table[self.slot_scalar(self.items.low_rank_rows, slot) * self.c.W + column]
            if self.v_pool is not None:
                run(self.v_pool, page, self.s["low_rank_v"].at[half, t, slot], 1)
            if self.k_pool is not None:
                run(self.k_pool, page, self.s["low_rank_k"].at[half, t, slot], 2)

        self.for_pages(block, base)
        if self.v_pool is not None or self.k_pool is not None:
            self.for_slots(
                self.items.readers,
                lambda slot: self.for_pages(block, lambda t, column: low_rank(t, column, slot)),
            )

    def read_b_k(self, b_k_pool):
        """B of the low-rank keys, for every slot that expands some."""

        def copy(slot):
            page = jnp.clip(self.slot_scalar(self.items.adapter_ids, slot), 0, b_k_pool.shape[0] - 1)
            return pltpu.make_async_copy(b_k_pool.at[page], self.s["b_k"].at[slot], self.s["semaphores"].at[0, 2])

        self.for_slots(self.items.expanders, lambda slot: copy(slot).start())
        self.for_slots(self.items.expanders, lambda slot: copy(slot).wait())

    # Working on them.

    def attend(self):
        """The online softmax over all of the item's pages; leaves o, o_lr, m and l in scratch."""
        s = self.s
        for name in ("o", "o_lr", "l"):
            if s[name] is not None:
                s[name][...] = jnp.zeros(s[name].shape, jnp.float32)
        s["m"][...] = jnp.full(s["m"].shape, UNSEEN, jnp.float32)
        num_blocks = pl.cdiv(self.end - self.first, self.c.n)
        seen_by_all = self.items.seen_by_all[self.i] - self.first * self.c.p
        num_full = jnp.clip(seen_by_all // self.c.block, 0, num_blocks)
        limits = self.limits()

        pl.when(num_blocks > 0)(lambda: self.copies(0, start=True))

        def turn(block, _, masked: bool):
            pl.when(block + 1 < num_blocks)(lambda: self.copies(block + 1, start=True))
            self.copies(block, start=False)
            self.attend_block(block, limits if masked else None)
            return 0

        lax.fori_loop(0, num_full, functools.partial(turn, masked=False), 0)
        lax.fori_loop(num_full, num_blocks, functools.partial(turn, masked=True), 0)

    def attend_block(self, block, limits):
        """One block of keys; `limits` is None where every query sees every key of it."""
        c = self.c
        first_page = self.first + block * c.n
        if c.n == c.m:
            self.attend_step(block % 2, 0, first_page * c.p, limits)
            return

        def step(i, _):
            self.attend_step(block % 2, i * c.m, (first_page + i * c.m) * c.p, limits)
            return 0

        lax.fori_loop(0, jnp.minimum(pl.cdiv(self.end - first_page, c.m), c.n // c.m), step, 0)

    def attend_step(self, half, first_page, first_key, limits):
        """The m pages of a block from `first_page` on, whose first key has the position `first_key`."""
        c = self.c
        pages = pl.ds(first_page, c.m)
        together = c.units_at_once
        if c.r_k:
            self.rotate_step(first_key)

        def units(turn, _):
            first = turn * together
            parts = [self.attend_unit(first + j, half, pages, first_key, limits) for j in range(together)]
            if c.r_v:
                probs, rescales = zip(*parts, strict=True)
                self.add_low_rank(first, probs, rescales, half, pages, first_key, limits is not None)
            return 0

        if together == c.units:
            units(0, 0)
        else:
            lax.fori_loop(0, c.units // together, units, 0)

    def attend_unit(self, unit, half, pages, first_key, limits):
        """Adds keys to o, m and l of a unit. Returns the probabilities and what older sums were scaled with."""
        c, s, h = self.c, self.s, unit // self.c.groups
        if c.r_k:  # before anything is loaded: branches between loads and their use bring the compiler for v6e down
            self.low_rank_scores(unit, half, pages)
        kv = s["base"][half, pages, h].reshape(c.step, 2 * c.H)
        k = kv if c.H < LANES else kv[:, : c.H]
        scores = matmul(self.query(unit), k, TRANSPOSED)
        if c.r_k:
            scores += s["scores"][...]
        scores *= c.sm_scale * LOG2_E
        if limits is not None:
            keys = first_key + lax.broadcasted_iota(jnp.int32, (c.rows, c.step), 1)
            scores = jnp.where(keys < limits, scores, UNSEEN)
        m = s["m"][unit][:, :1]
        new_m = jnp.maximum(m, jnp.max(scores, axis=1, keepdims=True))
        rescale, probs = jnp.exp2(m - new_m), jnp.exp2(scores - new_m)
        new_l = s["l"][unit][:, :1] * rescale + jnp.sum(probs, axis=1, keepdims=True)
        s["m"][unit] = jnp.broadcast_to(new_m, (c.rows, LANES))
        s["l"][unit] = jnp.broadcast_to(new_l, (c.rows, LANES))
        probs = probs.astype(c.dtype)
        v = kv if c.H < LANES else kv[:, c.H :]
        if limits is not None:  # what nobody wrote may be NaN, and 0 · NaN is NaN
            keys = first_key + lax.broadcasted_iota(jnp.int32, (c.step, 1), 0)
            v = jnp.where(keys < self.items.seen_by_any[self.i], v, jnp.zeros_like(v))
        s["o"][unit] = s["o"][unit] * rescale + matmul(probs, v)
        return probs, rescale

    def query(self, unit):
        """[rows, width]"""
        return self.q[0, unit // self.c.groups, unit % self.c.groups]

    def add_low_rank(self, first, probs, rescales, half, pages, first_key, masked: bool):
        """Adds P Lᵀ of some units to o_lr, side by side for the slots that read pages of their own."""
        c, s = self.c, self.s

        def seen(page, slot, t):
            keys = first_key + t * c.p + lax.broadcasted_iota(jnp.int32, (1, c.p), 1)
            return jnp.where(keys < self.slot_scalar(self.items.reader_ends, slot), page, jnp.zeros_like(page))

        def add():
            tiles = s["low_rank_v"][half, pages]  # [m, R, r_v, p]
            by_page = []
            for t in range(c.m):
                slots = [seen(tiles[t, slot], slot, t) if masked else tiles[t, slot] for slot in range(c.R)]
                by_page.append(jnp.concatenate(slots, axis=0))
            low_rank = jnp.concatenate(by_page, axis=1)  # [R r_v, step]
            new = matmul(jnp.concatenate(probs, axis=0), low_rank, TRANSPOSED)
            for j, rescale in enumerate(rescales):
                s["o_lr"][first + j] = s["o_lr"][first + j] * rescale + new[j * c.rows : (j + 1) * c.rows]

        pl.when(self.items.any_reader[self.i] > 0)(add)

    def rotate_step(self, first_key):
        """Leaves cos and sin of the positions in scratch, [H/2, step] each."""
        keys = first_key + lax.broadcasted_iota(jnp.int32, (self.c.H // 2, self.c.step), 1)
        angles = keys.astype(jnp.float32) * self.inv_freq[:, :1]
        self.s["cos"][...], self.s["sin"][...] = jnp.cos(angles), jnp.sin(angles)

    def low_rank_scores(self, unit, half, pages):
        """Leaves q RoPE(L B)ᵀ in scratch: per slot that expands keys, for its rows and those that read the same."""
        c, s, h = self.c, self.s, unit // self.c.groups
        s["scores"][...] = jnp.zeros(s["scores"].shape, jnp.float32)

        def add(slot):
            if c.R == 1 and c.groups > 1:  # the groups of a kv head follow each other
                pl.when(unit % c.groups == 0)(lambda: self.expand_keys(slot, h, half, pages))
            else:
                self.expand_keys(slot, h, half, pages)
            own = self.per_row(self.items.expanders, missing=-1) == slot
            s["scores"][...] += jnp.where(own, matmul(self.query(unit), s["keys"][...]), 0.0)

        self.for_slots(self.items.expanders, add)

    def expand_keys(self, slot, h, half, pages):
        """Leaves RoPE(L B)ᵀ in scratch. Tokens lie on the lanes, as in the low-rank pages: Bᵀ L is [H, step]."""
        c, s = self.c, self.s
        tiles = s["low_rank_k"][half, pages, jnp.maximum(self.slot_scalar(self.items.readers, slot), 0)]
        low_rank = jnp.concatenate([tiles[t] for t in range(c.m)], axis=1)
        expanded = matmul(s["b_k"][slot, h], low_rank, ((0,), (0,)))
        low, high, cos, sin = expanded[: c.H // 2], expanded[c.H // 2 :], s["cos"][...], s["sin"][...]
        parts = [low * cos - high * sin, high * cos + low * sin]
        if c.width > c.H:
            parts.append(jnp.zeros((c.width - c.H, c.step), jnp.float32))
        s["keys"][...] = jnp.concatenate(parts, axis=0).astype(c.dtype)
