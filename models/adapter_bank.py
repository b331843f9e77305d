"""All loaded LoRA adapters on the device: one forward pass serves rows of different agents."""

from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from lragent_jax.models.matrix_product import matrix_product
from lragent_jax.models.pytree import pytree

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
"""The projections LoRA can adapt, by the names of `LlamaConfig.projection_shapes`."""

FEW_TOKENS = 4
"""Of a row, where reading weights takes longer than multiplying them."""

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


def shrink_by_group(
    x: Float[Array, "B T in_width"], lora_a: Float[Array, "g in_width r"], groups: Int[Array, " B"]
) -> Float[Array, "B T r"]:
    """X A, each row with the A of its group.

    Where few tokens are of as many rows as there are groups, or more, all are multiplied by all groups' A and keep what
    is theirs: the A's are read once, where every row's own would be copied side by side first.
    """
    num_groups, width, rank = lora_a.shape
    if num_groups > 1 and (num_groups > x.shape[0] or x.shape[1] > FEW_TOKENS):
        return shrink(x, lora_a[groups])
    side_by_side = jnp.moveaxis(lora_a, 0, 1).reshape(width, num_groups * rank)
    of_all = matrix_product(lambda x, lora_a: jnp.einsum("btd,dr->btr", x, lora_a), x, side_by_side)
    if num_groups == 1:
        return of_all
    is_own = jnp.arange(num_groups) == groups[:, None]
    return jnp.where(is_own[:, None, :, None], of_all.reshape(*x.shape[:2], num_groups, rank), 0).sum(axis=2)


def expand(low_rank: Float[Array, "B T r"], lora_b: Float[Array, "B r out_width"]) -> Float[Array, "B T out_width"]:
    """(X A) B, each row with its own B."""
    return jnp.einsum("btr,bro->bto", low_rank, lora_b)


def own_shrink(
    x: Float[Array, "B T in_width"],
    pair: LoraPair,
    group_of: Int[Array, " A"] | None,
    adapter_ids: Int[Array, " B"] | None,
) -> Float[Array, "B T r"]:
    """X A, each row with its adapter's A; without `adapter_ids` or groups, with the only one there is."""
    if group_of is None or adapter_ids is None:
        return jnp.einsum("btd,dr->btr", x, pair.lora_a[0])
    return shrink_by_group(x, pair.lora_a, group_of[adapter_ids])


def lora_delta(
    x: Float[Array, "B T in_width"],
    pair: LoraPair,
    group_of: Int[Array, " A"] | None,
    adapter_ids: Int[Array, " B"] | Int[Array, "B T"] | None,
) -> Float[Array, "B T out_width"]:
    """What the rows' adapters add to a projection of x: s (x A) B (LoRA, arXiv 2106.09685).

    Without `adapter_ids` the only adapter of `pair` (A = g = 1) is every row's, and not copied for each. With an id
    per token every adapter has an A of its own (g = A).
    """
    if adapter_ids is not None and adapter_ids.ndim == 2:
        low_rank = jnp.einsum("btd,adr->btar", x, pair.lora_a)
        return jnp.einsum("btar,aro->bto", own_part(low_rank, adapter_ids, pair.lora_b.shape[0]), pair.lora_b)
    low_rank = own_shrink(x, pair, group_of, adapter_ids)
    if group_of is None or adapter_ids is None:
        return jnp.einsum("btr,ro->bto", low_rank, pair.lora_b[0])
    return expand(low_rank, pair.lora_b[adapter_ids])


def own_part(
    low_rank: Float[Array, "B T *heads _A r"], adapter_ids: Int[Array, "B T"], num_adapters: int
) -> Float[Array, "B T *heads A r"]:
    """Each token's r numbers in its own adapter's place, zeros in that of the others.

    Times the B's of all adapters that is one product over A r numbers, and no B is copied for every token.
    """
    is_own = jnp.arange(num_adapters) == adapter_ids[..., None]
    is_own = is_own.reshape(*adapter_ids.shape, *(1,) * (low_rank.ndim - 4), num_adapters, 1)
    return jnp.where(is_own, low_rank, 0)


def expand_by_head(
    low_rank: Float[Array, "B T N r"],
    lora_b: Float[Array, "A r out_width"],
    adapter_ids: Int[Array, "B T"],
    num_kv_heads: int,
) -> Float[Array, "B T N H"]:
    """(P L) B of every query head, with the B of its token's adapter and its kv head."""
    num_adapters, rank, out_width = lora_b.shape
    by_head = lora_b.reshape(num_adapters, rank, num_kv_heads, out_width // num_kv_heads)
    grouped = low_rank.reshape(*low_rank.shape[:2], num_kv_heads, -1, 1, rank)
    expanded = jnp.einsum("btkgar,arkh->btkgh", own_part(grouped, adapter_ids, num_adapters), by_head)
    return expanded.reshape(*low_rank.shape[:3], -1)
