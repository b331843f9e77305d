"""What two H100s would run of a Llama cut for them: its collectives and kernels, with no H100 there."""

import dataclasses

import aot
import pytest

from lragent_jax.measure.tpu_programs import Workload
from lragent_jax.measure.tpu_report import cache_copies, collectives
from lragent_jax.models.config import LlamaConfig

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("implementation", ["pallas_mosaic_gpu", "pallas_triton", "xla"])
@pytest.mark.parametrize(("program", "tokens"), [("prefill", 256), ("prefill", 2048), ("decode", 1)])
def test_two_all_reduces_a_layer_and_no_weight_or_pool_moves(program, tokens, implementation):
    config = dataclasses.replace(LlamaConfig.preset("llama-3.1-8b"), num_layers=1, vocab_size=16_384)
    workload = Workload(
        config, aot.h100(2, "model"), rank=8, tokens=tokens, page_size=64, pages=1000, width=512,
        implementation=implementation,
    )  # fmt: skip
    compiled = workload.lower(program).compile()
    assert aot.implementations_in(compiled) == {implementation}
    assert cache_copies(compiled, workload.caches()) == []
    found = collectives(compiled)
    assert found.keys() <= {"all-reduce", "all-gather"}
    reduces = 2 * config.num_layers + 1  # one for the embeddings
    last = 1 if program == "prefill" else tokens  # of which the last layer of a chunk makes hidden states
    summed = (reduces - 2) * tokens + 2 * last
    assert found["all-reduce"] == {"count": reduces, "bytes": summed * config.width * 2}
    logits = config.vocab_size * 4
    assert found["all-gather"]["bytes"] <= logits + 64  # to sample from; greedy decoding moves two numbers a device
    # The products of a row, and what stands around them: the projections; o; gate, up and SwiGLU; down.
    lines = [line for line in aot.text_of(compiled).splitlines() if " custom-call(" in line]
    own = sum("/row_matmul_pallas_mosaic_gpu/" in line for line in lines)
    assert own == (4 if implementation == "pallas_mosaic_gpu" else 0)
    pools = [pool.sharding.shard_shape(pool.shape) for kind in workload.caches() for pool in kind]
    assert pools[0][1] == config.num_kv_heads // 2
    assert aot.temporaries(compiled) < (60e6 if tokens <= 256 else 300e6)
