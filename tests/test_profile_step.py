"""scripts/profile_step.py at toy sizes: the other ways compute what the layer computes, and every figure is there.

And what it compares decode steps' products with: which kernels it times, and which it does not.
"""

import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from script_modules import load_script
from tolerances import TOLERANCES, assert_close

from lragent_jax.kernels.row_matmul import dispatch, pallas_mosaic_gpu, xla
from lragent_jax.measure import fused_products
from lragent_jax.measure.timing import DeviceSpeed
from lragent_jax.models.config import LlamaConfig

profile_step = load_script("profile_step")
TINY = LlamaConfig.preset("tiny")
PRODUCTS = (
    "norm and q, k, v", "o and residual", "norm, gate, up, SwiGLU", "down and residual", "all four in a row",
)  # fmt: skip
SETTING = profile_step.Pass(TINY, B=3, T=2, S=24, r=4, p=8, dtype="float32", implementation=None, cycled_bytes=1e4)


def weights() -> tuple[tuple, tuple, tuple]:
    """One layer's q, k, v, A and B: apart, in one matrix, and which adapter each row runs."""
    random = profile_step.Random("float32")
    D, r = TINY.width, SETTING.r
    q, k, v = (random(*TINY.projection_shapes()[name]) for name in ("q", "k", "v"))
    a_q, a_v, b_q = random(1, D, r), random(1, D, r), random(4, r, q.shape[1])
    joined = jnp.concatenate([q, k, v, a_q[0], a_v[0]], axis=1)
    return (q, k, v, a_q, b_q, a_v), (joined, b_q), (jnp.zeros(4, jnp.int32), jnp.array([1, 3, 2], jnp.int32))


@pytest.mark.parametrize("expand", ["gathered_expand", "masked_expand"])
def test_one_matrix_is_the_same_projection(expand):
    apart, together, shared = weights()
    x = profile_step.Random("float32")(3, 2, TINY.width, scale=1.0)
    want = profile_step.separate_projections(x, apart, shared)
    got = profile_step.joined_projections(x, together, shared, getattr(profile_step, expand))
    # Beyond the corner, which holds different others.
    assert_close(got[..., SETTING.r :], want[..., SETTING.r :], "attention")


def test_what_nobody_reads_is_computed_all_the_same():
    """XLA would drop k and v, and a benchmark of them measure nothing."""
    apart, _, shared = weights()
    x = jax.ShapeDtypeStruct((3, 2, TINY.width), jnp.float32)
    compiled = jax.jit(profile_step.separate_projections).lower(x, apart, shared).compile()
    analysis = compiled.cost_analysis()
    assert analysis is not None
    shapes = [TINY.projection_shapes()[name] for name in ("q", "k", "v")]
    assert analysis["flops"] >= 2 * 6 * sum(i * o for i, o in shapes)


def test_floors_of_a_product():
    num_bytes, flop = profile_step.matmul_cost(SETTING, 6, (10, 20), (20, 5))
    assert num_bytes == 4 * (200 + 100 + 6 * (30 + 25))
    assert flop == 2 * 6 * 300


def test_the_first_row_writes_and_all_read_its_pages():
    table = profile_step.table_of(SETTING, 8)
    assert (table.base == table.base[0]).all()
    assert len(set(table.base[0].tolist())) == 3
    assert table.base_write_from[0] == 0
    assert (table.base_write_from[1:] > 2**20).all()


def test_the_last_line_is_json_with_every_operation(monkeypatch, capsys):
    monkeypatch.setattr(profile_step, "measure_device", lambda: DeviceSpeed(1e10, 1e11))
    monkeypatch.setattr(profile_step, "CALLS", 1)
    toy = "--preset tiny --layers 1 --batch 2 --context 16 --chunk 0 --page-size 8 --rank 4 --dtype float32"
    monkeypatch.setattr(sys, "argv", ["profile_step.py", *toy.split(), "--cycle", "1e3", "--chain", "1e-6"])
    profile_step.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    [decode] = report["passes"]
    assert [row["name"].split(":")[0] for row in decode["operations"]] == [
        "norms", "o projection", "MLP", "lm head", "q, k, v, adapters", "rope and page writes", "attention",
    ]  # fmt: skip
    assert len(decode["other_ways"]) == 5
    assert all(row["us"] > 0 and row["floor_us"] > 0 for row in (*decode["operations"], *decode["other_ways"]))
    assert decode["whole_ms"] > 0
    products = report["products"]
    assert [(row["rows"], row["name"]) for row in products] == [(B, name) for B in (1, 8) for name in PRODUCTS]
    for row in products:
        assert row["xla_us"] > 0
        assert row["floor_us"] > 0
        assert "kernel_us" not in row
        assert row["kernel_not_timed"] == "pallas_mosaic_gpu runs on gpu only, not on cpu"
        assert row["name"] == PRODUCTS[-1] or row["xla_error"] <= TOLERANCES["equal", "float32"]


def call(product, rows: int, dtype: str = "float32") -> tuple:
    """x, weights and what is shared."""
    random = profile_step.Random(dtype)
    x, weights = random(rows, product.width, scale=1.0), tuple(random(*shape) for shape in product.shapes)
    return x, weights, fused_products.Shared(random(TINY.width, scale=1.0), random(rows, TINY.width, scale=1.0))


@pytest.mark.parametrize("index", range(4))
def test_a_product_by_xla_is_the_exact_one_and_another_is_not(index):
    product = fused_products.fused_products(TINY)[index]
    x, weights, shared = call(product, 3)
    assert product.relative_error(fused_products.by_xla, x, weights, shared) <= TOLERANCES["equal", "float32"]

    def of_another_weight(x, weights, **options):
        return fused_products.by_xla(x, (*weights[:-1], weights[-1].at[0].add(0.1)), **options)

    assert product.relative_error(of_another_weight, x, weights, shared) > 1e-3


def test_four_products_in_a_row_are_a_layer_without_attention():
    one = fused_products.comparisons(TINY)[-1]
    random = profile_step.Random("float32")
    x, scale = random(2, TINY.width, scale=1.0), random(TINY.width, scale=1.0)
    weights = tuple(random(*shape) for shape in one.shapes)
    got = one.repeated(fused_products.by_xla)(x, weights, fused_products.Shared(scale, x))

    x, scale, q, k, v, o, gate, up, down = (np.asarray(array, np.float64) for array in (x, scale, *weights))

    def norm(x):
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + TINY.norm_eps) * scale

    normed, attended = norm(x), norm(x) @ q
    corner = k.shape[1]
    attended[:, :corner] += normed @ k + normed @ v + normed[:, :corner]
    x = x + attended @ o
    gated = norm(x) @ gate
    want = x + (gated / (1 + np.exp(-gated)) * (norm(x) @ up)) @ down
    assert_close(got, want, "equal")


def test_a_result_is_cut_or_repeated_to_the_next_input():
    y = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(fused_products.as_input(y, 2), [[0, 1], [3, 4]])
    np.testing.assert_array_equal(fused_products.as_input(y, 7)[1], [3, 4, 5, 3, 4, 5, 3])


def test_costs_of_products():
    """In a model of width 10 with two kv heads for ten query heads, in numbers of two bytes."""
    qkv = fused_products.FusedProduct("q, k, v", ((10, 10), (10, 2), (10, 2)), eps=1e-5)
    assert qkv.cost(3, 2) == (2 * (140 + 3 * (10 + 14 + 10) + 10), 2 * 3 * 140)
    gate_up = fused_products.FusedProduct("gate, up", ((10, 30), (10, 30)), eps=1e-5, gated=True)
    assert gate_up.cost(3, 2) == (2 * (600 + 3 * (10 + 30) + 10), 2 * 3 * 600)
    down = fused_products.FusedProduct("down", ((30, 10),), residual=True)
    assert down.cost(3, 2) == (2 * (300 + 3 * (30 + 10 + 10)), 2 * 3 * 300)


def row_of_nan(x, weights, **options):
    return tuple(y.at[0].set(jnp.nan) for y in xla.row_matmul(x, weights, **options))


def a_row_left_out(x, weights, **options):
    """Of the weights of o alone."""
    wrong = tuple(weight.at[5].set(0) for weight in weights)
    return xla.row_matmul(x, wrong if options["residual"] is not None and x.shape[1] == 48 else weights, **options)


@pytest.mark.parametrize(
    ("kernel", "timed"),
    [(xla.row_matmul, (1, 1, 1, 1, 1)), (row_of_nan, (0, 0, 0, 0, 0)), (a_row_left_out, (1, 0, 1, 1, 0))],
)
def test_a_kernel_is_timed_where_it_is_right(monkeypatch, kernel, timed):
    substitute = types.SimpleNamespace(refuse=xla.refuse, row_matmul=kernel)
    monkeypatch.setattr(dispatch, "load", lambda name: xla if name == "xla" else substitute)
    monkeypatch.setattr(fused_products, "default_platform", lambda: "gpu")
    monkeypatch.setattr(profile_step, "CALLS", 1)
    setting = SETTING._replace(B=2, T=1, dtype="bfloat16")
    rows = profile_step.measure_products(setting, DeviceSpeed(1e10, 1e11), 1e-6)
    for row, is_timed in zip(rows, timed, strict=True):
        assert ("kernel_us" in row) == (row["kernel_not_timed"] is None) == bool(is_timed)
        assert is_timed or row["kernel_not_timed"].startswith("wrong: off by ")
        assert row["xla_us"] > 0
    assert len(fused_products.products_table(rows).rows) == 5


def test_a_kernel_says_what_it_refuses(monkeypatch):
    monkeypatch.setattr(fused_products, "default_platform", lambda: "gpu")
    monkeypatch.setattr(dispatch, "load", lambda name: pallas_mosaic_gpu)
    product = fused_products.fused_products(TINY)[0]
    assert "float32" in (product.refusal(*call(product, 1)) or "")
    assert "17 rows" in (product.refusal(*call(product, 17, "bfloat16")) or "")
