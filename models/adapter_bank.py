"""All loaded LoRA adapters on the device: one forward pass serves rows of different agents."""

from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from lragent_jax.models.matrix_product import matrix_product
from lragent_jax.models.pytree import pytree

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
"""The projections LoRA can adapt, by the names of `LlamaConfig.projection_shapes`."""

CACHED_TARGETS = ("k", "v")
"""Those whose output lives in the cache."""


@pytree
class LoraPair:
    """One target in one layer, for all adapters; `lora_b` carries the scale alpha / r."""

    lora_a: Float[Array, "g in_width r"]
    lora_b: Float[Array, "A r out_width"]


@pytree
class AdapterBank:
    """Adapter 0 is the empty one (`lora_b[0]` is zero). Adapters that share their A of a target share its row g.

    `layers[i]` holds a `LoraPair` per target that any adapter adapts; `group_of[target]` i32 [A] finds an adapter's
    row of `lora_a`. For the cached targets the rows are the A-groups. Ids are never negative: JAX would silently
    take the last row for -1.
    """

    layers: tuple[dict[str, LoraPair], ...]
    group_of: dict[str, Int[Array, " A"]]

    @classmethod
    def empty(cls, num_layers: int) -> "AdapterBank":
        """A bank without adapters, under which only `adapter_ids` 0 exists."""
        return cls(layers=tuple({} for _ in range(num_layers)), group_of={})


def shrink(x: Float[Array, "B T in_width"], lora_a: Float[Array, "B in_width r"]) -> Float[Array, "B T r"]:
    """X A, each row with its own A: r numbers per token, in x's dtype."""
    return matrix_product(lambda x, lora_a: jnp.einsum("btd,bdr->btr", x, lora_a), x, lora_a)


def expand(low_rank: Float[Array, "B T r"], lora_b: Float[Array, "B r out_width"]) -> Float[Array, "B T out_width"]:
    """(X A) B, each row with its own B."""
    return jnp.einsum("btr,bro->bto", low_rank, lora_b)


def lora_delta(
    x: Float[Array, "B T in_width"],
    pair: LoraPair,
    group_of: Int[Array, " A"] | None,
    adapter_ids: Int[Array, " B"] | None,
) -> Float[Array, "B T out_width"]:
    """What the rows' adapters add to a projection of x: s (x A) B (LoRA, arXiv 2106.09685).

    Without `adapter_ids` the only adapter of `pair` (A = g = 1) is every row's, and not copied for each.
    """
    if group_of is None or adapter_ids is None:
        return jnp.einsum("btr,ro->bto", jnp.einsum("btd,dr->btr", x, pair.lora_a[0]), pair.lora_b[0])
    return expand(shrink(x, pair.lora_a[group_of[adapter_ids]]), pair.lora_b[adapter_ids])
