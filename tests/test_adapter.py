"""Adapters are what they compute: identity, A-groups, fit, and stacking that changes nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lragent_jax.models.adapter import Adapter, LoraWeights, random_adapter, stack_adapters
from lragent_jax.models.adapter_bank import CACHED_TARGETS, TARGETS
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import AdapterError

CONFIG = LlamaConfig.preset("tiny")
SHAPES = CONFIG.projection_shapes()


def whole_numbers(place, rank: int, seed: int) -> LoraWeights:
    """Small integers: every sum of products below is exact in f32, whatever its order."""
    rng = np.random.default_rng([seed, place[0], TARGETS.index(place[1])])
    in_width, out_width = SHAPES[place[1]]
    lora_a, lora_b = rng.integers(-4, 5, (in_width, rank)), rng.integers(-4, 5, (rank, out_width))
    lora_a[0], lora_b[0] = 1, 2  # no column of A and no B is zero
    return LoraWeights(lora_a.astype(np.float32), lora_b.astype(np.float32))


def make(*places, rank: int = 3, seed: int = 0, source: str = "made") -> Adapter:
    return Adapter({place: whole_numbers(place, rank, seed) for place in places}, source)


def changed(adapter: Adapter, place, **arrays: np.ndarray) -> Adapter:
    return Adapter({**adapter.weights, place: adapter.weights[place]._replace(**arrays)})


def padded(pair: LoraWeights, by: int = 2) -> LoraWeights:
    return LoraWeights(np.pad(pair.lora_a, ((0, 0), (0, by))), np.pad(pair.lora_b, ((0, by), (0, 0))))


Q0, K0, V0, V1 = (0, "q"), (0, "k"), (0, "v"), (1, "v")


def test_targets_and_ranks():
    adapter = Adapter({V1: whole_numbers(V1, 5, 0), Q0: whole_numbers(Q0, 2, 0), V0: whole_numbers(V0, 3, 0)})
    assert adapter.targets == ("q", "v")
    assert [adapter.rank(target) for target in ("q", "v", "k")] == [2, 5, 0]


def test_weights_cannot_change_under_the_hash():
    mine = whole_numbers(V0, 3, 0)
    adapter = Adapter({V0: mine})
    before = adapter.content_hash
    mine.lora_a[:] = 0  # the caller's own array
    with pytest.raises(ValueError, match="read-only"):
        adapter.weights[V0].lora_b[0, 0] = 7
    with pytest.raises(TypeError):
        adapter.weights[V1] = mine  # type: ignore[index]
    assert Adapter(adapter.weights).content_hash == before


def test_content_hash_ignores_what_does_not_matter():
    adapter = make(Q0, V0, V1)
    backwards = dict(reversed(list(adapter.weights.items())))
    transposed = {p: LoraWeights(np.asfortranarray(a), b[::-1][::-1]) for p, (a, b) in adapter.weights.items()}
    halves = {p: LoraWeights(a.astype(np.float16), b.astype(np.float64)) for p, (a, b) in adapter.weights.items()}
    minus_zero = changed(
        adapter, V0, lora_b=np.where(adapter.weights[V0].lora_b == 0, -0.0, adapter.weights[V0].lora_b)
    )
    for same in (Adapter(backwards, "another folder"), Adapter(transposed), Adapter(halves), minus_zero):
        assert same.content_hash == adapter.content_hash
        assert same.a_group_hash == adapter.a_group_hash
    assert (adapter.weights[V0].lora_b == 0).any(), "the minus zeros were there"


@given(st.sampled_from([Q0, V0, V1]), st.sampled_from(["lora_a", "lora_b"]), st.data())
@settings(max_examples=40, deadline=None)
def test_any_number_changes_the_hash_and_only_cached_a_the_group(place, side, data):
    adapter = make(Q0, V0, V1)
    array = getattr(adapter.weights[place], side).copy()
    index = data.draw(st.tuples(*(st.integers(0, size - 1) for size in array.shape)))
    array[index] = np.nextafter(array[index], np.inf)
    other = changed(adapter, place, **{side: array})
    assert other.content_hash != adapter.content_hash
    assert (other.a_group_hash != adapter.a_group_hash) == (side == "lora_a" and place[1] in CACHED_TARGETS)


def test_hash_sees_places_and_scale():
    pair = whole_numbers(V0, 3, 0)
    hashes = {
        Adapter(weights).content_hash
        for weights in (
            {V0: pair},
            {V1: pair},
            {K0: pair},
            {V0: pair, V1: pair},
            {V0: pair._replace(lora_b=2 * pair.lora_b)},
            {V0: padded(pair)},
        )
    }
    assert len(hashes) == 6


def test_a_groups():
    v = make(V0, V1)
    assert make(Q0).a_group_hash is None
    assert make(Q0, V0, V1).a_group_hash == v.a_group_hash, "A of q is free"
    assert make(V0, V1, seed=1).a_group_hash != v.a_group_hash
    assert make(V0).a_group_hash != v.a_group_hash, "equal in every layer, or not at all"
    assert make(V0, V1, K0).a_group_hash != v.a_group_hash, "v alone writes no low-rank keys"
    assert Adapter({p: padded(pair) for p, pair in v.weights.items()}).a_group_hash == v.a_group_hash
    swapped = {V0: v.weights[V1], V1: v.weights[V0]}
    assert Adapter(swapped).a_group_hash != v.a_group_hash, "which layer matters"
    in_front = changed(v, V0, lora_a=np.pad(v.weights[V0].lora_a, ((0, 0), (1, 0))), lora_b=np.zeros((4, 16)))
    assert in_front.a_group_hash != v.a_group_hash, "only what padding adds is nothing"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "adapter x has no weights"),
        ({(0, "lm_head"): whole_numbers(V0, 3, 0)}, "'lm_head' is no projection LoRA can adapt; there are: q, k, v"),
        ({(-1, "v"): whole_numbers(V0, 3, 0)}, "layer -1 of v is negative"),
        ({V0: LoraWeights(np.ones((48, 3)), np.ones((4, 16)))}, r"v of layer 0: lora_a \[48, 3\] and lora_b \[4, 16\]"),
        ({V0: LoraWeights(np.ones((48, 0)), np.ones((0, 16)))}, r"v of layer 0: lora_a \[48, 0\]"),
        ({V0: LoraWeights(np.ones(48), np.ones((1, 16)))}, r"v of layer 0: lora_a \[48\]"),
    ],
)
def test_what_is_no_adapter_is_refused(weights, message):
    with pytest.raises(AdapterError, match=message):
        Adapter(weights, "adapter x")


def test_check_fits_lists_everything_at_once():
    make(*((layer, target) for layer in range(2) for target in TARGETS)).check_fits(CONFIG)
    broken = whole_numbers(V1, 3, 0)
    broken.lora_b[1, 1] = np.inf
    wide = LoraWeights(np.ones((64, 2)), np.ones((2, 16)))
    adapter = Adapter({Q0: wide, V1: broken, (2, "v"): whole_numbers(V0, 3, 0)}, "folder/plan")
    with pytest.raises(AdapterError) as caught:
        adapter.check_fits(CONFIG)
    message = str(caught.value)
    assert "folder/plan cannot run on this model (an adapter of another base?)" in message
    assert "q of layer 0: maps 64 to 16 numbers, the model's projection 48 to 48" in message
    assert "v of layer 1: lora_b holds NaN or infinity" in message
    assert "v of layer 2: the model has 2 layers" in message
    nan = changed(make(V0), V0, lora_a=np.full((48, 3), np.nan))
    with pytest.raises(AdapterError, match="v of layer 0: lora_a holds NaN or infinity"):
        nan.check_fits(CONFIG)


def test_random_adapters():
    one = random_adapter(CONFIG, rank=4, seed=1, targets=TARGETS)
    one.check_fits(CONFIG)
    assert all(one.weights[place].lora_b.any() for place in ((i, t) for i in range(2) for t in TARGETS))
    assert random_adapter(CONFIG, rank=4, seed=1, targets=TARGETS).content_hash == one.content_hash
    assert random_adapter(CONFIG, rank=4, seed=2, targets=TARGETS).a_group_hash != one.a_group_hash
    few = random_adapter(CONFIG, rank=4, seed=1)
    assert few.targets == ("q", "v")
    np.testing.assert_array_equal(few.weights[V1].lora_a, one.weights[V1].lora_a)
    with pytest.raises(AdapterError, match="rank must be positive"):
        random_adapter(CONFIG, rank=0, seed=1)
    with pytest.raises(AdapterError, match="'router' is no projection"):
        random_adapter(CONFIG, rank=4, seed=1, targets=("router",))


def test_random_adapters_that_share_a():
    group = [random_adapter(CONFIG, rank=4, seed=seed, targets=("q", "k", "v"), shared_a_seed=9) for seed in range(3)]
    assert len({adapter.a_group_hash for adapter in group}) == 1
    for place in ((0, "k"), V1):
        assert len({adapter.weights[place].lora_b.tobytes() for adapter in group}) == 3
    assert len({adapter.weights[Q0].lora_a.tobytes() for adapter in group}) == 3, "A of q is free"
    assert not np.array_equal(group[0].weights[K0].lora_a, group[0].weights[V0].lora_a)


def test_random_scale_is_the_deviation_of_what_is_added():
    config = LlamaConfig(4, 512, 512, 4, 4, 128, 32, 32)
    adapter = random_adapter(config, rank=16, seed=0, targets=("v",), scale=0.25)
    x = np.random.default_rng(1).standard_normal((64, 512), np.float32)
    deviation = np.std([x @ pair.lora_a @ pair.lora_b for pair in adapter.weights.values()])
    assert 0.2 < deviation < 0.3


PLACES = [(layer, target) for layer in range(2) for target in ("q", "k", "v", "down")]


@st.composite
def adapter_sets(draw):
    """Adapters over any places; few seeds and ranks, so that A's repeat."""
    adapters = []
    for _ in range(draw(st.integers(1, 4))):
        places = draw(st.lists(st.sampled_from(PLACES), min_size=1, unique=True))
        pairs = {}
        for place in places:
            pair = whole_numbers(place, draw(st.integers(1, 3)), draw(st.integers(0, 1)))
            pairs[place] = padded(pair) if draw(st.booleans()) else pair
        adapters.append(Adapter(pairs))
    return adapters


@given(adapter_sets())
@settings(max_examples=60, deadline=None)
def test_stacking_is_exact(adapters):
    stacked = stack_adapters(adapters)
    assert len(stacked) == len(adapters)
    assert len({adapter.a_group_hash for adapter in stacked}) == 1
    rng = np.random.default_rng(0)
    for before, after in zip(adapters, stacked, strict=True):
        assert set(after.weights) >= set(before.weights)
        for place, (lora_a, lora_b) in after.weights.items():
            x = rng.integers(-3, 4, (5, lora_a.shape[0])).astype(np.float32)
            if place in before.weights:
                want = x @ before.weights[place].lora_a @ before.weights[place].lora_b
            else:
                assert place[1] in CACHED_TARGETS, "other targets stay as they are"
                want = np.zeros((5, lora_b.shape[1]), np.float32)
            np.testing.assert_array_equal(x @ lora_a @ lora_b, want)
    again = stack_adapters(stacked)
    assert [adapter.content_hash for adapter in again] == [adapter.content_hash for adapter in stacked]


def test_stacked_ranks_are_sums_over_the_distinct():
    one, two = make(Q0, V0, rank=3, seed=0), make(Q0, V0, V1, rank=2, seed=1)
    twin = changed(one, V0, lora_b=-one.weights[V0].lora_b)  # the A of `one`
    stacked = stack_adapters([one, two, twin, make(Q0, seed=5)])
    for adapter in stacked:
        assert adapter.weights[V0].lora_a.shape == (48, 5)
        assert adapter.weights[V1].lora_a.shape == (48, 2)
        np.testing.assert_array_equal(adapter.weights[V0].lora_a[:, :3], one.weights[V0].lora_a)
        np.testing.assert_array_equal(adapter.weights[V0].lora_a[:, 3:], two.weights[V0].lora_a)
    assert [adapter.rank("q") for adapter in stacked] == [3, 2, 3, 3]
    assert not stacked[3].weights[V0].lora_b.any()
    assert not stacked[1].weights[V0].lora_b[:3].any()


def test_stacking_one_group_changes_nothing():
    group = [random_adapter(CONFIG, rank=4, seed=seed, shared_a_seed=9) for seed in range(3)]
    assert stack_adapters(group) == group
    assert stack_adapters([make(Q0), make(Q0, seed=1)])[1].a_group_hash is None
    assert stack_adapters([]) == []


def test_stacking_needs_one_base():
    other = Adapter({V0: LoraWeights(np.ones((64, 2)), np.ones((2, 16)))}, "folder/other")
    with pytest.raises(AdapterError, match="folder/other cannot be stacked with made: v of layer 0 maps 64 to 16"):
        stack_adapters([make(V0), other])
