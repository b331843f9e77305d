"""Attention for TPUs (v5e and newer): Pallas Mosaic. Pages come by double-buffered DMA, all kv heads at once.

Page tables, lengths and ids are scalars in SMEM; pools stay in HBM, in layouts that XLA takes as they are. Rows of one
query go through `decode`, others through `prefill`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from lragent_jax.kernels.interpret import is_interpreted
from lragent_jax.kernels.lora_attention.arguments import LoraB, LowRank, PageTable
from lragent_jax.kernels.lora_attention.pallas_mosaic_tpu.block_sizes import LANES, BlockSizes, heuristic
from lragent_jax.kernels.lora_attention.pallas_mosaic_tpu.decode import decode
from lragent_jax.kernels.lora_attention.pallas_mosaic_tpu.prefill import prefill


def lora_attention(
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
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """See `api.lora_attention`; `block_sizes=None` asks the heuristic."""
    B, T, N, H = q.shape
    K = base.shape[1]
    low_rank, lora_b = low_rank or LowRank(None), lora_b or LoraB(None)
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"dtype {q.dtype}; it takes float32 and bfloat16")
    if not is_interpreted():
        check_layouts(q, base, low_rank)
    run = decode if T == 1 else prefill
    return run(
        *(q, base, low_rank, lora_b, page_table, adapter_ids),
        rope_inv_freq=rope_inv_freq,
        sm_scale=sm_scale,
        return_lse=return_lse,
        block_sizes=block_sizes or heuristic(B, T, K, N // K, H, q.dtype.itemsize),
        interpret=is_interpreted(),
    )


def check_layouts(q: Array, base: Array, low_rank: LowRank) -> None:
    """Refuses what a TPU would pad in memory or could not cut: whole tiles of 8 x 128."""
    H, p = q.shape[3], base.shape[2]
    if H != LANES // 2 and H % LANES:
        raise NotImplementedError(f"head dim {H}; it takes {LANES // 2} and multiples of {LANES}")
    if p % LANES:
        raise NotImplementedError(f"page size {p}; it takes multiples of {LANES}")
    for pool in low_rank:
        if pool is not None and pool.shape[1] % 8:
            raise NotImplementedError(f"rank {pool.shape[1]}; it takes multiples of 8")
