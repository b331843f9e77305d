"""Flash-LoRA-Attention through Pallas' Triton backend: NVIDIA Ampere and newer.

Upstream deprecates the backend (from JAX 0.11), so nothing depends on this folder.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from lragent_jax.kernels.interpret import is_interpreted
from lragent_jax.kernels.lora_attention.arguments import LoraB, LowRank, PageTable
from lragent_jax.kernels.lora_attention.expanded_rows import in_turn
from lragent_jax.kernels.lora_attention.pallas_triton import expansion
from lragent_jax.kernels.lora_attention.pallas_triton.block_sizes import (
    BlockSizes,
    DecodeBlockSizes,
    PrefillBlockSizes,
    heuristic,
    shared_memory,
)
from lragent_jax.kernels.lora_attention.pallas_triton.decode import decode
from lragent_jax.kernels.lora_attention.pallas_triton.prefill import prefill
from lragent_jax.kernels.lora_attention.pallas_triton.stream import Operands
from lragent_jax.kernels.lora_attention.tuned import tuned_block_sizes

__all__ = ["BlockSizes", "DecodeBlockSizes", "PrefillBlockSizes", "heuristic", "lora_attention", "shared_memory"]

# JAX warns whenever a kernel of this backend is lowered, which a caller's `jit` may do long after our return.
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)


def turns_of(inv_freq: Float[Array, " h"], size: int, dtype) -> Float[Array, "2 S h"]:
    """For 16-bit keys in f16, whose 11 bits outdo them between −1 and 1: a program holds its table in registers."""
    angles = jnp.arange(size, dtype=jnp.float32)[:, None] * inv_freq
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)]).astype(jnp.float32 if dtype == jnp.float32 else jnp.float16)


expand = jax.jit(expansion.expand, static_argnames="interpret")


@functools.partial(jax.jit, static_argnames=("sizes", "sm_scale", "return_lse", "interpret"))
def run(x: Operands, *, sizes: BlockSizes, sm_scale: float, return_lse: bool, interpret: bool):
    way = prefill if isinstance(sizes, PrefillBlockSizes) else decode
    o, lse = way(x, sizes, sm_scale, return_lse, interpret)
    return (o, lse) if return_lse else o


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
    """See `api.lora_attention`; `block_sizes=None` asks what was measured, then the heuristic.

    The heuristic, or the type of the given block sizes, says which way to go.
    """
    (B, T, N, H), (_, K, p, _) = q.shape, base.shape
    r_v, r_k = (0 if pool is None else pool.shape[1] for pool in low_rank or (None, None))
    if p & (p - 1):
        raise NotImplementedError(f"pages of {p} slots: the page size must be a power of two")
    if H > 256 or max(r_v, r_k) > 128:
        raise NotImplementedError(f"head dim {H}, ranks {r_v} and {r_k}: at most 256 and 128 fit a program")
    if not isinstance(block_sizes, DecodeBlockSizes) and expansion.pays(T, H, N // K, r_v, r_k):
        return attend_expanded(
            q, base, low_rank, lora_b, page_table, adapter_ids, rope_inv_freq=rope_inv_freq, sm_scale=sm_scale,
            return_lse=return_lse, block_sizes=block_sizes,
        )  # fmt: skip
    sizes = block_sizes
    if sizes is None:
        sizes = heuristic(B, T, N // K, H, p, r_v, r_k, q.dtype.itemsize, shared_memory())
        path = "prefill" if isinstance(sizes, PrefillBlockSizes) else "decode"
        sizes = tuned_block_sizes("pallas_triton", path, type(sizes), q, base, low_rank) or sizes
    x = operands(q, base, low_rank, lora_b, page_table, adapter_ids, rope_inv_freq, sizes.block_kv)
    return run(x, sizes=sizes, sm_scale=sm_scale, return_lse=return_lse, interpret=is_interpreted())


def operands(q, base, low_rank, lora_b, page_table, adapter_ids, rope_inv_freq, block_kv: int) -> Operands:
    turns = None if rope_inv_freq is None else turns_of(rope_inv_freq, block_kv, q.dtype)
    return Operands(q, base, low_rank, lora_b, page_table, adapter_ids, rope_inv_freq, turns)


def attend_expanded(q, base, low_rank, lora_b, page_table, adapter_ids, *, rope_inv_freq, **keywords):
    """The same where low-rank keys and values are expanded before: plain attention, over pages of its own."""
    K, p, W = base.shape[1], base.shape[2], page_table.base.shape[1]

    def attend(q, page_table, adapter_ids):
        x = operands(q, base, low_rank, lora_b, page_table, adapter_ids, rope_inv_freq, expansion.BLOCK_KV)
        own = jnp.arange(adapter_ids.shape[0] * W, dtype=jnp.int32).reshape(-1, W)
        expanded, table = expand(x, interpret=is_interpreted()), page_table._replace(base=own, low_rank=None)
        return lora_attention(q, expanded, None, None, table, None, rope_inv_freq=None, **keywords)

    row_bytes = W * p * K * base.shape[3] * base.dtype.itemsize
    return in_turn(attend, row_bytes, q, page_table, adapter_ids)
