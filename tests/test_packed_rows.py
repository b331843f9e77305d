"""The forward pass over packed rows: the engine's logits, whatever lies beside a sequence in its row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import CONFIG, tiny_engine, weights
from flax import nnx
from tolerances import assert_close

from lragent_jax.models.adapter import Adapter, random_adapter
from lragent_jax.models.adapter_bank import TARGETS, LoraPair
from lragent_jax.models.packed_rows import PackedRows, attend_packed

ADAPTER = random_adapter(CONFIG, rank=3, targets=TARGETS, seed=5, scale=0.3)


def pairs_of(adapter: Adapter | None) -> tuple[dict[str, LoraPair], ...]:
    """One adapter's matrices as the model takes them."""
    pairs: tuple[dict[str, LoraPair], ...] = tuple({} for _ in range(CONFIG.num_layers))
    for (layer, target), (lora_a, lora_b) in adapter.weights.items() if adapter else ():
        pairs[layer][target] = LoraPair(lora_a=jnp.asarray(lora_a)[None], lora_b=jnp.asarray(lora_b)[None])
    return pairs


def pack(length: int, *rows: list[list[int]]) -> PackedRows:
    """Every row's sequences behind one another, then padding."""
    tokens, positions, segments = (np.zeros((len(rows), length), np.int32) for _ in range(3))
    for row, sequences in enumerate(rows):
        start = 0
        for number, ids in enumerate(sequences, start=1):
            here = row, slice(start, start + len(ids))
            tokens[here], positions[here], segments[here] = ids, np.arange(len(ids)), number
            start += len(ids)
    return PackedRows(tokens=jnp.asarray(tokens), positions=jnp.asarray(positions), segments=jnp.asarray(segments))


def logits(rows: PackedRows, adapter: Adapter | None) -> np.ndarray:
    graphdef, params = weights()

    @jax.jit
    def run(params, rows, pairs):
        model = nnx.merge(graphdef, params)
        return model.logits(model.packed(rows, pairs))

    return np.asarray(run(params, rows, pairs_of(adapter)))


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["base", "all targets"])
def test_logits_are_the_engines(adapter):
    rng = np.random.default_rng(0)
    one, two, three = ([int(i) for i in rng.integers(2, 128, count)] for count in (21, 9, 30))
    got = logits(pack(40, [one, two], [three]), adapter)
    engine = tiny_engine("none", {} if adapter is None else {"plan": adapter})
    agent = None if adapter is None else "plan"
    for ids, rows in ((one, got[0, :21]), (two, got[0, 21:30]), (three, got[1, :30])):
        with engine.trajectory().append(ids[:1]) as trajectory:
            want = [*engine.score(trajectory, ids[1:], agent), engine.next_token_logits(trajectory, agent)]
        assert_close(rows, np.stack(want), "equal")


def test_what_cudnn_cannot_run_is_left_to_xla():
    q, k = jnp.ones((1, 8, 6, 8)), jnp.ones((1, 8, 2, 8))
    mask = jnp.ones((1, 1, 8, 8), bool)
    np.testing.assert_array_equal(attend_packed(q, k, k, mask, None), attend_packed(q, k, k, mask, "xla"))
