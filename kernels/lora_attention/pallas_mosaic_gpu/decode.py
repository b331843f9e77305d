"""Few queries per row against long caches, on Hopper: `stream` splits the keys over the chip, `merge` joins them."""

import dataclasses
import functools
import math

import jax
from jaxtyping import Array, Float, Int32

from lragent_jax.kernels.lora_attention.arguments import LoraB, LowRank, PageTable
from lragent_jax.kernels.lora_attention.decode_plan import PlanSizes, plan_decode
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.merge import merge
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.stream import stream
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.stream_shapes import BLOCK_KV, BLOCK_Q, Shapes
from lragent_jax.kernels.lora_attention.rope import rope_table
from lragent_jax.kernels.lora_attention.tuned import tuned_block_sizes

LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """num_stages: blocks of keys under way, less where memory is short. compute: warpgroups that compute, 1 or 2.

    programs: lanes times kv heads, that run at once, one per processor.
    """

    num_stages: int
    compute: int
    programs: int = 132

    def __post_init__(self):
        if self.num_stages < 2 or self.compute not in (1, 2) or self.programs < 1:
            raise ValueError(f"{self}: num_stages must be at least 2, compute 1 or 2, programs at least 1")


def heuristic(r_k: int, *, is_batch: bool) -> BlockSizes:
    """With low-rank keys of rank r_k: rebuilding them takes two warpgroups, and else one keeps up with the memory.

    For one row more stages gained nothing. A program of several rows goes on from item to item, with more under way.
    """
    if r_k:
        return BlockSizes(num_stages=3, compute=2)
    return BlockSizes(num_stages=4 if is_batch else 2, compute=1)


@functools.partial(jax.jit, static_argnames=("sm_scale", "return_lse", "block_sizes", "interpret"))
def decode(
    q: Float[Array, "B T N H"],
    base: Float[Array, "P K p 2*H"],
    low_rank: LowRank | None,
    lora_b: LoraB | None,
    page_table: PageTable,
    adapter_ids: Int32[Array, " B"] | None,
    *,
    rope_inv_freq: Float[Array, " H//2"] | None,
    sm_scale: float,
    return_lse: bool,
    block_sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """See `api.lora_attention`. Tokens of a row are rows of the plan: they share its pages like any others."""
    B, T, N, H = q.shape
    K, p = base.shape[1:3]
    W, G = page_table.base.shape[1], N // K
    low_rank, lora_b = low_rank or LowRank(None), lora_b or LoraB(None)
    r_v, r_k = (0 if pool is None else pool.shape[1] for pool in low_rank)
    if r_k and p < BLOCK_KV:
        raise NotImplementedError(f"page size {p} with low-rank keys: {BLOCK_KV} of one page are rebuilt at a time")
    block_sizes = (
        block_sizes
        or tuned_block_sizes("pallas_mosaic_gpu", "decode", BlockSizes, q, base, low_rank)
        or heuristic(r_k, is_batch=B > 1)
    )
    shapes = Shapes(
        B=B, T=T, K=K, G=G, H=H, p=p, R=min(BLOCK_Q // G, B * T),
        r_v=r_v, r_k=r_k, readers=min(BLOCK_Q // G, B),
        stages=block_sizes.num_stages, compute=block_sizes.compute, scale=sm_scale * LOG2_E,
        interpret=interpret,
    ).fitted()  # fmt: skip
    R = shapes.R
    sizes = PlanSizes(rows_per_item=R, pages_per_block=max(1, BLOCK_KV // p), programs=block_sizes.programs, heads=K)
    plan = plan_decode(page_table, adapter_ids, T=T, page_size=p, sizes=sizes)
    rows = q.reshape(B * T, K, G, H)
    partial = stream(
        rows, base, low_rank, lora_b.k, page_table, adapter_ids, plan,
        rope=rope_table(-(-W * p // BLOCK_KV) * BLOCK_KV, rope_inv_freq) if r_k else None,
        shapes=shapes, parts=sizes.max_parts(B, W),
    )  # fmt: skip
    o, lse = merge(
        partial, plan.num_parts, lora_b.v, adapter_ids,
        num_adapters=None if adapter_ids is None else (lora_b.v if lora_b.k is None else lora_b.k).shape[0],
        H=H, dtype=q.dtype, return_lse=return_lse, interpret=interpret,
    )  # fmt: skip
    o = o.reshape(q.shape)
    return o if lse is None else (o, lse.reshape(B, T, N))
