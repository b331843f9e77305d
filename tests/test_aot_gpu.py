"""Every GPU kernel compiles for an H100 at the shapes that count, in every configuration, with no H100 there."""

import dataclasses
import functools
import itertools
import math
import re
from typing import Any

import aot
import jax
import jax.numpy as jnp
import pytest
from jax.experimental.mosaic.gpu import layout_inference
from script_modules import load_script

from lragent_jax.kernels.lora_attention import LoraB, LowRank, PageTable, tuned
from lragent_jax.kernels.lora_attention.dispatch import IMPLEMENTATIONS, dispatch
from lragent_jax.kernels.lora_attention.pallas_mosaic_gpu.prefill_config import BlockSizes as MosaicPrefill
from lragent_jax.kernels.lora_attention.pallas_triton import DecodeBlockSizes, PrefillBlockSizes
from lragent_jax.kernels.row_matmul import Norm, Shrink, row_matmul
from lragent_jax.measure.tpu_programs import Workload, model_mesh
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.matrix_product import matrix_product

pytestmark = pytest.mark.aot

NAMES = [implementation.name for implementation in IMPLEMENTATIONS if "gpu" in implementation.platforms]
KERNELS = ("pallas_mosaic_gpu", "pallas_triton")
RANKS = {"merged": (0, 0), "values": (16, 0), "keys and values": (16, 16)}
# A chunk has too few queries for values to be expanded; fewer have Triton rebuild their keys on chip.
PATHS = {"prefill": (1, 2048), "chunk": (1, 512), "few": (1, 100), "decode": (1, 1), "decode, agents": (8, 1)}


def attention_shapes(B: int, T: int, r_v: int, r_k: int, p: int, H: int, G: int = 4, K: int = 8) -> tuple:
    """Arguments of `attend`, in bfloat16. The pools are far larger than what a kernel may need for itself."""
    A, W = 1 + B, 16_384 // p
    P, P_lr = (2**29 // (slot_bytes * p) for slot_bytes in (K * 2 * H * 2, 16 * 2))  # half a GiB each

    def array(*shape, dtype: Any = jnp.bfloat16) -> Any:
        return None if 0 in shape else jax.ShapeDtypeStruct(shape, dtype)

    ints = functools.partial(array, dtype=jnp.int32)
    low_rank = LowRank(array(P_lr, r_v, p), array(P_lr, r_k, p)) if r_v or r_k else None
    lora_b = LoraB(array(A, r_v, K, H), array(A, r_k, K, H)) if r_v or r_k else None
    table = PageTable(ints(B, W), ints(B, W) if low_rank else None, ints(B), ints(B))
    rope = array(H // 2, dtype=jnp.float32) if r_k else None
    return array(B, T, G * K, H), array(P, K, p, 2 * H), low_rank, lora_b, table, ints(B) if low_rank else None, rope


def compile_attention(implementation: str, shapes: tuple, **block_sizes) -> jax.stages.Compiled:
    """With the heuristic's block sizes or with those given."""

    def attend(*args):
        *args, rope_inv_freq = args
        sm_scale = args[0].shape[-1] ** -0.5
        return dispatch(
            implementation, *args, rope_inv_freq=rope_inv_freq, sm_scale=sm_scale, return_lse=False, **block_sizes
        )

    return aot.compile_for(aot.h100(), attend, *shapes)


def check(compiled: jax.stages.Compiled, shapes: tuple, implementation: str) -> None:
    """That the program is of `implementation`, kernels and all, and takes the pools as they are."""
    pools = jax.tree.leaves(shapes[1:3])
    assert aot.implementations_in(compiled) == {implementation}
    assert ("custom-call" in aot.text_of(compiled)) == (implementation in KERNELS)
    assert aot.copies_of(compiled, *pools) == []
    assert aot.temporaries(compiled) < min(math.prod(pool.shape) * pool.dtype.itemsize for pool in pools)


def test_the_kernels_are_registered():
    assert set(KERNELS) < set(NAMES)


# Every path with every kind of adapter at the shapes of 8B, and each once with heads of 64.
OF_LLAMA = [(path, ranks, 64, 128) for path in PATHS for ranks in RANKS] + [
    ("prefill", "keys and values", 128, 64), ("few", "values", 128, 64), ("few", "keys and values", 128, 64),
    ("decode", "merged", 128, 64), ("decode, agents", "values", 128, 64),
]  # fmt: skip


@pytest.mark.parametrize(("path", "ranks", "p", "H"), OF_LLAMA)
@pytest.mark.parametrize("implementation", NAMES)
def test_compiles_at_the_shapes_of_llama(implementation, path, ranks, p, H):
    shapes = attention_shapes(*PATHS[path], *RANKS[ranks], p, H)
    compiled = compile_attention(implementation, shapes)
    check(compiled, shapes, implementation)
    assert expands(compiled) == EXPANDED.get((implementation, path, ranks), set())


# By Triton keys and values together, by Mosaic each on its own.
EXPANDED = {
    ("pallas_mosaic_gpu", "prefill", "values"): {"lora_expand_v16"},
    ("pallas_mosaic_gpu", "prefill", "keys and values"): {"lora_expand_v16", "lora_expand_k16"},
    ("pallas_mosaic_gpu", "chunk", "keys and values"): {"lora_expand_k16"},
    ("pallas_mosaic_gpu", "few", "keys and values"): {"lora_expand_k16"},
    ("pallas_triton", "prefill", "values"): {"lora_expand"},
    ("pallas_triton", "prefill", "keys and values"): {"lora_expand"},
    ("pallas_triton", "chunk", "keys and values"): {"lora_expand"},
}


def expands(compiled: jax.stages.Compiled) -> set[str]:
    """Names of the kernels that expand low-rank keys or values, ranks included, where they carry them."""
    return set(re.findall(r"lora_expand(?:_[vk]\d+)?", aot.text_of(compiled)))


@pytest.mark.parametrize(("r_v", "r_k", "p", "H"), [(0, 64, 16, 128), (24, 48, 256, 64), (64, 0, 32, 64)])
def test_whatever_is_expanded_compiles(r_v, r_k, p, H):
    shapes = attention_shapes(2, 2048, r_v, r_k, p, H)
    compiled = compile_attention("pallas_mosaic_gpu", shapes)
    check(compiled, shapes, "pallas_mosaic_gpu")
    assert expands(compiled) == {f"lora_expand_{target}{r}" for target, r in (("v", r_v), ("k", r_k)) if r}


@pytest.mark.parametrize(("r_v", "G", "K"), [(8, 1, 2), (24, 3, 2), (32, 7, 2), (8, 16, 2), (64, 4, 8)])
@pytest.mark.parametrize("path", ["prefill", "few", "decode, agents"])
@pytest.mark.parametrize("implementation", KERNELS)
def test_compiles_at_other_ranks_and_group_sizes(implementation, path, r_v, G, K):
    shapes = attention_shapes(*PATHS[path], r_v, 0, 64, 128, G=G, K=K)
    check(compile_attention(implementation, shapes), shapes, implementation)


@pytest.mark.parametrize("implementation", KERNELS)
def test_compiles_for_any_number_of_queries(implementation):
    shapes = attention_shapes(2, 301, 16, 0, 64, 128)
    check(compile_attention(implementation, shapes), shapes, implementation)


def test_what_barely_fits_the_shared_memory_compiles():
    """Three stages of low-rank keys would, but for the barriers between them."""
    shapes = attention_shapes(1, 3, 8, 32, 128, 128, G=3, K=4)
    check(compile_attention("pallas_mosaic_gpu", shapes), shapes, "pallas_mosaic_gpu")


def tuned_entries() -> list[tuned.Entry]:
    return list(itertools.chain(*(tuned.read(file) for file in sorted(tuned.FOLDER.glob("*h100*.json")))))


def test_tuned_block_sizes_compile():
    tuner = load_script("tune_kernels")
    for entry in tuned_entries():
        kernel, shape = tuner.KERNELS[entry.implementation, entry.path], entry.shape
        case = tuner.AttentionCase(8192, T=8192 if entry.path == "prefill" else 1, B=max(1, shape.rows))
        block_sizes = type(kernel.heuristic(case, tuner.Heads()))(**entry.block_sizes)
        # Of low-rank caches that many queries expand, few read them as they are.
        B, T = (shape.rows, 1) if shape.rows else PATHS["chunk" if shape.r_v else "prefill"]
        shapes = attention_shapes(B, T, shape.r_v, shape.r_k, shape.p, shape.H, G=shape.G)
        check(compile_attention(entry.implementation, shapes, block_sizes=block_sizes), shapes, entry.implementation)


@pytest.mark.parametrize(
    ("implementation", "path", "block_sizes"),
    [
        ("pallas_mosaic_gpu", "prefill", MosaicPrefill(block_kv=128, num_stages=6)),
        ("pallas_triton", "prefill", PrefillBlockSizes(block_q=256, block_kv=256, num_warps=8, num_stages=6)),
        ("pallas_triton", "decode", DecodeBlockSizes(block_kv=256, rows_per_item=1, num_warps=8, num_stages=8)),
    ],
)
def test_what_shared_memory_does_not_hold_is_refused(implementation, path, block_sizes):
    shapes = attention_shapes(*PATHS[path], 16, 0, 64, 128)
    with pytest.raises((NotImplementedError, ValueError, RuntimeError), match=r"(?i)shared memory|smem"):
        compile_attention(implementation, shapes, block_sizes=block_sizes)


def test_a_copied_pool_is_seen():
    shapes = attention_shapes(1, 1, 16, 0, 64, 128)
    base, low_rank = shapes[1:3]
    copied = aot.compile_for(aot.h100(), lambda base, v: (base.swapaxes(1, 2), v + 0), base, low_rank.v)
    assert len(aot.copies_of(copied, base)) > 0
    with pytest.raises(AssertionError):
        check(copied, shapes, "xla")


@pytest.mark.parametrize(
    ("equation", "x", "weight"),
    [
        ("bti,io->bto", (1, 1, 4096), (4096, 1024)),
        ("btd,bdr->btr", (8, 1, 4096), (8, 4096, 16)),
    ],
)
def test_a_token_times_a_weight_is_a_product_of_matrices(equation, x, weight):
    """And would be none if it were written down plainly: once that is no longer so, `matrix_product` can go."""

    def plain(x, weight):
        return jnp.einsum(equation, x, weight)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (x, weight)]
    found = [
        bool(re.search(r" dot\(|__cublas", aot.compile_for(aot.h100(), product, *shapes).as_text() or ""))
        for product in (plain, functools.partial(matrix_product, plain))
    ]
    assert found == [False, True]


@pytest.mark.parametrize("rows", [1, 16])
def test_the_products_of_a_decode_step_compile_and_copy_no_weight(rows):
    def array(*shape) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def layer(x, attended, scale, qkv, o, gate_up, down, shrinks):
        norm = Norm(scale, 1e-5)
        use = functools.partial(row_matmul, implementation="pallas_mosaic_gpu")
        q, k, v, normed, *low_rank = use(x, qkv, norm=norm, keep_normed=True, shrinks=shrinks)
        (x,) = use(attended, [o], residual=x)
        (hidden,) = use(x, gate_up, norm=norm, gated=True)
        return q, k, v, normed, low_rank, use(hidden, [down], residual=x)

    D, F, KV = 4096, 14_336, 1024
    weights = [array(D, D), array(D, KV), array(D, KV)], array(D, D), [array(D, F), array(D, F)], array(F, D)
    groups: Any = jax.ShapeDtypeStruct((2, rows), jnp.int32)
    shrinks = [Shrink(array(5, D, rank), groups) for rank in (8, 64)]
    compiled = aot.compile_for(aot.h100(), layer, array(rows, D), array(rows, D), array(D), *weights, shrinks)
    assert aot.text_of(compiled).count('custom_call_target="mosaic_gpu') == 4
    assert aot.copies_of(compiled, *jax.tree.leaves((weights, shrinks))) == []
    assert aot.temporaries(compiled) < 2 * rows * 2 * (2 * D + F)


@pytest.mark.parametrize(("rank", "added"), [(8, False), (24, True)])
def test_a_layer_of_one_row_is_seven_kernels(rank, added):
    """At the shapes of 8B, with adapters on q and v: XLA adds none of its own to those that are written here.

    But for a rank that the products' kernel does not take: there X A and its way to the page write are XLA's.
    """
    config = dataclasses.replace(LlamaConfig.preset("llama-3.1-8b"), num_layers=3, vocab_size=512)
    workload = Workload(
        config=config, mesh=model_mesh(aot.h100().devices.flatten()), page_size=64, pages=700, width=64, rank=rank,
        batch=1, tokens=1, implementation="pallas_mosaic_gpu",
    )  # fmt: skip
    computations = aot.text_of(workload.lower("decode").compile()).split("\n}\n")
    [step] = (text for text in computations if text.count("rotate_and_write_h128/") >= config.num_layers)
    launched = [line for line in step.splitlines() if re.search(r" (fusion|custom-call|copy|reduce|dot)\(", line)]
    written_here = ("row_matmul_pallas_mosaic_gpu", "rotate_and_write_h128", "lora_attention_pallas_mosaic_gpu")

    def named(line: str) -> str:
        return next((name for name in written_here if "mosaic_gpu_v" in line and name in line), "XLA")

    names = [named(line) for line in launched]
    product, write, attention = written_here
    first = [i for i, name in enumerate(names) if name == product][::4]
    of_layer = names[first[1] : first[2]]
    assert [name for name in of_layer if name != "XLA"] == [product, write, attention, attention, *[product] * 3]
    assert ("XLA" in of_layer) == added


@pytest.mark.parametrize(("program", "tokens"), [("decode", 1), ("prefill", 1024)])
def test_kernels_are_lowered_without_a_solver_of_layouts(monkeypatch, program, tokens):
    """It is slow, and finds what is written in the kernels."""
    solved = []
    monkeypatch.setattr(layout_inference, "infer_layout", lambda module, **_: solved.append(module))
    jax.clear_caches()
    text = aot.engine_workload(batch=1, tokens=tokens).lower(program).as_text()
    assert "mosaic_gpu" in text
    assert solved == []


def test_nothing_is_kept_on_disk_for_a_device_that_cannot_read_it():
    """JAX would fail at the second compilation if the cache that the tests switch on held the first."""

    def double(x):
        return 2 * x

    for _ in range(2):
        jax.clear_caches()
        aot.compile_for(aot.h100(), double, jax.ShapeDtypeStruct((128,), jnp.float32))
