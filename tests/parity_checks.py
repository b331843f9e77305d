"""This side of the comparison: our readers, submodules and engine against a dict of what `parity_cases` names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import parity_cases as cases
from flax import nnx
from parity_cases import TRAJECTORY
from tolerances import assert_close

from lragent_jax.engine import Engine
from lragent_jax.models.cache_view import LayerCache, PageTable
from lragent_jax.models.folder import read_model
from lragent_jax.models.layer_adapters import LayerAdapters
from lragent_jax.models.rope import inverse_frequencies, rotation

Results = Mapping[str, np.ndarray]


def make_engine(model: Path, adapters: Mapping[str, Any] | None = None, **options: Any) -> Engine:
    """A small engine in f32: few programs to compile, pages and chunks shorter than everything that is run."""
    small: dict[str, Any] = {
        "sharing": "none", "num_pages": 256, "page_size": 8, "prefill_buckets": (16,), "decode_block": 8,
    }  # fmt: skip
    return Engine.from_pretrained(model, adapters, dtype="float32", **(small | options))


def check_submodules(model: Path, want: Results, seed: int) -> None:
    """The reader's weights in each part of the model, on inputs of its own."""
    config, graphdef, params = read_model(model, "float32")
    ids, positions = (np.asarray([x], np.int32) for x in (cases.submodule_ids(seed), cases.ROTARY_POSITIONS))
    x, small = (cases.hidden(seed, config.width, scale) for scale in (1.0, 0.01))

    @jax.jit  # one program compiles faster than fifty operations
    def outputs(params, x, small):
        llama, inv_freq = nnx.merge(graphdef, params), inverse_frequencies(config)
        block, no_adapters = llama.layers[1], LayerAdapters({}, {}, jnp.zeros(1, jnp.int32))
        cos, sin = rotation(jnp.asarray(positions), inv_freq)
        return {
            "embed": llama.embed[...][ids],
            "norm": block.attention_norm(x),
            "norm_of_small": block.attention_norm(small),
            "cos": cos,
            "sin": sin,
            "attention": _attention(block.attention, x, no_adapters, inv_freq),
            "mlp": block.mlp(x, no_adapters),
            "unembed": llama.logits(x[:, :2]),
        }

    with jax.default_matmul_precision("highest"):  # what the compiled programs ask for where weights are f32
        got = outputs(params, x, small)
    assert {f"submodule/{name}" for name in got} == {name for name in want if name.startswith("submodule/")}
    for name, array in got.items():
        assert_close(array, want[f"submodule/{name}"], "parity")


def _attention(attention, x, adapters: LayerAdapters, inv_freq):
    """One prefill of all tokens into pages of 8 that lie in no order."""
    num_tokens, page_size = x.shape[1], 8
    shape = (4, attention.config.num_kv_heads, page_size, 2 * attention.config.head_dim)
    cache = LayerCache(kv=jnp.zeros(shape, x.dtype), low_rank_v=None, low_rank_k=None)
    zero, none = jnp.zeros(1, jnp.int32), jnp.zeros((0, 1), jnp.int32)
    table = PageTable(
        q_starts=zero, kv_lens=zero + num_tokens, base=jnp.asarray([[3, 1]], jnp.int32), base_write_from=zero,
        low_rank=jnp.zeros((0, 1, 2), jnp.int32), low_rank_write_from=none, group_ids=none, read_slots=zero,
    )  # fmt: skip
    rope = rotation(table.positions(num_tokens), inv_freq)
    out, _ = attention(x, cache, adapters, table, rope, inv_freq, write_base=True, implementation=None)
    return out


def check_decode(engine: Engine, want: Results, agent: str | None, seed: int) -> None:
    """A prompt, then a given continuation and the agent's own, each in more than one way."""
    wanted = {name: want[f"decode/{agent}/{name}"] for name in ("prompt", "forced", "greedy_ids", "greedy")}
    prompt, forced, greedy = cases.prompt_ids(seed), cases.forced_ids(seed), wanted["greedy_ids"].tolist()
    with engine.trajectory() as trajectory:
        trajectory.append(prompt[:1])
        rows = [*engine.score(trajectory, prompt[1:], agent), engine.next_token_logits(trajectory, agent)]
        assert_close(np.stack(rows)[list(cases.PROMPT_ROWS)], wanted["prompt"], "parity")
        with trajectory.fork() as fork:  # all at once, in chunks
            rows = [*engine.score(fork, forced, agent), engine.next_token_logits(fork, agent)]
            assert_close(np.stack(rows)[list(cases.FORCED_ROWS)], wanted["forced"], "parity")
        with trajectory.fork() as fork:  # token by token
            kept = [row for row in cases.FORCED_ROWS if row <= 8]
            steps = [engine.next_token_logits(fork.append([token]), agent) for token in forced[:8]]
            assert_close(np.stack([steps[row - 1] for row in kept]), wanted["forced"][: len(kept)], "parity")
        with trajectory.fork() as fork:  # the compiled decode loop, and what it left in the cache
            _check_greedy(engine, fork, agent, greedy, wanted["greedy"])


def _check_greedy(engine: Engine, fork, agent: str | None, greedy: Sequence[int], want: np.ndarray) -> None:
    done, stops = 0, [row for row in cases.GREEDY_ROWS if row <= len(greedy)]
    assert len(stops) >= 2, "the continuation ends before it shows anything; choose another seed"
    for stop, logits in zip(stops, want, strict=True):
        out = engine.generate(fork, agent, max_new_tokens=stop - done, ignore_eos=True)
        assert out.token_ids == greedy[done:stop]
        assert out.num_prefilled_tokens == 1  # the token before, sampled last and not yet run, or run as a query
        assert_close(engine.next_token_logits(fork, agent), logits, "parity")
        done = stop


def check_trajectory(engine: Engine, want: Results, set_name: str, seed: int) -> None:
    """Three agents and the base model take turns on one trajectory."""
    with engine.trajectory() as trajectory:
        for index, event in enumerate(TRAJECTORY):
            agent, name = cases.agent_name(set_name, event.role), f"trajectory/{set_name}/{index}"
            if event.kind == "append":
                trajectory.append(cases.event_ids(seed, index))
            elif event.kind == "score":
                rows = engine.score(trajectory, cases.event_ids(seed, index), agent)
                assert_close(rows[cases.score_rows(event.num_tokens)], want[f"{name}/logits"], "parity")
            else:
                ids = want[f"{name}/ids"].tolist() if event.kind == "generate" else []
                if ids:
                    out = engine.generate(trajectory, agent, max_new_tokens=len(ids), ignore_eos=True)
                    assert out.token_ids == ids
                assert_close(engine.next_token_logits(trajectory, agent), want[f"{name}/logits"], "parity")
