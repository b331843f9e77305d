"""Attention for NVIDIA Hopper: Pallas Mosaic GPU, one kernel for many queries and a pair of them for few.

Many have what adapters add expanded by another kernel before, once for all of them.
"""

import jax
from jaxtyping import Array, Float, Int32

from lragent_jax.kernels.hopper import refuse_other_gpus
from lragent_jax.kernels.interpret import is_interpreted
from lragent_jax.kernels.lora_attention.arguments import LoraB, LowRank, PageTable
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu import decode as decode_kernels
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu import prefill as prefill_kernel

# Traced and lowered once for all layers of a model.
attend_many = jax.jit(prefill_kernel.prefill, static_argnames=("sm_scale", "return_lse", "block_sizes", "interpret"))

MAX_DECODE_ROWS = 256  # (row, token) pairs, and query rows per kv head and sequence, that go through `decode`


def decodes(B: int, T: int, G: int) -> bool:
    """Whether so few queries come that the keys, and not the queries, are to be divided among the processors."""
    return T * G <= MAX_DECODE_ROWS and B * T <= MAX_DECODE_ROWS


def refuse(q: Array, base: Array, low_rank: LowRank | None) -> None:
    """Raises NotImplementedError for what the kernels were not written for."""
    p, H = base.shape[2], q.shape[3]
    r_v, r_k = (0 if pool is None else pool.shape[1] for pool in low_rank or LowRank(None))
    if q.dtype not in ("bfloat16", "float16"):
        raise NotImplementedError(f"dtype {q.dtype}: the matrix unit takes bfloat16 and float16")
    if H not in (64, 128):
        raise NotImplementedError(f"head dim {H}: it is written for 64 and 128")
    if p < 16 or (64 % p and p % 64):
        raise NotImplementedError(f"page size {p}: pages of 16, 32 or a multiple of 64 slots fill its blocks")
    if r_v % 8 or r_v > 64:
        raise NotImplementedError(f"rank {r_v} of values: a multiple of 8 up to 64 fits its tiles")
    if r_k % 16 or r_k > 64:
        raise NotImplementedError(f"rank {r_k} of keys: a multiple of 16 up to 64 fits its tiles")
    refuse_other_gpus()


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
    block_sizes: decode_kernels.BlockSizes | prefill_kernel.BlockSizes | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """See `api.lora_attention`. Block sizes of either kernel choose it; without any, the number of queries does."""
    refuse(q, base, low_rank)
    B, T, N, _ = q.shape
    if block_sizes is None:
        few = decodes(B, T, N // base.shape[1])
    else:
        few = isinstance(block_sizes, decode_kernels.BlockSizes)
    attend = decode_kernels.decode if few else attend_many
    return attend(
        q, base, low_rank, lora_b, page_table, adapter_ids, rope_inv_freq=rope_inv_freq, sm_scale=sm_scale,
        return_lse=return_lse, block_sizes=block_sizes, interpret=is_interpreted(),
    )  # fmt: skip
