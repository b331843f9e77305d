"""The products of a decode step and what stands around them: XLA's operations beside the kernel of `row_matmul`.

Each product is a function (x, weights, shared) -> the next x, as `timing.chain` takes it. Where a result is no x yet, a
small kernel makes one of it, the same one in both ways. All four in a row need none but for k and v, which attention
would read, and are what a layer without attention runs: the kernel has to be the faster one there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float
from rich.table import Table

from lragent_jax.kernels.lora_attention.dispatch import default_platform
from lragent_jax.kernels.row_matmul import Norm, dispatch, row_matmul
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.matrix_product import matrix_product

KERNEL = "pallas_mosaic_gpu"


def linear(x: Float[Array, "B T D"], kernel: Float[Array, "D out"]) -> Float[Array, "B T out"]:
    return matrix_product(lambda x, kernel: jnp.einsum("bti,io->bto", x, kernel), x, kernel)


def rms_norm(x, norm: Norm):
    wide = x.astype(jnp.float32)
    return norm.scale * (wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + norm.eps)).astype(x.dtype)


def kept(result, *others):
    """`result` with a corner of `others` on it, or XLA would not compute what nobody reads; takes a small kernel."""
    result, *others = lax.optimization_barrier((result, *others))  # nor more than what is read
    width = min(array.shape[-1] for array in (result, *others))
    corner = sum(other[..., :width] for other in others)
    return result + jnp.pad(corner, [(0, 0)] * (result.ndim - 1) + [(0, result.shape[-1] - width)])


def kept_apart(result, others):
    """The same, and the small kernel is one of its own, whatever comes next."""
    return lax.optimization_barrier(kept(result, *others))


def as_input(result: Float[Array, "rows out"], width: int) -> Float[Array, "rows width"]:
    """`result` cut or repeated to be the next x; a kernel of its own, which no way can join with others."""
    out = result.shape[-1]
    if out == width:
        return result
    repeated = jnp.tile(lax.optimization_barrier(result), (1, -(-width // out)))
    return lax.optimization_barrier(repeated[:, :width])


def by_xla(x, weights, *, norm=None, keep_normed=False, gated=False, residual=None) -> tuple[Array, ...]:
    """What models do by themselves, with the arguments and results of `row_matmul`."""
    x = x if norm is None else rms_norm(x, norm)
    results = tuple(linear(x[:, None], weight)[:, 0] for weight in weights)
    if gated:
        results = (jax.nn.silu(results[0]) * results[1],)
    if residual is not None:
        results = (residual + results[0],)
    return (*results, x) if keep_normed else results


def by_kernel(x, weights, **options) -> tuple[Array, ...]:
    """What they do where `row_matmul`'s kernel is switched on."""
    return row_matmul(x, weights, implementation=KERNEL, **options)


def exact(x, weights, *, norm=None, residual=None, **options) -> tuple[Array, ...]:
    """The same in f32, from the same numbers."""

    def wide(tree):
        return jax.tree.map(lambda array: array.astype(jnp.float32), tree)

    norm = norm and norm._replace(scale=wide(norm.scale))
    return row_matmul(wide(x), wide(weights), norm=norm, residual=wide(residual), implementation="xla", **options)


class Shared(NamedTuple):
    """What does not change from call to call: the norm's scale, and what a result is added to."""

    scale: Float[Array, " D"]
    residual: Float[Array, "rows D"] | None


class FusedProduct(NamedTuple):
    """A call of `row_matmul` in a decode step. shapes: of its weights, (input, output) width."""

    name: str
    shapes: tuple[tuple[int, int], ...]
    eps: float | None = None  # None: no norm
    gated: bool = False
    residual: bool = False

    @property
    def width(self) -> int:
        return self.shapes[0][0]

    @property
    def keep_normed(self) -> bool:
        """Of q, k and v: adapters whose A the kernel does not take read the normalised rows."""
        return self.eps is not None and not self.gated

    def results(self, way: Callable, x, weights, shared: Shared) -> tuple[Array, ...]:
        """By one of the ways above."""
        return way(
            x, weights, norm=self.norm(shared), keep_normed=self.keep_normed, gated=self.gated,
            residual=shared.residual if self.residual else None,
        )  # fmt: skip

    def norm(self, shared: Shared) -> Norm | None:
        return None if self.eps is None else Norm(shared.scale, self.eps)

    def repeated(self, way: Callable) -> Callable:
        def function(x, weights, shared):
            result, *others = self.results(way, x, weights, shared)
            return as_input(kept_apart(result, others) if others else result, self.width)

        return function

    def cost(self, rows: int, itemsize: int) -> tuple[float, float]:
        """(bytes, FLOP) of a call: everything read once, and every result written once."""
        weights = sum(i * o for i, o in self.shapes)
        outs = [o for _, o in self.shapes[: 1 if self.gated else None]]
        moved = self.width * (1 + self.keep_normed) + sum(outs) + self.residual * outs[0]
        scale = 0 if self.eps is None else self.width
        return (weights + rows * moved + scale) * itemsize, 2.0 * rows * weights

    def refusal(self, x, weights, shared: Shared) -> str | None:
        """Why the kernel does not do it here; None if it does."""
        platform = default_platform()
        if platform not in dispatch.IMPLEMENTATIONS[KERNEL]:
            return f"{KERNEL} runs on {' and '.join(dispatch.IMPLEMENTATIONS[KERNEL])} only, not on {platform}"
        try:
            dispatch.load(KERNEL).refuse(x, weights, self.norm(shared))
        except NotImplementedError as error:
            return str(error)
        return None

    def check(self, x, weights, shared: Shared) -> dict[str, Any]:
        """Both ways' relative errors, and the reason why the kernel is not to be timed, None if it is."""
        errors, reason = (
            {"xla_error": self.relative_error(by_xla, x, weights, shared)},
            self.refusal(x, weights, shared),
        )
        if reason is None:
            error = errors["kernel_error"] = self.relative_error(by_kernel, x, weights, shared)
            if not error <= max_error(x.dtype):  # NaN is no smaller
                reason = f"wrong: off by {error:.1e} relative to f32"
        return errors | {"kernel_not_timed": reason}

    def relative_error(self, way: Callable, x, weights, shared: Shared) -> float:
        """Of the result that is worst, in the norm over all its numbers, against f32."""

        def compiled(x, weights, shared):
            return self.results(way, x, weights, shared)

        def error(got, want):
            return float(f"{float(jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)):.3g}")

        wanted = self.results(exact, x, weights, shared)
        found = jax.jit(compiled)(x, weights, shared)
        return float(np.max([error(got, want) for got, want in zip(found, wanted, strict=True)]))  # NaN if one is


def max_error(dtype) -> float:
    """The relative error against f32 that passes in 16 bits: one last bit. Rounding makes up to three fourths."""
    return float(jnp.finfo(dtype).eps)


def fused_products(config: LlamaConfig) -> tuple[FusedProduct, ...]:
    """The four of a layer, in their order."""
    shapes = config.projection_shapes()

    def named(*names):
        return tuple(shapes[name] for name in names)

    return (
        FusedProduct("norm and q, k, v", named("q", "k", "v"), eps=config.norm_eps),
        FusedProduct("o and residual", named("o"), residual=True),
        FusedProduct("norm, gate, up, SwiGLU", named("gate", "up"), eps=config.norm_eps, gated=True),
        FusedProduct("down and residual", named("down"), residual=True),
    )


def in_a_row(products: tuple[FusedProduct, ...], way: Callable) -> Callable:
    """A layer without attention, in whose place q goes on; its weights are those of the four, one after the other."""
    projections, out, gate_up, down = products

    def function(x, weights, shared):
        left = iter(weights)

        def results(product, x, residual):
            own = tuple(next(left) for _ in product.shapes)
            return product.results(way, x, own, shared._replace(residual=residual))

        q, *others = results(projections, x, None)
        [x] = results(out, kept_apart(q, others), x)
        [hidden] = results(gate_up, x, None)
        [x] = results(down, hidden, x)
        return x

    return function


class Comparison(NamedTuple):
    """What is done by both ways. repeated: a way's function of (x, weights of `products`, shared)."""

    name: str
    products: tuple[FusedProduct, ...]
    repeated: Callable[[Callable], Callable]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [shape for product in self.products for shape in product.shapes]

    def cost(self, rows: int, itemsize: int) -> tuple[float, float]:
        costs = [product.cost(rows, itemsize) for product in self.products]
        return sum(num_bytes for num_bytes, _ in costs), sum(flop for _, flop in costs)


def comparisons(config: LlamaConfig) -> list[Comparison]:
    """Each product by itself, then all four."""
    products = fused_products(config)
    alone = [Comparison(product.name, (product,), product.repeated) for product in products]
    return [*alone, Comparison("all four in a row", products, lambda way: in_a_row(products, way))]


def products_table(reports: list[dict[str, Any]]) -> Table:
    """Of dicts of name, rows, floor_us, xla_us, xla_error, kernel_us, kernel_error and kernel_not_timed."""
    table = Table(title="products of a decode step: XLA's operations and the kernel of row_matmul", box=None)
    columns = ("product", "rows", "floor µs", "XLA µs", "x floor", "error", "kernel µs", "x floor", "error")
    for column in (*columns, "XLA / kernel"):
        table.add_column(column, justify="left" if column == "product" else "right")
    for row in reports:
        cells = [row["name"], str(row["rows"]), f"{row['floor_us']:.1f}"]
        for way in ("xla", "kernel"):
            us, error = row.get(f"{way}_us"), row.get(f"{way}_error")
            cells += ["", ""] if us is None else [f"{us:.1f}", f"{us / row['floor_us']:.2f}"]
            cells += ["" if error is None else f"{error:.1e}"]
        table.add_row(*cells, row["kernel_not_timed"] or f"{row['xla_us'] / row['kernel_us']:.2f}")
    return table
