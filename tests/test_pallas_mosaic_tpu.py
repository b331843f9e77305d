"""The TPU kernels in Pallas' TPU interpret mode on CPU: DMAs happen when they are waited for, races are reported,
memory that nobody wrote is NaN, and reads out of bounds raise."""

import collections
import dataclasses
import functools

import jax
import numpy as np
import pytest
from attention_contract import BY_NAME, AttentionContract, Case, arguments, check, make_inputs, oracle
from jax.experimental.pallas import tpu as pltpu

from lragent_jax.kernels.interpret import interpreted
from lragent_jax.kernels.lora_attention import lora_attention, pallas_mosaic_tpu
from lragent_jax.kernels.lora_attention.pallas_mosaic_tpu import kernel
from lragent_jax.kernels.lora_attention.pallas_mosaic_tpu.block_sizes import VMEM_LIMIT, BlockSizes, heuristic

# Small enough that every context is several blocks long, several tiles and several items.
SMALL = BlockSizes(block_q=16, rows_per_item=4, block_kv=32, step_kv=16)

LARGER = dataclasses.replace(SMALL, block_kv=128, step_kv=64)  # for "many blocks", which would be slow


@pytest.fixture(autouse=True)
def small_and_interpreted(monkeypatch, capfd):
    monkeypatch.setattr(pallas_mosaic_tpu, "heuristic", lambda B, T, *_: LARGER if T == 3 else SMALL)
    pltpu.reset_tpu_interpret_mode_state()
    with interpreted():
        yield
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


class TestPallasMosaicTpu(AttentionContract):
    implementation = "pallas_mosaic_tpu"

    def refuses(self, case):
        return "dtype float16; it takes float32 and bfloat16" if case.dtype == "float16" else None


# As a TPU has it: pages of 128, heads of 64 and 128, ranks that are multiples of 8.
ON_TPU = (
    Case("decode", ((300, 301, 1), (255, 256, 2), (130, 131, 1), (0, 1, 0)), K=2, G=4, H=128, p=128, r_v=16,
         shared_pages=1, dtype="bfloat16"),
    Case("decode with low-rank keys", ((300, 301, 1), (140, 141, 2), (20, 21, 0)), K=3, G=3, H=64, p=128, r_v=8,
         r_k=16, shared_pages=1),
    Case("prefill", ((250, 290, 1), (0, 20, 2), (100, 130, 0)), T=40, K=2, G=2, H=64, p=128, r_v=16,
         dtype="bfloat16"),
    Case("prefill with low-rank keys", ((120, 140, 2), (3, 20, 1)), T=20, K=1, G=3, H=128, p=128, r_v=8, r_k=8),
)  # fmt: skip


def run(case: Case, **keywords):
    args, more = arguments(make_inputs(case))
    return lora_attention(*args, **more, **keywords, return_lse=True, implementation="pallas_mosaic_tpu")


# A page per block and two, on either path.
@pytest.mark.parametrize(
    ("case", "block_kv"), [*zip(ON_TPU, (256, 128, 256, 128), strict=True)], ids=lambda it: getattr(it, "name", it)
)
def test_shapes_of_a_tpu(case, block_kv, monkeypatch):
    monkeypatch.setattr(pallas_mosaic_tpu, "heuristic", lambda *_: dataclasses.replace(SMALL, block_kv=block_kv))
    check(case, run(case), oracle(make_inputs(case)))


# What is read.


class PageReads:
    """Counts the DMAs out of the pools, by the shape of the page and its place in the pool, as they are started."""

    def __init__(self, monkeypatch):
        self.pages = collections.Counter()
        self.real = pltpu.make_async_copy
        monkeypatch.setattr(kernel.pltpu, "make_async_copy", self.make_async_copy)

    def make_async_copy(self, source, target, semaphore):
        copy, (page,) = self.real(source, target, semaphore), source.transforms[0].indices[:1]
        count = functools.partial(self.count, tuple(source.shape))

        class Counted:
            wait = copy.wait

            @staticmethod
            def start():
                jax.debug.callback(count, page)
                copy.start()

        return Counted()

    def count(self, shape, page):
        self.pages[shape, int(page)] += 1


# A T of its own: what another test has traced would not be traced again, and not be counted.
RAGGED = dataclasses.replace(BY_NAME["prefill, ragged"], name="ragged", T=6)


@pytest.mark.parametrize("case", [*ON_TPU, RAGGED], ids=lambda case: case.name)
def test_every_page_is_read_once_per_step_or_query_tile(case, monkeypatch):
    reads, x = PageReads(monkeypatch), make_inputs(case)
    jax.block_until_ready(run(case))
    jax.effects_barrier()
    once = collections.Counter()
    for b, length in enumerate(x.kv_lens):
        starts = x.q_starts[b] + np.arange(0, case.T, SMALL.block_q)
        ends = [min(length, start + SMALL.block_q) for start in starts if max(start, 0) < length]
        for end in ends if case.T > 1 else [length]:
            columns = range(-(-end // case.p))
            once.update(((case.K, case.p, 2 * case.H), int(x.base_table[b, column])) for column in columns)
            for rank in (case.r_v, case.r_k) if x.adapter_ids[b] else ():
                once.update(((rank, case.p), int(x.low_rank_table[b, column])) for column in columns if rank)
    if case.T == 1:  # what rows share is read for all of them at once
        once = collections.Counter(set(once))
    b_reads = {(case.r_k, case.H)} if case.r_k else set()
    pages = collections.Counter({read: n for read, n in reads.pages.items() if read[0][1:] not in b_reads})
    assert pages == once  # so that bytes over the formula are 1


# What is refused, and how work is cut.


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("head dim 32; it takes 64 and multiples of 128", {"H": 32}),
        ("page size 64; it takes multiples of 128", {"p": 64}),
        ("rank 12; it takes multiples of 8", {"r_v": 12}),
    ],
)
def test_a_tpu_is_not_asked_for_what_it_would_pad(reason, changes, monkeypatch):
    monkeypatch.setattr(pallas_mosaic_tpu, "is_interpreted", lambda: False)
    with pytest.raises(NotImplementedError, match=reason):
        run(dataclasses.replace(ON_TPU[0], **changes))


@pytest.mark.parametrize(
    ("match", "sizes"),
    [
        ("block_q is 24", {"block_q": 24}),
        ("block_q is 8", {"block_q": 8}),
        ("rows_per_item is 3", {"rows_per_item": 3}),
        ("block_kv is 0", {"block_kv": 0}),
        ("step_kv is 12", {"step_kv": 12}),
    ],
)
def test_block_sizes_validate_themselves(match, sizes):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(SMALL, **sizes)


@pytest.mark.parametrize("T", [1, 8, 1024])
@pytest.mark.parametrize("model", [(8, 4, 128), (1, 4, 128), (3, 3, 64), (32, 1, 128), (8, 8, 128), (8, 4, 256)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_what_the_heuristic_picks_fits_into_vmem(T, model, itemsize):
    K, G, H = model
    sizes = heuristic(8, T, K, G, H, itemsize)
    n, m = sizes.pages(128, 1000)
    assert n % m == 0
    pages = 2 * n * 128 * K * 2 * H * itemsize
    assert pages <= 8 * 2**20
    rows = G * sizes.block_q
    accumulators = K * rows * 4 * (H + 3 * 128) + 4 * K * rows * H * itemsize
    assert T == 1 or pages + accumulators <= 0.75 * VMEM_LIMIT


def test_pages_per_block_are_whole_steps_and_no_wider_than_the_table():
    sizes = BlockSizes(block_q=16, rows_per_item=1, block_kv=1024, step_kv=512)
    assert [sizes.pages(128, W) for W in (1, 3, 4, 5, 100)] == [(1, 1), (3, 3), (4, 4), (8, 4), (8, 4)]
    assert sizes.pages(2048, 100) == (1, 1)
