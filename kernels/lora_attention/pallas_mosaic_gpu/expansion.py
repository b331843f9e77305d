"""Low-rank keys or values added to the base ones, once for all queries of a call: K + RoPE(L B), V + L B.

A prefill's queries are many, and each would have to do it again: P L beside P V is r / 2H of its work, and rebuilding
K on chip, for every tile of queries of every head, took half of attention's time on top. Here every key is read and
written once. What comes out is one layer's, of the rows that a call reads, and gone when attention is done with it; the
cache keeps its low-rank form. Values are rounded to the cache's dtype after L B was added, as those of a cache of the
adapter's own are; P L keeps the two apart.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from lragent_jax.kernels.hopper import interpreter, tiled
from lragent_jax.kernels.lora_attention.arguments import PageTable
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.pages import (
    Block,
    Row,
    cdiv,
    copy_base,
    copy_low_rank,
    copy_ranks,
    padded_rank,
)
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.registers import WGMMA, load
from lragent_jax.kernels.lora_attention.rope import rope_table

KEYS = 64  # at a time: rows of one wgmma
SLOTS = 2  # one block on its way while another is worked on
PROGRAMS = 4 * 132  # about as many as an H100 runs at once: each has its own waits, and others use the time
FLOP_PER_BYTE = 210  # attention's rate over memory's, of an H100


def pays(target: str, T: int, H: int, G: int, rank: int) -> bool:
    """Whether a prefill of T queries per row has keys ("k") or values ("v") of that rank expanded.

    Keys always: its kernel takes no other. Adding L B to a value costs 4 H bytes per kv head; P L costs 2 r FLOP per
    query head and query instead. For 128 lanes, four heads and r = 16 the two take as long at 840 queries.
    """
    return target == "k" or 2 * T * G * padded_rank(rank) >= 4 * H * FLOP_PER_BYTE


class Inputs(NamedTuple):
    """The kernel's arguments, in device memory."""

    base: Any  # [P K, p, 2H]
    low_rank: Any  # [P_lr, r, p]
    b: Any  # [A, r, K H]
    table: Any  # [B, W]
    low_rank_table: Any  # [B, W]
    kv_lens: Any  # [B]
    adapter_ids: Any  # [B]
    rope: Any = None  # [S, H] f16, for keys: cosines of every position in the first half of the lanes, sines behind


class Memory(NamedTuple):
    """Shared memory of a program. R: the rank rounded up to what a wgmma sums over."""

    base: Any  # [SLOTS, 64, H]: what is read, and then what is written
    low_rank: Any  # [SLOTS, R, 64]
    b: Any  # [R, H]
    rope: Any = None  # [SLOTS, 64, H] f16


class Barriers(NamedTuple):
    landed: Any  # [SLOTS]
    b_landed: Any


@dataclasses.dataclass(frozen=True)
class Config:
    """What a kernel is compiled for. target: "k" or "v". programs: of a row's kv head."""

    target: str
    H: int
    K: int
    p: int
    r: int
    num_adapters: int
    dtype: Any
    programs: int

    @property
    def block(self) -> Block:
        return Block(KEYS, self.p)

    @property
    def name(self) -> str:
        return f"lora_expand_{self.target}{self.r}_h{self.H}_p{self.p}"

    def memory(self) -> Memory:
        # Keys are taken by halves of a head, which are rotated into each other.
        swizzle, R = self.H if self.target == "k" else 128, padded_rank(self.r)
        return Memory(
            base=tiled(SLOTS, KEYS, self.H, dtype=self.dtype, swizzle=swizzle),
            low_rank=tiled(SLOTS, R, KEYS, dtype=self.dtype, swizzle=32),
            b=tiled(R, self.H, dtype=self.dtype, swizzle=32),
            rope=tiled(SLOTS, KEYS, self.H, dtype=jnp.float16, swizzle=swizzle) if self.target == "k" else None,
        )

    def barriers(self) -> Barriers:
        copies = self.block.copies + self.block.low_rank_copies(self.r) + (self.target == "k")
        return Barriers(
            plgpu.Barrier(num_arrivals=copies, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=padded_rank(self.r) // 8),
        )


def kernel_body(cfg: Config, inputs: Inputs, expanded, smem: Memory, barriers: Barriers) -> None:
    """Every so many-th block of keys of one row's kv head. expanded: [B K, S, H]."""
    head, first, b = (lax.axis_index(axis) for axis in ("head", "program", "row"))
    adapter = inputs.adapter_ids[b]
    adapter = jnp.where((adapter > 0) & (adapter < cfg.num_adapters), adapter, 0)
    row = Row(inputs.table, b, inputs.kv_lens[b], inputs.low_rank_table, adapter)
    turns = cdiv(jnp.maximum(cdiv(row.kv_len, KEYS) - first, 0), cfg.programs)

    def block_of(turn):
        return first + turn * cfg.programs

    def positions(turn):
        return pl.ds(block_of(turn) * KEYS, KEYS)

    def locate(turn):
        return row.pieces(cfg.block, block_of(turn), inputs.base.shape[0] // cfg.K, inputs.low_rank.shape[0])

    def copy(turn, pieces):
        slot = lax.rem(turn, jnp.int32(SLOTS))
        landed = barriers.landed.at[slot]
        lanes = pl.ds(0 if cfg.target == "k" else cfg.H, cfg.H)
        copy_base(cfg.block, inputs.base, pieces, head, cfg.K, lanes, smem.base.at[slot], landed)
        copy_low_rank(cfg.block, inputs.low_rank, pieces, cfg.r, smem.low_rank.at[slot], landed)
        if cfg.target == "k":
            plgpu.copy_gmem_to_smem(inputs.rope.at[positions(turn)], smem.rope.at[slot], landed)

    @pl.when(turns > 0)
    def _any():
        pieces = locate(jnp.int32(0))
        lanes = pl.ds(head * cfg.H, cfg.H)
        nobody = inputs.b.shape[0]
        copy_ranks(inputs.b, jnp.where(adapter > 0, adapter, nobody), lanes, cfg.r, 8, smem.b, barriers.b_landed)
        copy(jnp.int32(0), pieces)
        plgpu.barrier_wait(barriers.b_landed)

        def expand_block(turn, pieces):
            slot = lax.rem(turn, jnp.int32(SLOTS))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the other slot held is written
            pl.when(turn + 1 < turns)(lambda: copy(turn + 1, pieces))
            pieces = locate(turn + 2)  # a read of device memory, under way while this block is waited for
            plgpu.barrier_wait(barriers.landed.at[slot])
            (add_keys if cfg.target == "k" else add_values)(cfg, slot, smem)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem.base.at[slot], expanded.at[b * cfg.K + head, positions(turn)])
            return pieces

        lax.fori_loop(0, turns, expand_block, locate(jnp.int32(1)))
        plgpu.wait_smem_to_gmem(0)


def add_values(cfg: Config, slot, smem: Memory) -> None:
    """V += L B."""
    (product,) = products(smem.low_rank.at[slot].transpose((1, 0)), [smem.b])
    add(smem.base.at[slot], product)


def add_keys(cfg: Config, slot, smem: Memory) -> None:
    """K += RoPE(L B)."""
    halves = pl.ds(0, cfg.H // 2), pl.ds(cfg.H // 2, cfg.H // 2)
    x, y = products(smem.low_rank.at[slot].transpose((1, 0)), [smem.b.at[:, half] for half in halves])
    cos, sin = (load(smem.rope.at[slot, :, half], WGMMA).astype(jnp.float32) for half in halves)
    add(smem.base.at[slot, :, halves[0]], x * cos - y * sin)
    add(smem.base.at[slot, :, halves[1]], y * cos + x * sin)


def products(a, others):
    """a b for every b, refs in shared memory."""

    def multiply(*accumulators):
        for acc, b in zip(accumulators, others, strict=True):
            plgpu.wgmma(acc, a, b)
        return [acc[...] for acc in accumulators]

    return pl.run_scoped(multiply, *(plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32) for b in others))


def add(ref, x) -> None:
    there = plgpu.layout_cast(ref[...], WGMMA).astype(jnp.float32)
    ref[...] = (there + x).astype(ref.dtype)


def expand(
    lora_b: Float[Array, "A r K H"],
    low_rank: Float[Array, "P_lr r p"],
    base: Float[Array, "P K p 2*H"],
    page_table: PageTable,
    adapter_ids: Int32[Array, " B"],
    *,
    num_positions: int,
    rope_inv_freq: Float[Array, " half"] | None,
    interpret: bool,
) -> Float[Array, "B*K S H"]:
    """Keys, or values for `rope_inv_freq=None`, of all rows, position after position; S = `num_positions`, in 64s.

    A row's last block is filled from its last page, whatever lies there; blocks behind it hold nothing.
    """
    (P, K, p), (A, r, _, H) = base.shape[:3], lora_b.shape
    B = adapter_ids.shape[0]
    programs = min(num_positions // KEYS, -(-PROGRAMS // (B * K)))
    target = "v" if rope_inv_freq is None else "k"
    cfg = Config(target, H, K, p, r, A, base.dtype, programs)
    inputs = Inputs(
        base.reshape(P * K, p, 2 * H), low_rank, lora_b.reshape(A, r, K * H), page_table.base, page_table.low_rank,
        page_table.kv_lens, adapter_ids, rope_table(num_positions, rope_inv_freq),
    )  # fmt: skip
    arrays, as_inputs = jax.tree.flatten(inputs)

    def body(*refs):
        *refs, expanded, smem, barriers = refs
        kernel_body(cfg, jax.tree.unflatten(as_inputs, refs), expanded, smem, barriers)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((B * K, num_positions, H), base.dtype),
        scratch_types=(cfg.memory(), cfg.barriers()),
        grid=(K, programs, B),
        grid_names=("head", "program", "row"),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name=cfg.name,
        **interpreter(interpret),
    )(*arrays)
