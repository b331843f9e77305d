"""Few rows times weights: what callers call, and the checks on what they pass."""

from collections.abc import Sequence

from jaxtyping import Array

from lragent_jax.kernels.row_matmul.arguments import Norm, Shrink
from lragent_jax.kernels.row_matmul.dispatch import choose, run

DTYPES = ("float32", "bfloat16", "float16")


def row_matmul(
    x: Array,
    weights: Sequence[Array],
    *,
    norm: Norm | None = None,
    keep_normed: bool = False,
    gated: bool = False,
    residual: Array | None = None,
    shrinks: Sequence[Shrink] = (),
    implementation: str | None = None,
) -> tuple[Array, ...]:
    """f(x) W for every W of `weights`, where the weights' bytes are what it takes: each is read once.

    f is RMSNorm where `norm` is given, else nothing. Products are summed in f32 and rounded to x's dtype, and what
    follows takes the rounded numbers and rounds to x's dtype again.

    Args:
      x: [rows, D]; float32, bfloat16 or float16, like everything beside it.
      weights: one or several [D, out], each where it lies; nothing is copied together.
      norm: what x is normalised by. A row that holds NaN or infinity comes out as NaN, the others as they are.
      keep_normed: whether to return f(x), too, behind the products. Needs `norm`.
      gated: the two weights, of one shape, are a gate's and its input's: the only result is silu(x W_0) · (x W_1).
      residual: [rows, out], added to the only result.
      shrinks: A's of adapters that f(x) is multiplied by, too, each row by those of its own groups; no other is read.
      implementation: "pallas_mosaic_gpu" or "xla"; None takes the first that fits.

    Returns:
      [rows, out] per weight (one where `gated`), [rows, D] with `keep_normed`, [tables, rows, r] per shrink.

    Raises:
      ValueError: arguments that contradict each other or these rules.
      NotImplementedError: the implementation that was named does not fit (its reason).
    """
    weights, shrinks = tuple(weights), tuple(shrinks)
    check(x, weights, norm, residual)
    check_shrinks(x, shrinks)
    if keep_normed and norm is None:
        raise ValueError("keep_normed is set and norm is None; there is nothing to keep")
    if gated and (len(weights) != 2 or weights[0].shape != weights[1].shape):
        raise ValueError(f"gated needs two weights of one shape, not {[weight.shape for weight in weights]}")
    if residual is not None and len(weights) > 1 and not gated:
        raise ValueError(f"residual is given with {len(weights)} weights; it can be added to one result only")
    chosen = choose(implementation, x, weights, norm, shrinks)
    return run(
        chosen, x, weights, norm=norm, keep_normed=keep_normed, gated=gated, residual=residual, shrinks=shrinks
    )  # fmt: skip


def check(x: Array, weights: tuple[Array, ...], norm: Norm | None, residual: Array | None) -> None:
    if x.ndim != 2 or 0 in x.shape or x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}{list(x.shape)}; it must be [rows, D], not empty, of {', '.join(DTYPES)}")
    if not weights:
        raise ValueError("weights is empty; pass at least one [D, out]")
    rows, width = x.shape
    for weight in weights:
        if weight.ndim != 2 or weight.shape[0] != width or not weight.shape[1] or weight.dtype != x.dtype:
            raise ValueError(f"a weight is {weight.dtype}{list(weight.shape)}; it must be {x.dtype}[{width}, out]")
    if norm is not None and (norm.scale.shape != (width,) or norm.scale.dtype != x.dtype):
        raise ValueError(f"norm.scale is {norm.scale.dtype}{list(norm.scale.shape)}; it must be {x.dtype}[{width}]")
    shape = (rows, weights[0].shape[1])
    if residual is not None and (residual.shape != shape or residual.dtype != x.dtype):
        raise ValueError(f"residual is {residual.dtype}{list(residual.shape)}; it must be {x.dtype}{list(shape)}")


def check_shrinks(x: Array, shrinks: tuple[Shrink, ...]) -> None:
    rows, width = x.shape
    for lora_a, groups in shrinks:
        if lora_a.ndim != 3 or lora_a.shape[1] != width or lora_a.dtype != x.dtype:
            raise ValueError(f"a lora_a is {lora_a.dtype}{list(lora_a.shape)}; it must be {x.dtype}[g, {width}, r]")
        if groups.ndim != 2 or groups.shape[1] != rows or groups.dtype != "int32":
            raise ValueError(f"groups are {groups.dtype}{list(groups.shape)}; they must be int32[tables, {rows}]")
