"""Generation without the engine: the two compiled programs, and the pytrees that go through them, in plain sight.

    python scripts/generate.py MODEL --prompt "The capital of France is" [--adapter FOLDER] [--dtype float32]

One row, one adapter (or none), greedy, mode `base_lr`: the base cache holds X W_v, the low-rank cache X A of the one
A-group, and every page is its own index. `lragent generate` does the same through `Engine`, with everything it can.
"""

import argparse
import time

import jax.numpy as jnp
import numpy as np

from lragent_jax.generation import Cache, Slots, begin, decode, prefill
from lragent_jax.models.adapter_bank import CACHED_TARGETS
from lragent_jax.models.adapter_checkpoint import read_adapter
from lragent_jax.models.bank_builder import bank_ranks, build_bank
from lragent_jax.models.cache_view import BaseCache, LowRankCache, PageTable
from lragent_jax.models.folder import read_model
from lragent_jax.options import engine_dtype
from lragent_jax.sampling import sampling_arrays
from lragent_jax.sampling_params import SamplingParams
from lragent_jax.tokenizer import load_tokenizer

PAGE_SIZE = 64
DECODE_BLOCK = 16  # tokens between two looks of the host


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--dtype", help="bfloat16; float32 on a CPU")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    if arguments.max_new_tokens < 1:
        parser.error(f"--max-new-tokens is {arguments.max_new_tokens}: there is nothing to generate")

    tokenizer = load_tokenizer(arguments.model)
    if tokenizer is None:
        parser.error(f"{arguments.model} has no tokenizer")
    dtype = engine_dtype(arguments.dtype)
    config, graphdef, params = read_model(arguments.model, dtype)
    adapters = [read_adapter(arguments.adapter, config)] if arguments.adapter else []
    ids = tokenizer.encode(arguments.prompt, add_bos=True)
    if not ids:
        parser.error("the prompt is empty")

    # The adapters' weights: row 0 of the bank is the empty adapter, row 1 ours.
    bank = build_bank(config, adapters, dtype)
    adapter_ids = np.array([len(adapters)], np.int32)

    # The caches: pools of pages, one array per layer.
    num_pages = -(-(len(ids) + arguments.max_new_tokens) // PAGE_SIZE)
    base_shape = (num_pages, config.num_kv_heads, PAGE_SIZE, 2 * config.head_dim)
    layers = range(config.num_layers)
    ranks = {target: rank for target, rank in bank_ranks(adapters).items() if target in CACHED_TARGETS}
    low_rank = {
        target: tuple(jnp.zeros((num_pages, ranks[target], PAGE_SIZE), dtype) for _ in layers)
        if target in ranks
        else None
        for target in CACHED_TARGETS
    }
    cache = Cache(
        base=BaseCache(kv=tuple(jnp.zeros(base_shape, dtype) for _ in layers)),
        low_rank=LowRankCache(v=low_rank["v"], k=low_rank["k"]),
    )

    # Where the row lives. With an adapter on k or v there is one low-rank table, for the one A-group.
    num_tables = 1 if ranks else 0
    pages = np.arange(num_pages, dtype=np.int32)
    table = PageTable(
        q_starts=np.zeros(1, np.int32),
        kv_lens=np.array([len(ids)], np.int32),
        base=pages[None],
        base_write_from=np.zeros(1, np.int32),
        low_rank=np.broadcast_to(pages, (num_tables, 1, num_pages)),
        low_rank_write_from=np.zeros((num_tables, 1), np.int32),
        group_ids=np.zeros((num_tables, 1), np.int32),
        read_slots=np.zeros(1, np.int32),
    )
    sampling = sampling_arrays([SamplingParams()], [arguments.max_new_tokens], config.eos_token_ids, batch=1)

    # The prompt runs once. Caches are donated: what comes back replaces what went in.
    started = time.perf_counter()
    tokens = np.array([ids], np.int32)
    logits, _, cache = prefill(graphdef, params, bank, cache, tokens, adapter_ids, table)
    slot_ids, zeros = np.zeros(1, np.int32), np.zeros(1, np.int32)  # the row's slot is the first of one
    first, slots = begin(Slots.empty(1), logits, sampling, slot_ids, table.kv_lens, zeros)
    generated = [int(first[0])]

    # Then token after token, DECODE_BLOCK of them on the device before the host looks.
    while not slots.finished[0]:
        block, slots, cache = decode(
            graphdef, params, bank, cache, slots, slot_ids, sampling, adapter_ids, table, np.int32(DECODE_BLOCK),
            block=DECODE_BLOCK,
        )  # fmt: skip
        generated += [int(token) for token in block[0] if token >= 0]

    print(tokenizer.decode(generated))
    print(f"{len(generated)} tokens in {time.perf_counter() - started:.2f} s, compilation included")


if __name__ == "__main__":
    main()
