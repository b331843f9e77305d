"""Few rows times weights: every implementation against an f32 oracle, and the models that call it."""

import dataclasses
import functools
import os

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerances import assert_close

from lragent_jax.kernels.interpret import interpreted
from lragent_jax.kernels.row_matmul import Norm, dispatch, pallas_mosaic_gpu, row_matmul, xla
from lragent_jax.measure.tpu_programs import Workload, model_mesh
from lragent_jax.models import row_products
from lragent_jax.models.adapter_bank import LoraPair
from lragent_jax.models.cache_view import LayerCache, PageTable
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.llama import LayerAdapters, random_params
from lragent_jax.models.rope import inverse_frequencies, rotation

EPS = 1e-5
HOPPER = jax.default_backend() == "gpu" and jax.devices()[0].compute_capability == "9.0"
# Warpgroups wait for each other inside of callbacks. XLA takes NPROC for the number of processors, and runs as many.
INTERPRETED = hasattr(plgpu, "InterpretGPUParams") and int(os.environ.get("NPROC", os.cpu_count() or 1)) >= 8
on_kernel = pytest.mark.skipif(
    not HOPPER and not INTERPRETED,
    reason="needs a Hopper GPU, or Mosaic GPU's interpreter (JAX 0.11 and newer) and 8 threads (NPROC=8)",
)


@dataclasses.dataclass(frozen=True)
class Case:
    rows: int
    width: int
    outs: tuple[int, ...]
    norm: bool = False
    gated: bool = False
    residual: bool = False
    dtype: str = "bfloat16"

    def inputs(self, seed: int = 0) -> tuple:
        """x, weights, scale, residual."""
        rng = np.random.default_rng([seed, self.rows, self.width])

        def array(*shape, scale=1.0):
            return jnp.asarray(rng.standard_normal(shape) * scale, self.dtype)

        weights = tuple(array(self.width, out, scale=self.width**-0.5) for out in self.outs)
        return array(self.rows, self.width), weights, array(self.width), array(self.rows, self.outs[0])

    def run(self, implementation: str | None, x, weights, scale, residual, **options) -> tuple[np.ndarray, ...]:
        results = row_matmul(
            x, weights, norm=Norm(scale, EPS) if self.norm else None, keep_normed=self.norm and not self.gated,
            gated=self.gated, residual=residual if self.residual else None, implementation=implementation, **options,
        )  # fmt: skip
        assert all(y.dtype == self.dtype for y in results)
        return tuple(np.asarray(y, np.float32) for y in results)

    def oracle(self, x, weights, scale, residual) -> tuple[np.ndarray, ...]:
        """f32, rounded where the operation says it rounds."""

        def rounded(y):
            return np.asarray(jnp.asarray(y, self.dtype), np.float32)

        x, scale, residual, *weights = (np.asarray(y, np.float32) for y in (x, scale, residual, *weights))
        if self.norm:
            x = rounded(rounded(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS)) * scale)
        results = [rounded(x @ weight) for weight in weights]
        if self.gated:
            results = [results[0] / (1 + np.exp(-results[0])) * results[1]]
        if self.residual:
            results = [results[0] + residual]
        return (*results, x) if self.norm and not self.gated else tuple(results)


CASES = {
    "q, k, v": Case(1, 512, (128, 64, 64), norm=True),
    "gate and up of nine rows": Case(9, 512, (64, 64), norm=True, gated=True),
    "o": Case(1, 384, (128,), residual=True),
    "down of 16 rows": Case(16, 640, (64,), residual=True),
    "one turn, float16": Case(2, 128, (64,), dtype="float16"),
    "everything": Case(1, 512, (64, 64), norm=True, gated=True, residual=True),
}


@pytest.mark.parametrize("name", CASES)
def test_xla_equals_the_oracle(name):
    case = CASES[name]
    inputs = case.inputs()
    for got, want in zip(case.run("xla", *inputs), case.oracle(*inputs), strict=True):
        assert_close(got, want, "attention", case.dtype)


@on_kernel
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_equals_the_oracle_without_races(name, capsys):
    case = CASES[name]
    inputs = case.inputs()
    with interpreted() if not HOPPER else capsys.disabled():
        results = case.run("pallas_mosaic_gpu", *inputs)
    for got, want in zip(results, case.oracle(*inputs), strict=True):
        assert_close(got, want, "attention", case.dtype)
    assert "RACE" not in capsys.readouterr().out


@on_kernel
def test_a_row_of_nan_stays_alone(monkeypatch, capsys):
    """Also among fewer stages than turns, and with blocks of several tiles."""
    sizes = pallas_mosaic_gpu.BlockSizes(tiles=2, block_k=128, stages=2)
    monkeypatch.setattr(pallas_mosaic_gpu, "heuristic", lambda shapes: sizes)
    case = Case(3, 512, (128, 128), norm=True)
    x, *others = case.inputs()
    x = x.at[1].set(jnp.nan)
    with interpreted() if not HOPPER else capsys.disabled():
        results = case.run("pallas_mosaic_gpu", x, *others)
    for got, want in zip(results, case.oracle(x, *others), strict=True):
        assert np.isnan(got[1]).all()
        assert_close(got[[0, 2]], want[[0, 2]], "attention", case.dtype)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case(17, 512, (64,)), "17 rows"),
        (Case(1, 520, (64,)), "520 numbers"),
        (Case(1, 384, (64,), norm=True), "a norm over 384"),
        (Case(1, 512, (64, 96)), r"\[96\] columns"),
        (Case(1, 512, (64,), dtype="float32"), "float32"),
    ],
)
def test_the_kernel_refuses_what_it_was_not_written_for(case, reason):
    inputs = case.inputs()
    with pytest.raises(NotImplementedError, match=reason):
        case.run("pallas_mosaic_gpu", *inputs)
    for got, want in zip(case.run(None, *inputs), case.oracle(*inputs), strict=True):
        assert_close(got, want, "attention", "bfloat16")  # XLA on CPUs rounds the f32 case's products its own way


def test_what_contradicts_itself_is_misuse():
    x, (w, other), scale, residual = Case(2, 128, (64, 32)).inputs()
    wrong = {
        "x is": lambda: row_matmul(x[0], [w]),
        "empty": lambda: row_matmul(x, []),
        "a weight": lambda: row_matmul(x, [w[:64]]),
        "norm.scale": lambda: row_matmul(x, [w], norm=Norm(scale[:64], EPS)),
        "keep_normed": lambda: row_matmul(x, [w], keep_normed=True),
        "gated": lambda: row_matmul(x, [w, other], gated=True),
        "residual is given": lambda: row_matmul(x, [w, other], residual=residual),
        "residual is bf": lambda: row_matmul(x, [w], residual=residual[:1]),
        "called": lambda: row_matmul(x, [w], implementation="pallas"),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_models_use_it_for_few_rows_alone(monkeypatch):
    asked = []

    def choose(name, x, weights, norm):
        asked.append(x.shape)
        return "xla"

    monkeypatch.setattr(dispatch, "choose", choose)
    monkeypatch.setattr(dispatch, "ENABLED_BY_DEFAULT", True)
    w = jnp.zeros((8, 8))
    run = functools.partial(row_products.row_products, weights=[w], implementation=None)
    for B, T in ((1, 1), (16, 1), (2, 8), (17, 1), (1, 32)):
        assert run(jnp.zeros((B, T, 8))) is None  # XLA's is as good
    assert asked == [(1, 8), (16, 8), (16, 8)]
    assert run(jnp.zeros((1, 1, 8)), implementation="pallas_triton") is None
    monkeypatch.setattr(dispatch, "ENABLED_BY_DEFAULT", False)
    assert run(jnp.zeros((1, 1, 8))) is None
    assert len(asked) == 3


@pytest.mark.parametrize(("program", "batch", "tokens"), [("decode", 8, 1), ("prefill", 1, 16)])
@pytest.mark.parametrize("switched_on", [False, True])
def test_without_the_switch_no_program_contains_it(monkeypatch, switched_on, program, batch, tokens):
    """On a GPU, that is, and of a model that it fits; the kernel itself only counts here."""
    used = []

    def count(x, weights, *, implementation, **options):
        used.append(implementation)
        return row_matmul(x, weights, implementation="xla", **options)

    if switched_on:
        monkeypatch.setattr(dispatch, "ENABLED_BY_DEFAULT", True)
    monkeypatch.setattr(dispatch, "default_platform", lambda: "gpu")
    monkeypatch.setattr(row_products, "row_matmul", count)
    jax.clear_caches()  # the switch is no argument of what is traced
    config = dataclasses.replace(LlamaConfig.preset("tiny"), width=512, mlp_width=128, num_heads=8, head_dim=64)
    workload = Workload(
        config=config, mesh=model_mesh(jax.devices()[:1]), batch=batch, tokens=tokens, pages=8, width=4, rank=8,
        page_size=16, implementation=None,
    )  # fmt: skip
    workload.lower(program)
    jax.clear_caches()
    assert set(used) == ({"pallas_mosaic_gpu"} if switched_on else set())


@pytest.mark.parametrize("targets", [(), ("q", "k", "v"), ("q", "o", "up", "down")])
def test_a_block_is_the_same_by_either_way(monkeypatch, targets):
    """XLA's implementation in the kernel's place: norms, adapters and residuals are wired as they were."""
    config = LlamaConfig.preset("tiny")
    llama = nnx.merge(*random_params(config, "float32", seed=1))
    block, rng = llama.layers[0], np.random.default_rng(2)

    def array(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    shapes = config.projection_shapes()
    pairs = {name: LoraPair(array(1, shapes[name][0], 4), array(2, 4, shapes[name][1])) for name in targets}
    group_of = dict.fromkeys(targets, jnp.zeros(2, jnp.int32))
    adapters = LayerAdapters(pairs, group_of, jnp.ones(1, jnp.int32))
    x, num_tokens, page_size = array(1, 3, config.width), 3, 8
    inv_freq = inverse_frequencies(config)
    block.attention_norm.scale[...], block.mlp_norm.scale[...] = array(config.width), array(config.width)

    def run():
        pages = jnp.zeros((2, config.num_kv_heads, page_size, 2 * config.head_dim))
        zero, none = jnp.zeros(1, jnp.int32), jnp.zeros((0, 1), jnp.int32)
        table = PageTable(
            q_starts=zero, kv_lens=zero + num_tokens, base=jnp.asarray([[1]], jnp.int32), base_write_from=zero,
            low_rank=jnp.zeros((0, 1, 1), jnp.int32), low_rank_write_from=none, group_ids=none, read_slots=zero,
        )  # fmt: skip
        cache = LayerCache(kv=pages, low_rank_v=None, low_rank_k=None)
        rope = rotation(table.positions(num_tokens), inv_freq)
        y, cache = block.attention(
            x, cache, adapters, table, rope, inv_freq, write_base=True, implementation=None, norm=block.attention_norm
        )
        return y, cache.kv, block.mlp(y, adapters, block.mlp_norm, None)

    want, used = run(), []

    def substitute(name):
        used.append(name)
        return xla

    monkeypatch.setattr(dispatch, "ENABLED_BY_DEFAULT", True)
    monkeypatch.setattr(dispatch, "choose", lambda *args: "pallas_mosaic_gpu")
    monkeypatch.setattr(dispatch, "load", substitute)
    monkeypatch.setattr("lragent_jax.kernels.row_matmul.api.choose", lambda *args: "pallas_mosaic_gpu")
    for got, expected in zip(run(), want, strict=True):
        assert_close(got, expected, "equal")
    assert len(used) == 4 - len({"o", "down"} & set(targets)) - ("up" in targets)
