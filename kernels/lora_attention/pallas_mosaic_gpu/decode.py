"""Few queries per row against long caches, on Hopper: `stream` splits the keys over the chip, `merge` joins them."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from lragent_jax.kernels.lora_attention.arguments import LoraB, LowRank, PageTable
from lragent_jax.kernels.lora_attention.decode_plan import PlanSizes, plan_decode
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.merge import merge
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.stream import BLOCK_KV, BLOCK_Q, Shapes, stream

LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """num_stages: blocks of keys under way, less where memory is short. programs: items times kv heads at once."""

    num_stages: int = 5
    programs: int = 132

    def __post_init__(self):
        if self.num_stages < 2 or self.programs < 1:
            raise ValueError(f"{self}: num_stages must be at least 2 and programs at least 1")


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
    block_sizes = block_sizes or BlockSizes()
    low_rank, lora_b = low_rank or LowRank(None), lora_b or LoraB(None)
    shapes = Shapes(
        T=T, K=K, G=G, H=H, p=p, R=min(BLOCK_Q // G, B * T),
        r_v=0 if low_rank.v is None else low_rank.v.shape[1],
        r_k=0 if low_rank.k is None else low_rank.k.shape[1],
        readers=min(BLOCK_Q // G, B), stages=block_sizes.num_stages, scale=sm_scale * LOG2_E,
        interpret=interpret,
    ).fitted()  # fmt: skip
    R = shapes.R
    sizes = PlanSizes(
        rows_per_item=R, pages_per_block=max(1, BLOCK_KV // p), programs=block_sizes.programs, heads=K
    )
    plan = plan_decode(page_table, adapter_ids, T=T, page_size=p, sizes=sizes)
    rows = q.reshape(B * T, K, G, H)
    partial = stream(
        rows, base, low_rank, lora_b.k, page_table, adapter_ids, plan,
        rope_inv_freq=rope_inv_freq, shapes=shapes, parts=sizes.max_parts(B, W),
    )  # fmt: skip
    o, lse = merge(
        partial, plan.num_parts, lora_b.v, adapter_ids,
        num_adapters=None if adapter_ids is None else (lora_b.v if lora_b.k is None else lora_b.k).shape[0],
        H=H, dtype=q.dtype, return_lse=return_lse, interpret=interpret,
    )  # fmt: skip
    o = o.reshape(q.shape)
    return o if lse is None else (o, lse.reshape(B, T, N))
