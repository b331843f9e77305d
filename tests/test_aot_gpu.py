"""Every kernel for an H100 compiles for one, at the shapes that count, with no H100 there."""

import functools
import math
from typing import Any

import aot
import jax
import jax.numpy as jnp
import pytest

from lragent_jax.kernels.lora_attention import LoraB, LowRank, PageTable, lora_attention
from lragent_jax.kernels.lora_attention.dispatch import IMPLEMENTATIONS

pytestmark = pytest.mark.aot

NAMES = [implementation.name for implementation in IMPLEMENTATIONS if "gpu" in implementation.platforms]
RANKS = {"merged": (0, 0), "values": (16, 0), "keys and values": (16, 16)}
PATHS = {"prefill": (1, 1024), "decode": (8, 1)}


def attention_shapes(path: str, ranks: str, p: int, H: int, dtype=jnp.bfloat16, N: int = 32, K: int = 8) -> tuple:
    """Arguments of `attend`. The pools are far larger than what a kernel may need for itself."""
    (B, T), (r_v, r_k) = PATHS[path], RANKS[ranks]
    A, W = 4, 16_384 // p
    P, P_lr = (2**29 // (slot_bytes * p) for slot_bytes in (K * 2 * H * 2, 16 * 2))  # half a GiB each

    def array(*shape, dtype=dtype) -> Any:
        return None if 0 in shape else jax.ShapeDtypeStruct(shape, dtype)

    ints = functools.partial(array, dtype=jnp.int32)
    low_rank = LowRank(array(P_lr, r_v, p), array(P_lr, r_k, p)) if r_v or r_k else None
    lora_b = LoraB(array(A, r_v, K, H), array(A, r_k, K, H)) if r_v or r_k else None
    table = PageTable(ints(B, W), ints(B, W) if low_rank else None, ints(B), ints(B))
    rope = array(H // 2, dtype=jnp.float32) if r_k else None
    return array(B, T, N, H), array(P, K, p, 2 * H), low_rank, lora_b, table, ints(B) if low_rank else None, rope


def compile_attention(implementation: str, *shape, **keywords) -> tuple[jax.stages.Compiled, tuple]:
    def attend(*args):
        *args, rope_inv_freq = args
        return lora_attention(*args, rope_inv_freq=rope_inv_freq, implementation=implementation)

    shapes = attention_shapes(*shape, **keywords)
    return aot.compile_for(aot.h100(), attend, *shapes), shapes


def check(compiled: jax.stages.Compiled, shapes: tuple, implementation: str) -> None:
    """That the program is of `implementation` and takes the pools as they are."""
    _, base, low_rank, *_ = shapes
    pools = jax.tree.leaves((base, low_rank))
    assert aot.implementations_in(compiled) == {implementation}
    assert aot.copies_of(compiled, *pools) == []
    assert aot.temporaries(compiled) < min(math.prod(pool.shape) * pool.dtype.itemsize for pool in pools)


@pytest.mark.parametrize("H", [64, 128])
@pytest.mark.parametrize("p", [64, 128])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("implementation", NAMES)
def test_compiles_at_the_shapes_of_llama(implementation, path, ranks, p, H):
    compiled, shapes = compile_attention(implementation, path, ranks, p, H)
    check(compiled, shapes, implementation)


def test_a_copied_pool_is_seen():
    shapes = attention_shapes("decode", "values", 64, 128)
    base, low_rank = shapes[1:3]
    copied = aot.compile_for(aot.h100(), lambda base, v: (base.swapaxes(1, 2), v + 0), base, low_rank.v)
    assert len(aot.copies_of(copied, base)) > 0
    with pytest.raises(AssertionError):
        check(copied, shapes, "xla")
