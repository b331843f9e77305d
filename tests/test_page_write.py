"""RoPE and page write as one kernel, against a loop over tokens and against the scatters, and in a compiled model."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic_interpreter import in_interpreter
from tolerances import assert_close

from lragent_jax import generation
from lragent_jax.kernels import page_write
from lragent_jax.kernels.interpret import interpreted
from lragent_jax.kernels.page_write import Expansion, LowRank, Pools, Projections, Rotation, Slots, pallas_mosaic_gpu
from lragent_jax.measure.tpu_programs import Workload, model_mesh
from lragent_jax.models import cache_view
from lragent_jax.models.cache_view import LayerCache, PageTable
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.matrix_product import FEW_ROWS


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows are (q_start, kv_len, write_from, write_from of each low-rank table)."""

    name: str
    rows: tuple[tuple[int, int, int, tuple[int, ...]], ...]
    T: int
    N: int = 8
    K: int = 4
    H: int = 64
    p: int = 16
    r_v: int = 8
    r_k: int = 0
    delta: bool = True
    adapters: tuple[int, ...] = ()
    """Whose B's q's part is made of, by row; else, with `delta`, it is given."""
    r_q: int = 8
    base: bool = True

    @property
    def tables(self) -> int:
        return len(self.rows[0][3])

    @property
    def width(self) -> int:
        return -(-max(start + self.T for start, *_ in self.rows) // self.p)


NEVER = 2**30
CASES = (
    Case("decode: one row writes, one only reads", rows=((15, 16, 0, (0,)), (16, 17, NEVER, (NEVER,))), T=1),
    Case(
        "padding, pages that begin in the middle, two tables",
        rows=((14, 18, 0, (0, 15)), (-1, 3, 1, (NEVER, 0)), (5, 5, 0, (0, 0))), T=5, N=4, r_k=16,
    ),
    Case("wide heads, no adapter on q, merged", rows=((30, 34, 32, ()),), T=5, H=128, p=32, r_v=0, delta=False),
    Case("rows of three adapters", rows=((15, 16, 0, (0,)), (3, 4, 0, (0,)), (0, 1, 0, (0,))), T=1, adapters=(3, 0, 1)),
    Case("one row, an adapter for two tokens", rows=((7, 9, 0, ()),), T=2, H=128, r_v=0, N=4, adapters=(2,)),
    Case("an adapter on q, only low-rank pages", rows=((9, 10, 0, (2,)),), T=1, N=4, K=4, adapters=(1,), base=False),
    Case("an adapter on q, nothing is written", rows=((9, 11, 0, ()),), T=2, r_v=0, adapters=(1,), base=False),
    Case("a large rank on q", rows=((3, 6, 0, (0,)), (0, 3, 0, (0,))), T=3, adapters=(2, 4), r_q=24),
    Case("groups of one token", rows=((14, 18, 0, (0,)), (-1, 3, 1, (NEVER,))), T=5, adapters=(3, 1)),
    Case(
        "groups of four", rows=((14, 25, 0, (20,)), (0, 12, 8, (0,)), (5, 5, 0, (0,)), (1, 13, 0, (0,))), T=12, H=128,
        adapters=(4, 0, 2, 1), K=2, N=4, p=32,
    ),
    Case("groups of sixteen", rows=((3, 35, 0, (0,)), (0, 30, 8, (4,))), T=32, adapters=(2, 3)),
    Case("a rank too large for groups", rows=((0, 16, 0, (0,)), (8, 24, 0, (0,))), T=16, adapters=(1, 4), r_q=16),
    Case("a group per row, wide heads", rows=((0, 16, 0, (0,)), (8, 24, 0, (0,))), T=16, H=128, N=4, adapters=(1, 4)),
    Case("only low-rank pages", rows=((1, 4, 0, (2,)),), T=3, N=4, K=4, base=False),
)  # fmt: skip


@dataclasses.dataclass
class Call:
    projections: Projections
    angles: np.ndarray
    low_rank: LowRank
    cache: LayerCache
    table: PageTable


def make(case: Case) -> Call:
    """Everything drawn, NaN in what padding brings; page entries behind a row's keys are in no pool."""
    rng = np.random.default_rng(1)
    B, T, g, W = len(case.rows), case.T, case.tables, case.width
    num_pages = (1 + g) * B * W + 1
    starts, lens, write_from, lr_from = (np.array(x, np.int32) for x in zip(*case.rows, strict=True))
    positions = starts[:, None] + np.arange(T)
    padding = positions >= lens[:, None]

    def heads(count: int):
        return amid_nan(rng.standard_normal((B, T, count, case.H)))

    def low_rank(r: int):
        return amid_nan(rng.standard_normal((B, T, g, r)), (2, 0, 1, 3)) if r and g else None

    def amid_nan(x, axes=(0, 1, 2, 3)):
        x[padding] = np.nan
        return jnp.asarray(x.transpose(axes), jnp.bfloat16)

    pages = rng.permutation(num_pages)[: (1 + g) * B * W].reshape(1 + g, B, W)
    pages = np.where(np.arange(W) * case.p < lens[:, None], pages, NEVER).astype(np.int32)
    zeros = np.zeros(B, np.int32)
    table = PageTable(
        q_starts=starts, kv_lens=lens, base=pages[0], base_write_from=write_from, low_rank=pages[1:],
        low_rank_write_from=lr_from.T.reshape(g, B), group_ids=np.zeros((g, B), np.int32), read_slots=zeros,
    )  # fmt: skip

    def pool(*shape):
        return jnp.asarray(rng.standard_normal((num_pages, *shape)), jnp.bfloat16)

    cache = LayerCache(
        kv=pool(case.K, case.p, 2 * case.H),
        low_rank_v=pool(case.r_v, case.p) if case.r_v and g else None,
        low_rank_k=pool(case.r_k, case.p) if case.r_k and g else None,
    )
    q, k, v, delta = (heads(count) for count in (case.N, case.K, case.K, case.N))
    if not case.base:
        k = v = None
    delta = delta if case.delta else None
    if case.adapters:
        # Small beside q: a delta of 2 or more that is rounded the other way is off by more than the tolerance.
        lora_b = rng.standard_normal((5, case.r_q, case.N, case.H)) * 0.5 * case.r_q**-0.5
        lora_b[0] = 0
        lora_b[np.setdiff1d(np.arange(5), case.adapters)] = np.nan
        low = amid_nan(rng.standard_normal((B, T, case.r_q)), (0, 1, 2))
        delta = Expansion(low, jnp.asarray(lora_b, jnp.bfloat16), jnp.asarray(case.adapters, jnp.int32))
    angles = (positions[..., None] * 0.7 ** np.arange(case.H // 2)).astype(np.float32)
    new = LowRank(v=low_rank(case.r_v), k=low_rank(case.r_k))
    return Call(Projections(q, k, v, delta), angles, new, cache, table)


def expected(case: Case, call: Call) -> tuple[np.ndarray, np.ndarray, list[np.ndarray | None]]:
    """q, and the three pools, written token by token; in f32."""

    def rotate(x, angles):
        first, second = np.split(np.asarray(x, np.float32), 2, axis=-1)
        cos, sin = np.cos(angles)[:, :, None], np.sin(angles)[:, :, None]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    q, k, v, delta = call.projections
    if isinstance(delta, Expansion):
        low, lora_b = (np.asarray(x, np.float32) for x in delta[:2])
        own = [np.einsum("tr,rnh->tnh", low[b], lora_b[adapter]) for b, adapter in enumerate(case.adapters)]
        delta = jnp.asarray(np.stack(own), jnp.bfloat16)
    q_out = rotate(q if delta is None else q + delta, call.angles)
    kv = np.array(call.cache.kv, np.float32)
    low_rank = [
        None if pool is None else np.array(pool, np.float32) for pool in (call.cache.low_rank_v, call.cache.low_rank_k)
    ]
    k_out = None if k is None else rotate(k, call.angles)
    for b, (start, kv_len, write_from, lr_from) in enumerate(case.rows):
        for t, position in enumerate(range(start, min(kv_len, start + case.T))):
            column, slot = divmod(position, case.p)
            if k_out is not None and v is not None and position >= write_from:
                page = call.table.base[b, column]
                kv[page, :, slot] = np.concatenate([k_out[b, t], np.asarray(v[b, t], np.float32)], axis=-1)
            for g, first in enumerate(lr_from):
                if position < max(first, 0):
                    continue
                for pool, new in zip(low_rank, call.low_rank, strict=True):
                    if pool is not None and new is not None:
                        pool[call.table.low_rank[g, b, column], :, slot] = np.asarray(new[g, b, t], np.float32)
    return q_out, kv, low_rank


def run(call: Call, implementation: str):
    cos, sin = (jnp.asarray(f(call.angles)) for f in (np.cos, np.sin))

    @jax.jit
    def write(projections, low_rank, cache, table):
        rotation = Rotation(cos, sin)
        return cache_view.rotate_and_write(projections, rotation, low_rank, cache, table, implementation)

    with interpreted():
        return write(call.projections, call.low_rank, call.cache, call.table)


def check(case: Case, got) -> None:
    q, cache = got
    want_q, want_kv, want_low_rank = expected(case, make(case))
    live = ~np.isnan(want_q)
    assert_close(np.asarray(q, np.float32)[live], want_q[live], "rope", "bfloat16")
    (k, v), (want_k, want_v) = (np.split(np.asarray(x, np.float32), 2, axis=-1) for x in (cache.kv, want_kv))
    assert_close(k, want_k, "rope", "bfloat16")  # NaN does not pass
    np.testing.assert_array_equal(v, want_v)
    for pool, wanted in zip((cache.low_rank_v, cache.low_rank_k), want_low_rank, strict=True):
        assert (pool is None) == (wanted is None)
        if pool is not None:
            np.testing.assert_array_equal(np.asarray(pool, np.float32), wanted)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_scatters_put_tokens_where_the_table_says_and_nowhere_else(case):
    check(case, run(make(case), "xla"))


@pytest.fixture
def few_tokens(monkeypatch, request) -> Iterator[None]:
    """Up to how many are few; and no other implementation than the kernel is tried."""
    monkeypatch.setattr(pallas_mosaic_gpu, "FEW_TOKENS", request.param)
    monkeypatch.setattr(page_write, "ON_GPUS", ("pallas_mosaic_gpu",))
    jax.clear_caches()  # the constant is no argument of the function that is traced once
    yield
    jax.clear_caches()


@in_interpreter
@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("few_tokens", [256, 0], ids=["few tokens", "many tokens"], indirect=True)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_kernel_puts_tokens_where_the_table_says_and_nowhere_else(case, capsys):
    check(case, run(make(case), "pallas_mosaic_gpu"))
    assert "RACE" not in capsys.readouterr().out


def of_the_first_row(original):
    return lambda s, expansion, token, *rest: original(s, expansion, 0 * token, *rest)


def across_rows(original):
    return lambda B, T, rank: math.gcd(B * T, 16)


@in_interpreter
@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("few_tokens", [0], indirect=True)
@pytest.mark.parametrize(("function", "mutant"), [("rows_of_b", of_the_first_row), ("group_size", across_rows)])
def test_a_group_that_takes_another_rows_adapter_is_seen(function, mutant, monkeypatch):
    case = next(case for case in CASES if case.name == "groups of four")
    assert pallas_mosaic_gpu.group_size(len(case.rows), case.T, case.r_q) == 4
    monkeypatch.setattr(pallas_mosaic_gpu, function, mutant(getattr(pallas_mosaic_gpu, function)))
    with pytest.raises(AssertionError):
        check(case, run(make(case), "pallas_mosaic_gpu"))


def prefill_of_a_model(page_writes: tuple[str, ...], monkeypatch) -> tuple[list[np.ndarray], set[type]]:
    """Hidden states and pools behind a prefill of two rows of two adapters; and what came as what is added to q."""
    config = LlamaConfig(
        vocab_size=64, width=64, mlp_width=64, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=64,
        rope_theta=1e4, norm_eps=1e-5, context_length=64,
    )  # fmt: skip
    workload = Workload(
        config=config, mesh=model_mesh(jax.devices()[:1]), rank=8, batch=2, tokens=24, page_size=16, pages=4, width=2,
    )  # fmt: skip
    rng, given = np.random.default_rng(2), set()

    def drawn(x):
        return (
            jnp.asarray(rng.standard_normal(x.shape) * 0.2, x.dtype) if x.dtype == jnp.bfloat16 else jnp.zeros_like(x)
        )

    params, bank, cache, tokens, _, _ = workload.arguments("prefill")
    params, bank, cache = (jax.tree.map(drawn, tree) for tree in (params, bank, cache))
    bank = dataclasses.replace(bank, group_of={**bank.group_of, "q": jnp.arange(4)})
    pages = np.arange(4, dtype=np.int32).reshape(2, 2)
    table = dataclasses.replace(
        workload.table(), kv_lens=np.array([24, 20], np.int32), base=pages, low_rank=pages[None]
    )
    rotate_and_write = page_write.rotate_and_write

    def recorded(projections, *args, **kwargs):
        given.add(type(projections.q_delta))
        return rotate_and_write(projections, *args, **kwargs)

    monkeypatch.setattr(page_write, "rotate_and_write", recorded)
    monkeypatch.setattr(cache_view, "_page_writes", lambda implementation: page_writes)
    jax.clear_caches()
    tokens = rng.integers(0, 64, tokens.shape, np.int32)
    with interpreted():
        results = generation.prefill(
            workload.params()[0], params, bank, cache, tokens, np.array([3, 1], np.int32), table, implementation="xla"
        )
    monkeypatch.undo()
    jax.clear_caches()  # what was recorded is no one else's
    return [np.asarray(x, np.float32) for x in jax.tree.leaves(results)], given


@in_interpreter
def test_a_prefill_leaves_to_the_kernel_what_adapters_add_to_queries(monkeypatch):
    want, given = prefill_of_a_model(("xla",), monkeypatch)
    assert Expansion not in given
    monkeypatch.setattr(pallas_mosaic_gpu, "FEW_TOKENS", 16)
    got, given = prefill_of_a_model(("pallas_mosaic_gpu",), monkeypatch)
    assert given == {Expansion}
    for x, wanted in zip(got, want, strict=True):
        assert np.isfinite(x).all()
        np.testing.assert_allclose(x, wanted, atol=0.05 * np.abs(wanted).max())


def test_a_token_of_padding_cannot_reach_a_page_even_by_a_wrong_slot():
    """Slots outside of their pool write nothing, as those of -1."""
    call = make(CASES[0])
    slots = Slots(jnp.array([[2**30], [-5]], jnp.int32), jnp.array([[[-1], [2**30]]], jnp.int32))
    angles = jnp.zeros((2, 1, 32))
    pools = Pools(call.cache.kv, call.cache.low_rank_v)
    _, got = page_write.rotate_and_write(call.projections, Rotation(angles, angles), call.low_rank, slots, pools)
    for pool, before in zip(got[:2], pools[:2], strict=True):
        np.testing.assert_array_equal(np.asarray(pool, np.float32), np.asarray(before, np.float32))


def arguments(dtype="bfloat16", N=8, K=4, H=128, p=16, T=1, base=True) -> tuple:
    def array(*shape, dtype: str = dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    q, k = array(2, T, N, H), array(2, T, K, H) if base else None
    angles = array(2, T, H // 2, dtype="float32")
    low_rank, slots = LowRank(v=array(1, 2, T, 8)), Slots(array(2, T, dtype="int32"), array(1, 2, T, dtype="int32"))
    return Projections(q, k, k), Rotation(angles, angles), low_rank, slots, Pools(array(9, K, p, 2 * H), array(9, 8, p))


def shapes_of(implementations, args) -> list[tuple[int, ...]]:
    def write(*args):
        return page_write.rotate_and_write(*args, implementations=implementations)

    return [x.shape for x in jax.tree.leaves(jax.eval_shape(write, *args))]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "float32"),
        ({"H": 96}, "head dim 96"),
        ({"N": 9, "K": 3, "H": 64}, "9 and 3 heads of 64"),
        ({"p": 256}, "page size 256"),
        ({"T": 2**20}, "2097152 tokens"),
    ],
)
def test_what_the_kernel_cannot_do_the_scatters_do(changes, reason):
    args = arguments(**changes)
    with pytest.raises(NotImplementedError, match=reason):
        shapes_of(("pallas_mosaic_gpu",), args)
    assert shapes_of(("pallas_mosaic_gpu", "xla"), args) == shapes_of(("xla",), args)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda new, pools, slots: (new._replace(v=None), pools, slots), "only one is given"),
        (lambda new, pools, slots: (new._replace(k=new.q, v=new.q), pools, slots), "k and v have shapes"),
        (lambda new, pools, slots: (new._replace(q_delta=Expansion(new.q, new.q, new.q)), pools, slots), "q_delta has"),
        (lambda new, pools, slots: (new, pools._replace(low_rank_v=None), slots), "without a pool"),
        (lambda new, pools, slots: (new, pools, slots._replace(low_rank=None)), "without slots"),
        (lambda new, pools, slots: (new, pools._replace(low_rank_v=pools.kv[:, 0]), slots), "rank 16"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(change, reason):
    args = [jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), arg) for arg in arguments()]
    new, pools, slots = change(args[0], args[4], args[3])
    with pytest.raises(ValueError, match=reason):
        page_write.rotate_and_write(new, args[1], args[2], slots, pools)


def test_an_implementation_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="'triton'; there are"):
        shapes_of(("triton",), arguments())
    with pytest.raises(NotImplementedError, match="none was named"):
        shapes_of((), arguments())


@pytest.mark.parametrize(
    ("changes", "rank", "wanted"),
    [
        ({"T": 160}, 8, True),
        ({"T": 160}, 16, False),  # B takes too many registers
        ({"T": 162}, 8, False),  # loaded again for every other token
        ({"T": 128}, 8, False),  # few
        ({"T": 160, "p": 256}, 8, False),  # the scatters do it
    ],
)
def test_queries_are_expanded_where_the_kernel_does_it_well(changes, rank, wanted):
    projections, _, low_rank, _, pools = arguments(**changes)
    assert page_write.expands(projections, low_rank, pools, rank, implementations=page_write.ON_GPUS) == wanted
    assert not page_write.expands(projections, low_rank, pools, rank)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("program", "batch", "tokens"), [("decode", 1, 1), ("decode", 8, 1), ("prefill", 1, 16), ("prefill", 1, 320)]
)
def test_a_layer_writes_its_pages_by_one_kernel_in_place(program, batch, tokens):
    compiled, pools = aot.engine_program(program, batch, tokens)
    text = aot.text_of(compiled)
    # The last layer of a chunk writes for all of its tokens, and then is one of a decode step that writes nothing.
    assert len(re.findall(r"custom-call\(.*rotate_and_write_h128", text)) == 2 + (program == "prefill")
    assert not re.search(r"%\S*scatter\S* = bf16", text)
    products = len(re.findall(r"custom-call\(.*row_matmul_pallas_mosaic_gpu", text))
    assert products == {("decode", 1): 2 * 4, ("decode", 8): 0, ("prefill", 1): 4}[program, batch]
    assert aot.copies_of(compiled, *pools) == []


@pytest.mark.aot
@pytest.mark.parametrize(("H", "rank"), [(64, 8), (64, 16), (128, 8), (128, 16)])
def test_many_tokens_with_an_expansion_compile(H, rank):
    projections, *rest = arguments(N=32, K=8, H=H, T=160, p=64)
    shapes = {"low_rank": (2, 160, rank), "lora_b": (4, rank, 32, H)}
    arrays: Any = {name: jax.ShapeDtypeStruct(shape, "bfloat16") for name, shape in shapes.items()}
    ids: Any = jax.ShapeDtypeStruct((2,), "int32")
    projections = projections._replace(q_delta=Expansion(**arrays, adapter_ids=ids))

    def write(*args):
        return page_write.rotate_and_write(*args, implementations=("pallas_mosaic_gpu",))

    assert f"rotate_and_write_h{H}" in aot.text_of(aot.compile_for(aot.h100(), write, projections, *rest))


@pytest.mark.aot
def test_a_chunk_of_prefill_joins_no_weights_pads_no_queries_and_makes_no_array_to_add_to_them():
    """A chunk that is no multiple of the attention kernel's tile, and larger than what XLA may join products for."""
    tokens = 320
    assert tokens % 128
    assert tokens > FEW_ROWS
    text = aot.text_of(aot.engine_program("prefill", 1, tokens)[0])
    assert not re.search(r"= \(?bf16\[1024,(2048|2064)\]\S*( fusion| concatenate)", text)  # [W_q | W_k | W_v (| A)]
    assert "bf16[1,384,8,128]" not in text
    assert "bf16[1,384,1024]" not in text
    assert not re.search(r"bf16\[320,8\]\S*, \S+ bf16\[8,1024\]\S*\) -> ", text)
