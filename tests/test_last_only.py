"""A chunk whose last layer makes nothing but keys and values of all tokens but the last, against one that does all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import tiny_engine
from tolerances import assert_close

from lragent_jax import generation
from lragent_jax.models.cache_view import PageTable
from lragent_jax.models.llama import Block
from lragent_jax.sharing import SHARING_MODES


@pytest.fixture(autouse=True)
def nothing_stays_traced():
    """Neither what was traced before nor, behind a test, what it traced: its wrong layers are no one else's."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def run(mode: str, least: int, monkeypatch, **options) -> tuple[list[np.ndarray], list[list[int]], int]:
    """Logits and pools, and tokens, of three agents' turns over a growing context and of a batch of unequal ones; and
    how often a layer was traced that only writes.
    """
    writes, write = [], Block.write

    def counted(self, *args, **kwargs):
        writes.append(args)
        return write(self, *args, **kwargs)

    monkeypatch.setattr(Block, "write", counted)
    monkeypatch.setattr(generation, "LEAST_LAST_ONLY", least)
    jax.clear_caches()  # what was traced before is not traced again
    engine, logits, rng = tiny_engine(mode, **options), [], np.random.default_rng(0)
    with engine.trajectory() as trajectory:
        for agent in ("plan", "action", "reflect", "plan"):
            trajectory.append(rng.integers(3, 90, 37).tolist())
            logits.append(engine.next_token_logits(trajectory, agent)[None])
            engine.generate(trajectory, agent, max_new_tokens=3, ignore_eos=True)
            logits.append(engine.score(trajectory, [5, 6, 7], "reflect"))
        tokens = [trajectory.token_ids]
    prompts = [rng.integers(3, 90, n).tolist() for n in (3, 11, 29, 32)]
    outputs = engine.generate(prompts, ["plan", "reflect", "action", "plan"], max_new_tokens=3, ignore_eos=True)
    pools = jax.tree.map(np.asarray, engine._cache.arrays)
    return [*logits, *jax.tree.leaves(pools)], tokens + [out.token_ids for out in outputs], len(writes)


@pytest.mark.parametrize("mode", SHARING_MODES)
def test_it_leaves_the_same_cache_and_the_same_logits(mode, monkeypatch):
    options = {"recompute_layers": (1,)} if mode == "droidspeak" else {}
    want, tokens, writes = run(mode, 10**9, monkeypatch, **options)
    assert not writes
    got, tokens_too, writes = run(mode, 8, monkeypatch, **options)
    assert writes
    assert tokens_too == tokens
    for ours, theirs in zip(got, want, strict=True):
        assert_close(ours, theirs, "equal")


@pytest.mark.parametrize("wrong", ["the token before the last", "nothing written"])
def test_a_wrong_last_layer_is_seen(wrong, monkeypatch):
    want, *_ = run("base_lr", 10**9, monkeypatch)
    if wrong == "nothing written":
        monkeypatch.setattr(Block, "write", lambda self, x, cache, *args, **kwargs: cache)
    else:
        last_tokens = PageTable.last_tokens
        monkeypatch.setattr(
            PageTable, "last_tokens",
            lambda self, count: (jnp.maximum(0, last_tokens(self, count)[0] - 1), last_tokens(self, count)[1]),
        )  # fmt: skip
    got, *_ = run("base_lr", 8, monkeypatch)
    ours, theirs = (np.concatenate([x.ravel() for x in results]) for results in (got, want))
    with pytest.raises(AssertionError):
        assert_close(ours, theirs, "equal")
