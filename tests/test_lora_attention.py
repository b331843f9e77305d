"""The attention operation: implementations against the contract, the contract against broken implementations, the
checks on arguments, the choice of implementation, and what the compiled program holds."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_contract import BY_NAME, AttentionContract, arguments, check, make_inputs, oracle

from lragent_jax.kernels.lora_attention import LoraB, LowRank, PageTable, lora_attention, xla
from lragent_jax.kernels.lora_attention.dispatch import IMPLEMENTATIONS, Implementation, default_platform, dispatch


class TestXla(AttentionContract):
    implementation = "xla"

    def test_block_size_changes_nothing(self):
        case = BY_NAME["low-rank keys"]
        args, keywords = arguments(make_inputs(case))
        keywords |= {"sm_scale": case.H**-0.5, "return_lse": True}
        got = xla.lora_attention(*args, **keywords, block_sizes=xla.BlockSizes(24))  # one page of 16
        check(case, got, oracle(make_inputs(case)))

    def test_number_of_blocks_is_data(self):
        args, keywords = arguments(make_inputs(BY_NAME["many blocks"]))
        jaxpr = str(jax.make_jaxpr(lambda *args: lora_attention(*args, **keywords, implementation="xla"))(*args))
        assert "while[" in jaxpr  # a loop of known length would be a scan
        assert "scan[" not in jaxpr


class TestReference(AttentionContract):
    implementation = "reference"


# What the compiled program holds.

K, p, H, r, W = 2, 16, 32, 4, 8
POOL, LOW_RANK_POOL = (50_000, K, p, 2 * H), (40_000, r, p)


def decode(base, low_rank, lora_b, table, q, kv_len):
    """Eight steps of one row: a token is written into both pools, then all of them are read."""

    def step(_, carry):
        base, low_rank, q, kv_len = carry
        page, slot = table[0, kv_len // p], kv_len % p
        rows = (page * K + jnp.arange(K)) * p + slot
        token = jnp.broadcast_to(q[0, 0, 0], (K, 2, H)).reshape(K, 2 * H)
        base = base.reshape(-1, 2 * H).at[rows].set(token, mode="drop").reshape(base.shape)
        cells = (page * r + jnp.arange(r)) * p + slot
        low_rank = low_rank.reshape(-1).at[cells].set(q[0, 0, 0, :r], mode="drop").reshape(low_rank.shape)
        pages = PageTable(table, table, kv_len[None], kv_len[None] + 1)
        adapter_ids = jnp.ones(1, jnp.int32)
        q = lora_attention(q, base, LowRank(low_rank), lora_b, pages, adapter_ids, implementation="xla")
        return base, low_rank, q, kv_len + 1

    return jax.lax.fori_loop(0, 8, step, (base, low_rank, q, kv_len))


def compile_decode(**jit_arguments):
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    i32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    lora_b = jax.eval_shape(lambda: LoraB(jnp.zeros((3, r, K, H))))
    arguments = f32(POOL), f32(LOW_RANK_POOL), lora_b, i32((1, W)), f32((1, 1, 2 * K, H)), i32(())
    return jax.jit(decode, **jit_arguments).lower(*arguments).compile()


def temporaries(compiled) -> int:
    """Bytes that the program needs beside its arguments and results."""
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def pool_copies(compiled) -> int:
    """How many `copy` operations of the size of a pool the program holds, whatever shape they give it."""
    sizes = {math.prod(POOL), math.prod(LOW_RANK_POOL)}
    copies = re.findall(r"= f32\[([\d,]+)\]\S* copy\(", compiled.as_text())
    return sum(math.prod(map(int, shape.split(","))) in sizes for shape in copies)


def test_a_decode_loop_copies_no_pool():
    compiled = compile_decode(donate_argnums=(0, 1))
    assert pool_copies(compiled) == 0
    assert temporaries(compiled) < 4 * math.prod(LOW_RANK_POOL)


def test_pool_copies_are_seen_where_there_are_some():
    assert pool_copies(compile_decode()) == 2  # not donated: both have to be kept


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_memory_follows_the_block_and_not_the_table(implementation):
    def at_width(width):
        x = make_inputs(BY_NAME["merged"])._replace(base_table=np.zeros((2, width), np.int32))
        args, keywords = arguments(x)
        attend = jax.jit(lambda *args: lora_attention(*args, **keywords, implementation=implementation))
        return temporaries(attend.lower(*args).compile())

    narrow, wide = 1024, 4096  # both wider than the largest block
    table_grows_by = 2 * 4 * (wide - narrow)
    grows = at_width(wide) - at_width(narrow) > 2 * table_grows_by
    assert grows == (implementation == "reference")


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_f32_is_multiplied_as_f32(implementation):
    """GPUs and TPUs round f32 operands unless told otherwise; on CPU no result would show it."""
    args, keywords = arguments(make_inputs(BY_NAME["low-rank keys"]))
    attend = jax.jit(lambda *args: lora_attention(*args, **keywords, implementation=implementation))
    text = attend.lower(*args).as_text()
    assert text.count("dot_general") == text.count("precision = [HIGHEST, HIGHEST]") >= 4


# Block sizes.


@pytest.mark.parametrize("block_kv", [0, -8, 12])
def test_block_sizes_validate_themselves(block_kv):
    with pytest.raises(ValueError, match=f"block_kv is {block_kv}; it must be a positive multiple of 8"):
        xla.BlockSizes(block_kv)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_heuristic_bounds_the_memory_of_a_block(platform):
    for elements_per_key in (1, 384, 2**14, 2**14 + 1, 2**17, 2**30):
        block_kv = xla.heuristic(elements_per_key, platform).block_kv
        assert 256 <= block_kv <= 4096
        assert block_kv == 256 or block_kv * elements_per_key <= xla.MAX_BLOCK_ELEMENTS
    assert xla.heuristic(1, "gpu").block_kv > xla.heuristic(1, "cpu").block_kv


# The checks on arguments.


def bad(match, **changes):
    return pytest.param(changes, match, id="-".join(changes) + ": " + match)


def zeros(*shape, dtype=jnp.float32):
    return lambda: jnp.zeros(shape, dtype)


def i32(*values):
    return lambda: jnp.array(values, jnp.int32)


# The sound call: B = 3, T = 5, N = 9, H = 64, K = 3, p = 16, r_v = 8, r_k = 16, adapters 0 to 3, W = 4, P = 15.
BAD_ARGUMENTS = [
    bad(r"q has shape \(3, 9, 64\); it must be \[B, T, N, H\]", q=zeros(3, 9, 64)),
    bad("none of them 0", q=zeros(3, 0, 9, 64)),
    bad("q has dtype int32; it must be one of float32, bfloat16, float16", q=zeros(3, 5, 9, 64, dtype=jnp.int32)),
    bad("head dim 63 must be even", q=zeros(3, 5, 9, 63)),
    bad(r"base has shape \(15, 3, 16, 64\); beside q of shape .* = \[any, any, any, 128\]", base=zeros(15, 3, 16, 64)),
    bad(r"beside q of shape \(3, 5, 9, 64\)", base=zeros(15, 16, 128)),
    bad("base has dtype bfloat16; beside q it must be float32", base=zeros(15, 3, 16, 128, dtype=jnp.bfloat16)),
    bad(r"with q of shape .* its K = 2 must divide N = 9", base=zeros(15, 2, 16, 128)),
    bad("page size 12 must be a positive multiple of 8", base=zeros(15, 3, 12, 128)),
    bad(r"page_table.base has shape \(2, 4\); beside q of shape", table=zeros(2, 4, dtype=jnp.int32)),
    bad("page_table.base has dtype float32", table=zeros(3, 4)),
    bad("page_table.base has no columns", table=zeros(3, 0, dtype=jnp.int32)),
    bad("page_table.low_rank is None", low_rank_table=lambda: None),
    bad(r"page_table.low_rank has shape .* beside page_table.base", low_rank_table=zeros(3, 5, dtype=jnp.int32)),
    bad("page_table.q_starts has shape", q_starts=i32(1, 2)),
    bad("page_table.kv_lens has shape", kv_lens=i32(1, 2)),
    bad("page_table.kv_lens is .*65.* holds 0 to 64 keys", kv_lens=i32(25, 65, 12)),
    bad("page_table.kv_lens is .*-1", kv_lens=i32(25, -1, 12)),
    bad("low_rank is given and lora_b is not", lora_b=lambda: None),
    bad("lora_b is given and low_rank is not", low_rank=lambda: None),
    bad("low_rank is given and lora_b is not", b_v=lambda: None, b_k=lambda: None),
    bad("low_rank.v is given and lora_b.v is None", b_v=lambda: None),
    bad("lora_b.k is given and low_rank.k is None", low_rank_k=lambda: None),
    bad(r"low_rank.v has shape \(15, 8, 32\); beside base .* = \[any, any, 16\]", low_rank_v=zeros(15, 8, 32)),
    bad("low_rank.k has dtype float16; beside base", low_rank_k=zeros(15, 16, 16, dtype=jnp.float16)),
    bad("at least one page of rank 1", low_rank_v=zeros(0, 8, 16)),
    bad(r"lora_b.v has shape \(4, 4, 3, 64\); beside low_rank.v of shape", b_v=zeros(4, 4, 3, 64)),
    bad(r"lora_b.k has shape \(4, 16, 9, 64\); beside low_rank.k of shape", b_k=zeros(4, 16, 9, 64)),
    bad("lora_b.v has 5 adapters and lora_b.k 4", b_v=zeros(5, 8, 3, 64)),
    bad("adapter_ids is None", adapter_ids=lambda: None),
    bad("adapter_ids has shape", adapter_ids=i32(1, 2)),
    bad(r"adapter_ids is \[1, -1, 0\]; lora_b holds adapters 0 to 3", adapter_ids=i32(1, -1, 0)),
    bad(r"adapter_ids is \[1, 4, 0\]; lora_b holds adapters 0 to 3", adapter_ids=i32(1, 4, 0)),
    bad("rope_inv_freq is None", inv_freq=lambda: None),
    bad("rope_inv_freq has shape .* beside q", inv_freq=zeros(64)),
    bad("rope_inv_freq has dtype bfloat16", inv_freq=zeros(32, dtype=jnp.bfloat16)),
    bad("no implementation of lora_attention is called 'cudnn'; there are: .*xla", implementation=lambda: "cudnn"),
]


@pytest.mark.parametrize(("changes", "match"), BAD_ARGUMENTS)
def test_misuse_is_a_value_error(changes, match):
    (q, base, low_rank, lora_b, table, adapter_ids), keywords = arguments(make_inputs(BY_NAME["low-rank keys"]))
    sound = {
        "q": q, "base": base, "low_rank_v": low_rank.v, "low_rank_k": low_rank.k, "b_v": lora_b.v, "b_k": lora_b.k,
        "table": table.base, "low_rank_table": table.low_rank, "q_starts": table.q_starts, "kv_lens": table.kv_lens,
        "adapter_ids": adapter_ids, "inv_freq": keywords["rope_inv_freq"], "implementation": None,
    }  # fmt: skip
    assert set(changes) <= {*sound, "low_rank", "lora_b"}
    call = sound | {name: make() for name, make in changes.items()}
    low_rank = call.get("low_rank", LowRank(call["low_rank_v"], call["low_rank_k"]))
    lora_b = call.get("lora_b", LoraB(call["b_v"], call["b_k"]))
    table = PageTable(call["table"], call["low_rank_table"], call["q_starts"], call["kv_lens"])
    with pytest.raises(ValueError, match=match):
        lora_attention(
            *(call["q"], call["base"], low_rank, lora_b, table, call["adapter_ids"]),
            rope_inv_freq=call["inv_freq"],
            implementation=call["implementation"],
        )


def test_lengths_beyond_the_table_are_cut_under_jit():
    x = make_inputs(BY_NAME["merged"], garbage=0.5)
    keys = x.base_table.shape[1] * BY_NAME["merged"].p
    x = x._replace(q_starts=np.full(2, keys - 2, np.int32), kv_lens=np.full(2, keys, np.int32))
    args, _ = arguments(x._replace(kv_lens=x.kv_lens + np.int32(7)))
    got = jax.jit(lambda *args: lora_attention(*args, return_lse=True))(*args)
    check(BY_NAME["merged"], got, oracle(x))


def test_an_empty_low_rank_cache_is_plain_attention():
    (q, base, _, _, table, _), _ = arguments(make_inputs(BY_NAME["merged"]))
    adapter_ids = jnp.ones(2, jnp.int32)

    def program(low_rank, lora_b, adapter_ids):
        return str(
            jax.make_jaxpr(lambda q, base: lora_attention(q, base, low_rank, lora_b, table, adapter_ids))(q, base)
        )

    assert program(LowRank(None), LoraB(None), adapter_ids) == program(None, None, None)


# The choice of implementation.


@dataclasses.dataclass(frozen=True)
class Fake(Implementation):
    """Returns its name, or raises."""

    error: Exception | None = None

    def load(self):
        def call():
            if self.error is not None:
                raise self.error
            return self.name

        return call


HERE, ELSEWHERE = (default_platform(),), ("abacus",)
FIRST = Fake("first", HERE, NotImplementedError("no wgmma"))
SECOND = Fake("second", HERE, NotImplementedError("H = 63"))


def test_the_first_that_fits_is_taken():
    fakes = (Fake("foreign", ELSEWHERE), FIRST, Fake("fitting", HERE), Fake("later", HERE))
    assert dispatch(None, implementations=fakes) == "fitting"


def test_a_named_one_runs_anywhere_and_never_falls_back():
    fakes = (FIRST, Fake("fitting", HERE), Fake("foreign", ELSEWHERE))
    assert dispatch("foreign", implementations=fakes) == "foreign"
    with pytest.raises(NotImplementedError, match=r"^no wgmma$"):
        dispatch("first", implementations=fakes)


def test_where_nothing_fits_all_reasons_are_given():
    with pytest.raises(NotImplementedError, match=f"fits on {HERE[0]}: first: no wgmma; second: H = 63"):
        dispatch(None, implementations=(FIRST, SECOND))
    with pytest.raises(NotImplementedError, match="none is registered for it"):
        dispatch(None, implementations=(Fake("foreign", ELSEWHERE),))


def test_misuse_found_by_an_implementation_is_not_swallowed():
    with pytest.raises(ValueError, match="mine"):
        dispatch(None, implementations=(Fake("first", HERE, ValueError("mine")), Fake("fitting", HERE)))


def test_every_registered_implementation_is_there():
    assert all(callable(implementation.load()) for implementation in IMPLEMENTATIONS)


def test_a_default_device_decides_the_platform():
    with jax.default_device(jax.devices("cpu")[0]):
        assert default_platform() == "cpu"


def test_unasked_a_cpu_runs_xla():
    args, keywords = arguments(make_inputs(BY_NAME["decode"]))
    with jax.default_device(jax.devices("cpu")[0]):
        lowered = jax.jit(lambda *args: lora_attention(*args, **keywords)).lower(*args)
    assert "lora_attention_xla/" in lowered.as_text(debug_info=True)
