"""What is trained: the matrices of one adapter, or of several at once, stacked over the layers."""

import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lragent_jax.models.adapter import Adapter, LoraWeights
from lragent_jax.models.adapter_bank import CACHED_TARGETS, TARGETS, LoraPair
from lragent_jax.models.cache_view import HostOrDevice
from lragent_jax.models.config import LlamaConfig
from lragent_jax.training.options import TrainingOptions

Lora = dict[str, dict[str, HostOrDevice]]
"""By target and by "lora_a" [L, in_width, r] or "lora_b" [L, r, out_width]; f32, the scale not in it.

Of several agents at once: [L, A, in_width, r] and [L, A, r, out_width], with A = 1 where all have one lora_a.
"""

Trained = dict[str, dict[str, np.bool_]]
"""For every matrix of a `Lora`, whether steps change it."""


def initial_lora(config: LlamaConfig, options: TrainingOptions, agent: str) -> Lora:
    """A uniform in ±1/sqrt(in_width), as PEFT draws it, and B zero; it depends on the seed and the agent's name."""
    shapes, lora = config.projection_shapes(), {}
    agent_key = int.from_bytes(hashlib.sha256(agent.encode()).digest()[:8], "big")
    for target in options.targets:
        in_width, out_width = shapes[target]
        rng = np.random.default_rng([options.seed, agent_key, TARGETS.index(target)])
        lora_a = rng.uniform(-1.0, 1.0, (config.num_layers, in_width, options.rank)) * in_width**-0.5
        lora[target] = {
            "lora_a": lora_a.astype(np.float32),
            "lora_b": np.zeros((config.num_layers, options.rank, out_width), np.float32),
        }
    return lora


def from_adapter(adapter: Adapter, scale: float) -> Lora:
    """An adapter of all layers and one rank, as `to_adapter` made it."""

    def stacked(target: str, side: int) -> np.ndarray:
        return np.stack([pair[side] for (_, of), pair in adapter.weights.items() if of == target])

    return {
        target: {"lora_a": stacked(target, 0), "lora_b": stacked(target, 1) / np.float32(scale)}
        for target in adapter.targets
    }


def shared_part(lora: Lora) -> Lora:
    """A of the cached targets: what makes adapters one A-group."""
    return {target: {"lora_a": matrices["lora_a"]} for target, matrices in lora.items() if target in CACHED_TARGETS}


def with_shared(lora: Lora, shared: Lora) -> tuple[Lora, Trained]:
    """`lora` with the matrices of `shared` in place of its own, which are not trained."""
    joined = {target: matrices | shared.get(target, {}) for target, matrices in lora.items()}
    trained = {
        target: {name: np.bool_(name not in shared.get(target, {})) for name in matrices}
        for target, matrices in lora.items()
    }
    return joined, trained


def together(loras: Sequence[Lora]) -> Lora:
    """The matrices of several agents as one; A of the cached targets is the first one's, for all of them."""
    return {
        target: {
            name: np.stack([np.asarray(lora[target][name]) for lora in (loras[:1] if shared else loras)], axis=1)
            for name in ("lora_a", "lora_b")
            for shared in [name == "lora_a" and target in CACHED_TARGETS]
        }
        for target in loras[0]
    }


def of_agent(lora: Lora, agent: int) -> Lora:
    """One agent's matrices out of those of several."""

    def own(matrix: HostOrDevice) -> np.ndarray:
        return np.asarray(matrix)[:, agent if matrix.shape[1] > 1 else 0]

    return {target: {name: own(matrix) for name, matrix in matrices.items()} for target, matrices in lora.items()}


def layer_pairs(lora: Lora, scale: float, dtype) -> tuple[dict[str, LoraPair], ...]:
    """Per layer what the model takes, in its dtype, the scale folded into B."""

    def layers(stacked: HostOrDevice) -> Sequence[jax.Array]:
        # Its transpose is one concatenation, that of indexing a sum of as many padded arrays as there are layers.
        cut = jax.lax.split(jnp.asarray(stacked, dtype), (1,) * stacked.shape[0], axis=0)
        return [layer.reshape(-1, *layer.shape[-2:]) for layer in cut]

    by_target = {
        target: zip(layers(matrices["lora_a"]), layers(matrices["lora_b"] * scale), strict=True)
        for target, matrices in lora.items()
    }
    return tuple(
        {target: LoraPair(*pair) for target, pair in zip(by_target, pairs, strict=True)}
        for pairs in zip(*by_target.values(), strict=True)
    )


def to_adapter(lora: Lora, scale: float, source: str) -> Adapter:
    """The trained matrices on the host, the scale folded into B."""
    weights = {}
    for target, matrices in lora.items():
        lora_a, lora_b = np.asarray(matrices["lora_a"]), np.asarray(matrices["lora_b"]) * np.float32(scale)
        weights |= {(layer, target): LoraWeights(lora_a[layer], lora_b[layer]) for layer in range(len(lora_a))}
    return Adapter(weights, source=source)
