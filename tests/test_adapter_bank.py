"""The bank on the device computes what each adapter computes alone, in shapes that loading another does not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from tolerances import assert_close

from lragent_jax.models.adapter import Adapter, LoraWeights, random_adapter, stack_adapters
from lragent_jax.models.adapter_bank import TARGETS, AdapterBank, lora_delta, shrink_by_group
from lragent_jax.models.bank_builder import assign_groups, bank_ranks, build_bank
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import AdapterError
from lragent_jax.models.sharding import bank_shardings

CONFIG = LlamaConfig.preset("tiny")
SHAPES = CONFIG.projection_shapes()


def adapter(seed: int, *targets: str, rank: int = 3, shared: int | None = None) -> Adapter:
    return random_adapter(CONFIG, rank=rank, seed=seed, targets=targets, shared_a_seed=shared, scale=1.0)


def layers_only(of: Adapter, *layers: int) -> Adapter:
    return Adapter({place: pair for place, pair in of.weights.items() if place[0] in layers})


MIXED = [
    adapter(1, "q", "v", shared=7),
    adapter(2, "q", "o", "gate", rank=5),  # touches no cached target
    adapter(3, "v", shared=7),  # the A-group of the first
    adapter(4, "k", "v", "down", rank=2),
    layers_only(adapter(5, "v", "up"), 1),
    adapter(6, "q", "v", shared=7, rank=1),  # the seed of the first, another rank: another A
]


def test_groups_are_found_by_content():
    assert assign_groups(MIXED) == (0, None, 0, 1, 2, 3)
    assert assign_groups([]) == ()
    assert set(assign_groups(stack_adapters(MIXED))) == {0}
    assert bank_ranks(MIXED) == {"q": 5, "k": 2, "v": 3, "o": 5, "gate": 5, "up": 3, "down": 2}
    assert bank_ranks([]) == {}


@pytest.mark.parametrize("spare", [False, True])
def test_every_row_of_a_mixed_bank_computes_its_adapter(spare):
    room = {"num_adapters": 9, "num_groups": 6, "ranks": dict.fromkeys(TARGETS, 8)} if spare else {}
    bank = build_bank(CONFIG, MIXED, "float32", **room)
    assert len(bank.layers) == CONFIG.num_layers
    rows = 9 if spare else 1 + len(MIXED)
    rng = np.random.default_rng(0)
    delta = jax.jit(lora_delta)
    for layer, pairs in enumerate(bank.layers):
        assert set(pairs) == set(bank.group_of) == set(TARGETS)
        for target, pair in pairs.items():
            in_width, out_width = SHAPES[target]
            ids = np.arange(rows - 1, -1, -1, dtype=np.int32)  # row i of the batch runs adapter rows - 1 - i
            x = rng.standard_normal((rows, 2, in_width), np.float32)
            with jax.default_matmul_precision("highest"):
                got = delta(x, pair, bank.group_of[target], ids)
            want = np.zeros((rows, 2, out_width), np.float32)
            for row, adapter_id in enumerate(ids):
                if 0 < adapter_id <= len(MIXED) and (layer, target) in MIXED[adapter_id - 1].weights:
                    lora_a, lora_b = MIXED[adapter_id - 1].weights[layer, target]
                    want[row] = x[row] @ lora_a @ lora_b
            assert_close(got, want, "equal")
            idle = [row for row, i in enumerate(ids) if i == 0 or i > len(MIXED)]
            assert not np.asarray(got)[idle].any(), "the empty adapter and free rows add exactly nothing"


def test_cached_targets_share_their_group_rows():
    bank = build_bank(CONFIG, MIXED, "float32")
    want = [0, 0, 0, 0, 1, 2, 3]  # the empty adapter and the one without cached targets read row 0 with B = 0
    for target in ("k", "v"):
        assert bank.group_of[target].dtype == jnp.int32
        np.testing.assert_array_equal(bank.group_of[target], want)
        assert all(pairs[target].lora_a.shape[0] == 4 for pairs in bank.layers)
    np.testing.assert_array_equal(bank.group_of["q"], np.arange(7))
    for pairs in bank.layers:
        assert not np.asarray(pairs["v"].lora_b)[[0, 2]].any()
        assert not np.asarray(pairs["k"].lora_a)[0].any(), "the first group has no A of k"


def shapes_of(bank: AdapterBank):
    return jax.tree.map(lambda array: (array.shape, array.dtype), bank)


def test_banks_of_equal_sizes_have_equal_shapes():
    room = {"num_adapters": 4, "num_groups": 2, "ranks": {"q": 4, "k": 4, "v": 4}}
    contents = [
        [],
        [adapter(1, "v")],
        [adapter(1, "q", "v", rank=4), adapter(2, "k", rank=2)],
        [adapter(seed, "q", "v", shared=3) for seed in range(3)],
    ]
    shapes = [shapes_of(build_bank(CONFIG, adapters, jnp.bfloat16, **room)) for adapters in contents]
    assert all(other == shapes[0] for other in shapes)
    assert shapes[0].layers[1]["k"].lora_a == ((2, 48, 4), jnp.bfloat16)
    assert shapes[0].layers[1]["q"].lora_a == ((4, 48, 4), jnp.bfloat16)
    assert shapes[0].layers[1]["v"].lora_b == ((4, 4, 16), jnp.bfloat16)


def test_a_bank_without_adapters_runs_the_base_alone():
    bank = build_bank(CONFIG, [], "float32")
    assert shapes_of(bank) == shapes_of(AdapterBank.empty(CONFIG.num_layers))


def test_weights_are_rounded_once_and_lie_where_the_mesh_wants_them():
    one = adapter(1, "v")
    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))
    bank = build_bank(CONFIG, [one], "bfloat16", mesh=mesh)
    for leaf, sharding in zip(jax.tree.leaves(bank), jax.tree.leaves(bank_shardings(bank, mesh)), strict=True):
        assert leaf.sharding == sharding
    want = one.weights[1, "v"].lora_b.astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(bank.layers[1]["v"].lora_b)[1], want)


def test_what_has_no_room_is_refused():
    with pytest.raises(AdapterError, match="2 adapters in a bank for 1: unload one, or raise max_adapters"):
        build_bank(CONFIG, [adapter(1, "v"), adapter(2, "v")], "float32", num_adapters=2)
    with pytest.raises(AdapterError, match=r"2 A-groups in a bank for 1: stack the adapters .* or raise max_adapters"):
        build_bank(CONFIG, [adapter(1, "v"), adapter(2, "v")], "float32", num_groups=1)
    with pytest.raises(AdapterError) as caught:
        build_bank(CONFIG, [adapter(1, "q", "v", rank=9), adapter(2, "o")], "float32", ranks={"q": 9, "v": 8})
    assert "random adapter 1 has rank 9 on v, the bank 8: raise max_rank" in str(caught.value)
    assert "random adapter 2 has rank 3 on o, the bank 0: raise max_rank" in str(caught.value)
    assert "on q" not in str(caught.value)


def test_what_does_not_fit_is_refused():
    foreign = Adapter({(0, "v"): LoraWeights(np.ones((64, 2)), np.ones((2, 16)))})
    with pytest.raises(AdapterError, match="an adapter of another base"):
        build_bank(CONFIG, [foreign], "float32")
    large = Adapter({(0, "v"): LoraWeights(np.ones((48, 1)), np.full((1, 16), 1e5))}, "folder/large")
    build_bank(CONFIG, [large], "bfloat16")
    with pytest.raises(AdapterError, match="folder/large holds numbers that overflow float16"):
        build_bank(CONFIG, [large], "float16")


@pytest.mark.parametrize(("num_groups", "num_rows"), [(1, 1), (1, 5), (3, 2), (3, 3), (3, 7)])
def test_rows_are_multiplied_by_their_groups_a_alone(num_groups, num_rows):
    """Be they multiplied by all and keep what is theirs, or have theirs copied: another's NaN is not theirs."""
    keys = jax.random.split(jax.random.key(num_groups), 2)
    x = jax.random.normal(keys[0], (num_rows, 4, 16))
    lora_a = jax.random.normal(keys[1], (num_groups, 16, 8))
    groups = np.arange(num_rows) % num_groups
    if num_groups > 1:
        lora_a, groups = lora_a.at[1].set(jnp.nan), np.where(groups == 1, 0, groups)
    found = jax.jit(shrink_by_group)(x, lora_a, jnp.asarray(groups))
    expected = np.stack(
        [np.asarray(x[b], np.float64) @ np.asarray(lora_a[g], np.float64) for b, g in enumerate(groups)]
    )
    assert found.shape == (num_rows, 4, 8)
    np.testing.assert_allclose(found, expected, atol=1e-4)
