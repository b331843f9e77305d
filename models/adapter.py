"""One LoRA adapter on the host: its matrices, what identifies it, and which A-group it belongs to."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from lragent_jax.models.adapter_bank import CACHED_TARGETS, TARGETS
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import AdapterError
from lragent_jax.models.problems import listing


class LoraWeights(NamedTuple):
    """What one projection of one layer gains: x A B. The scale alpha / r is folded into B."""

    lora_a: np.ndarray  # f32 [in_width, r]
    lora_b: np.ndarray  # f32 [r, out_width]


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """The weights of one adapter by (layer, target), layer from 0 and target one of `TARGETS`.

    An adapter has no name: it is what it computes, and two adapters are the same where their `content_hash` is.
    Arrays of any float dtype go in, read-only f32 copies are kept. `source` says in messages where they came from.
    Raises `AdapterError` for weights that are no pairs of matrices of a common rank.
    """

    weights: Mapping[tuple[int, str], LoraWeights]
    source: str = "adapter"

    def __post_init__(self):
        if not self.weights:
            raise AdapterError(f"{self.source} has no weights; agent=None runs the base model")
        problems = []
        kept = {}
        for layer, target in sorted(self.weights, key=_order):
            lora_a, lora_b = self.weights[layer, target]
            if np.ndim(lora_a) != 2 or np.ndim(lora_b) != 2 or not np.shape(lora_a)[1] == np.shape(lora_b)[0] > 0:
                problems.append(
                    f"{target} of layer {layer}: lora_a {list(np.shape(lora_a))} and lora_b {list(np.shape(lora_b))} "
                    "are not [in, r] and [r, out]"
                )
                continue
            kept[layer, target] = LoraWeights(_frozen(lora_a), _frozen(lora_b))
        if problems:
            raise AdapterError(listing(f"{self.source} is no LoRA adapter:", problems))
        object.__setattr__(self, "weights", MappingProxyType(kept))

    @functools.cached_property
    def targets(self) -> tuple[str, ...]:
        """The projections it adapts in any layer, in the order of `TARGETS`."""
        present = {target for _, target in self.weights}
        return tuple(target for target in TARGETS if target in present)

    def rank(self, target: str) -> int:
        """The largest rank over the layers; 0 for a target it does not adapt."""
        return max((pair.lora_a.shape[1] for (_, of), pair in self.weights.items() if of == target), default=0)

    @functools.cached_property
    def content_hash(self) -> str:
        """SHA-256 (hex) of layers, targets, ranks and numbers: equal only where the mathematics is.

        Names and folders do not enter, nor the dtype the weights were stored in; the scale does, through B.
        """
        digest = hashlib.sha256(b"lora adapter 1\n")
        for (layer, target), pair in self.weights.items():
            for array in pair:
                _hash_array(digest, f"{layer} {target}", array)
        return digest.hexdigest()

    @functools.cached_property
    def a_group_hash(self) -> str | None:
        """SHA-256 (hex) of A for the cached targets over all layers; None where it adapts none of them.

        Adapters of one hash form an A-group: they read one low-rank cache. Ranks padded with zeros do not matter.
        """
        cached = [target for target in self.targets if target in CACHED_TARGETS]
        if not cached:
            return None
        digest = hashlib.sha256(f"lora A-group 1 {cached}\n".encode())
        for (layer, target), pair in self.weights.items():
            if target in cached:
                _hash_array(digest, f"{layer} {target}", _unpadded(pair.lora_a))
        return digest.hexdigest()

    def check_fits(self, config: LlamaConfig) -> None:
        """Raises one `AdapterError` that lists every weight this model has no place for, and every NaN or infinity."""
        shapes = config.projection_shapes()
        problems = []
        for (layer, target), (lora_a, lora_b) in self.weights.items():
            where = f"{target} of layer {layer}"
            if layer >= config.num_layers:
                problems.append(f"{where}: the model has {config.num_layers} layers")
            elif (lora_a.shape[0], lora_b.shape[1]) != shapes[target]:
                problems.append(
                    f"{where}: maps {lora_a.shape[0]} to {lora_b.shape[1]} numbers, the model's projection "
                    f"{shapes[target][0]} to {shapes[target][1]}"
                )
            for name, array in (("lora_a", lora_a), ("lora_b", lora_b)):
                if not np.isfinite(array).all():
                    problems.append(f"{where}: {name} holds NaN or infinity")
        if problems:
            raise AdapterError(
                listing(f"{self.source} cannot run on this model (an adapter of another base?):", problems)
            )


def random_adapter(
    config: LlamaConfig,
    *,
    rank: int,
    targets: Sequence[str] = ("q", "v"),
    seed: int,
    shared_a_seed: int | None = None,
    scale: float = 0.1,
) -> Adapter:
    """An adapter of normal numbers for benchmarks and trials; B is not zero.

    On inputs of unit variance its part of a projection has the deviation `scale`. Adapters of one `shared_a_seed`,
    rank and set of cached targets share their A of the cached targets, so they form one A-group.
    """
    if rank < 1:
        raise AdapterError(f"rank must be positive, not {rank}")
    shapes = config.projection_shapes()
    weights = {}
    for layer in range(config.num_layers):
        for target in targets:
            _check_place(layer, target)
            in_width, out_width = shapes[target]
            shared = shared_a_seed is not None and target in CACHED_TARGETS
            lora_a = _normal((in_width, rank), shared_a_seed if shared else seed, layer, target, "lora_a")
            lora_b = _normal((rank, out_width), seed, layer, target, "lora_b")
            weights[layer, target] = LoraWeights(lora_a * in_width**-0.5, lora_b * (scale * rank**-0.5))
    return Adapter(weights, source=f"random adapter {seed}")


def stack_adapters(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The same adapters as one A-group: exact, at the price of rank.

    In each layer and cached target all of them get A = [A_1 | … | A_n], the distinct A's of the set, and B_j keeps its
    rows beside its own A and is zero elsewhere, so that x A B is what it was. Other targets stay as they are. A set
    that is one A-group already comes back unchanged.
    """
    if len({adapter.a_group_hash for adapter in adapters}) <= 1:
        return list(adapters)
    stacked = [dict(adapter.weights) for adapter in adapters]
    for place in _cached_places(adapters):
        pairs = [adapter.weights.get(place) for adapter in adapters]
        present = [pair for pair in pairs if pair is not None]
        blocks = _distinct([_unpadded(pair.lora_a) for pair in present])
        starts = np.cumsum([0, *(block.shape[1] for block in blocks)])
        lora_a = np.concatenate(blocks, axis=1)
        for weights, pair in zip(stacked, pairs, strict=True):
            lora_b = np.zeros((lora_a.shape[1], present[0].lora_b.shape[1]), np.float32)
            if pair is not None:
                block = _unpadded(pair.lora_a)
                start = starts[next(i for i, other in enumerate(blocks) if np.array_equal(block, other))]
                lora_b[start : start + block.shape[1]] = pair.lora_b[: block.shape[1]]
            weights[place] = LoraWeights(lora_a, lora_b)
    return [
        Adapter(weights, source=f"{adapter.source} (stacked)")
        for adapter, weights in zip(adapters, stacked, strict=True)
    ]


def _cached_places(adapters: Sequence[Adapter]) -> Iterator[tuple[int, str]]:
    """Every (layer, cached target) that any of them adapts, once the shapes there agree."""
    places: dict[tuple[int, str], tuple[tuple[int, int], str]] = {}
    for adapter in adapters:
        for place, pair in adapter.weights.items():
            if place[1] not in CACHED_TARGETS:
                continue
            shape = pair.lora_a.shape[0], pair.lora_b.shape[1]
            other_shape, other = places.setdefault(place, (shape, adapter.source))
            if shape != other_shape:
                raise AdapterError(
                    f"{adapter.source} cannot be stacked with {other}: {place[1]} of layer {place[0]} maps {shape[0]} "
                    f"to {shape[1]} numbers in one, {other_shape[0]} to {other_shape[1]} in the other; stack adapters "
                    "of one base"
                )
    yield from sorted(places, key=_order)


def _distinct(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The arrays without repetitions, in order of first appearance."""
    kept: list[np.ndarray] = []
    for array in arrays:
        if not any(np.array_equal(array, other) for other in kept):
            kept.append(array)
    return kept


def _unpadded(lora_a: np.ndarray) -> np.ndarray:
    """A without trailing columns of zeros; one column stays."""
    used = np.flatnonzero(lora_a.any(axis=0))
    return lora_a[:, : max(1, used[-1] + 1 if used.size else 1)]


def _normal(shape: tuple[int, int], seed: int, layer: int, target: str, side: str) -> np.ndarray:
    """Draws that depend on their own place alone, not on what else the adapter holds."""
    place = (layer, TARGETS.index(target), ("lora_a", "lora_b").index(side))
    return np.random.default_rng([seed, *place]).standard_normal(shape, np.float32)


def _hash_array(digest, place: str, array: np.ndarray) -> None:
    digest.update(f"{place} {list(array.shape)}\n".encode())
    digest.update((array + 0.0).astype("<f4").tobytes())  # + 0.0 makes -0.0 the zero it equals


def _frozen(array) -> np.ndarray:
    copy = np.array(array, np.float32, order="C")
    copy.flags.writeable = False
    return copy


def _order(place: tuple[int, str]) -> tuple[int, int]:
    _check_place(*place)
    return place[0], TARGETS.index(place[1])


def _check_place(layer: int, target: str) -> None:
    if target not in TARGETS:
        raise AdapterError(f"{target!r} is no projection LoRA can adapt; there are: {', '.join(TARGETS)}")
    if layer < 0:
        raise AdapterError(f"layer {layer} of {target} is negative; layers count from 0")
