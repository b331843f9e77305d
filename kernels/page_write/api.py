"""RoPE and the page write as one operation: what callers call, the checks on it, and who does it."""

import importlib
from typing import Any

from jaxtyping import Array, Float

from lragent_jax.kernels.page_write.arguments import Expansion, LowRank, Pools, Projections, Rotation, Slots

IMPLEMENTATIONS = ("pallas_mosaic_gpu", "xla")
ON_GPUS = ("pallas_mosaic_gpu", "xla")
"""Those that are tried on GPUs, in order of preference."""


def rotate_and_write(
    projections: Projections,
    rotation: Rotation,
    low_rank: LowRank,
    slots: Slots,
    pools: Pools,
    *,
    implementations: tuple[str, ...] = ("xla",),
) -> tuple[Float[Array, "B T N H"], Pools]:
    """RoPE(q + q_delta), and the pools with the tokens in them: RoPE(k) | v, and the low-rank numbers.

    The pools come back in the same memory where the caller gives them away. A token whose slot is −1 is not written:
    whatever its numbers are, NaN included, no page holds them afterwards. No slot may be given to two tokens, and
    those outside of their pool write nothing. Without k and v the base pool stays as it is.

    Args:
      implementations: the first of these that can do it does: "pallas_mosaic_gpu" (Hopper), "xla".

    Raises:
      ValueError: arguments that contradict each other, an implementation that does not exist.
      NotImplementedError: none of `implementations` can; the reason of each.
    """
    check(projections, low_rank, slots, pools)
    return of_the_first("rotate_and_write", implementations, projections, rotation, low_rank, slots, pools)


def expands(
    projections: Projections, low_rank: LowRank, pools: Pools, rank: int, *, implementations: tuple[str, ...] = ("xla",)
) -> bool:
    """Whether `q_delta` had better be an `Expansion` of that rank: what would run makes it, and faster than XLA.

    Args:
      projections, low_rank, pools: those of one call of `rotate_and_write`, on one device, without a `q_delta`; or
        their shapes and dtypes.
    """
    return of_the_first("expands", implementations, projections, low_rank, pools, rank)


def of_the_first(function: str, implementations: tuple[str, ...], *args) -> Any:
    """What `function` of the first of `implementations` returns that does not raise NotImplementedError."""
    reasons = []
    for name in implementations:
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"no implementation of the page write is called {name!r}; there are {IMPLEMENTATIONS}")
        module = importlib.import_module(f"{__package__}.{name}")
        try:
            return getattr(module, function)(*args)
        except NotImplementedError as reason:
            reasons.append(f"{name}: {reason}")
    raise NotImplementedError(f"no implementation of the page write fits: {'; '.join(reasons) or 'none was named'}")


def check(projections: Projections, low_rank: LowRank, slots: Slots, pools: Pools) -> None:
    q, k, v, q_delta = projections
    if (k is None) != (v is None):
        raise ValueError("of k and v only one is given; pass both, or neither where base pages are not written")
    heads = (*q.shape[:2], pools.kv.shape[1], q.shape[3])
    if k is not None and v is not None and not k.shape == v.shape == heads:
        raise ValueError(f"k and v have shapes {k.shape} and {v.shape}; beside q and the pool both must be {heads}")
    if isinstance(q_delta, Expansion):
        low, b, ids = (x.shape for x in q_delta)
        if low[:2] != q.shape[:2] or b[1:] != (low[2], *q.shape[2:]) or ids != q.shape[:1]:
            raise ValueError(
                f"q_delta has low-rank numbers of shape {low}, B's of {b} and ids of {ids}; beside q of {q.shape} they "
                "must be [B, T, r], [A, r, N, H] and [B]"
            )
    if pools.kv.shape[3] != 2 * q.shape[3]:
        raise ValueError(f"the pool has shape {pools.kv.shape}; its slots must hold K and V of {q.shape[3]} lanes each")
    for target, new, pool in zip(("v", "k"), low_rank, (pools.low_rank_v, pools.low_rank_k), strict=True):
        if new is None:
            continue
        if pool is None or slots.low_rank is None:
            raise ValueError(f"low_rank.{target} is given without {'a pool' if pool is None else 'slots'} for it")
        if new.shape != (*slots.low_rank.shape, pool.shape[1]):
            raise ValueError(
                f"low_rank.{target} has shape {new.shape}; beside slots of shape {slots.low_rank.shape} and a pool of "
                f"rank {pool.shape[1]} it must be {(*slots.low_rank.shape, pool.shape[1])}"
            )
