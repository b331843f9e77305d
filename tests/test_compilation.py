"""What is compiled, and when: nothing after warm-up, and no program that copies a page pool."""

import re

import jax
import numpy as np
import pytest
from engines import agents, ascii_tokenizer, tiny_engine

from lragent_jax import generation
from lragent_jax.compile_watch import CompileWatch
from lragent_jax.models.adapter import random_adapter
from lragent_jax.sampling import sampling_arrays

QUESTION = [(7 * i + 3) % 128 for i in range(45)]


@pytest.mark.parametrize("mode", ["none", "base", "pre_lr", "rebase", "droidspeak"])
def test_nothing_compiles_after_warmup(mode):
    # A size that no other test uses, or their programs would hide what warm-up forgot.
    engine = tiny_engine(
        mode, tokenizer=ascii_tokenizer(), num_pages=57, num_low_rank_pages=99, num_recomputed_pages=81, max_adapters=4
    )
    steps = []
    engine.warmup(max_batch_size=2, progress=lambda done, total, what: steps.append((done, total)))
    assert steps[0][0] == 0
    assert steps[-1][0] == steps[-1][1]
    with CompileWatch() as watch:
        trajectory = engine.trajectory().append(QUESTION)
        engine.generate(trajectory, "plan", max_new_tokens=9)
        engine.score(trajectory.append("more"), QUESTION[:11], "reflect")
        fork = trajectory.fork()
        engine.generate([trajectory, fork], ["action", None], max_new_tokens=6, temperature=0.7, top_p=0.9)
        fork.rollback(13)
        engine.next_token_logits(fork, "action")
        engine.generate(fork, None, max_new_tokens=3, stop=["e", "t"])
        list(engine.stream("hello", "plan", max_new_tokens=7))
        critic = random_adapter(engine.config, rank=4, targets=("q", "k", "v"), seed=8, shared_a_seed=100)
        engine.load_adapter("critic", critic)
        engine.generate(fork, "critic", max_new_tokens=3)
        engine.unload_adapter("critic")
        engine.generate(fork, "plan", max_new_tokens=3)
    assert watch.num_programs == 0


@pytest.mark.parametrize("mode", ["none", "pre_lr", "rebase", "droidspeak"])
def test_no_program_copies_a_page_pool(mode):
    engine = tiny_engine(mode, agents(), num_pages=611, num_low_rank_pages=667, num_recomputed_pages=641)
    executor, cache = engine._executor, engine._cache.arrays
    table = executor.blank_table(1, executor.widths(1)[0], executor.low_rank_table_counts()[0])
    prefill, of_prefill = executor.prefill_arguments(
        np.zeros((1, 8), np.int32), np.zeros(1, np.int32), table, True, True
    )
    batch = executor.decode_batch([], [], sampling_arrays([], [], (), 1), 1)
    decode, of_decode = executor.decode_arguments(batch, 4)
    pools = {",".join(map(str, pool.shape)) for pool in jax.tree.leaves(cache)}
    programs = {
        "prefill": generation.prefill.lower(*prefill, **of_prefill),
        "decode": generation.decode.lower(*decode, **of_decode),
    }
    for name, lowered in programs.items():
        compiled = lowered.compile()
        text = compiled.as_text()
        assert text is not None
        assert any(f"[{shape}]" in text for shape in pools), "the program holds no pool at all"
        copies = [shape for shape in pools if re.search(rf"\[{shape}\]\S* (copy|copy-start|transpose)\(", text)]
        assert not copies, f"{name} copies {copies}"
        if jax.default_backend() != "cpu":  # GPUs add workspaces of the matrix library, far larger than tiny pools
            continue
        memory = compiled.memory_analysis()
        assert memory is not None
        assert (
            memory.temp_size_in_bytes
            < min(pool.nbytes for pool in jax.tree.leaves(cache.base)) * engine.config.num_layers
        )
