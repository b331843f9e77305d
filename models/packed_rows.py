"""Several sequences behind one another in one row: what a forward pass without caches reads, and its attention."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lragent_jax.kernels.lora_attention.dispatch import default_platform
from lragent_jax.models.cache_view import HostOrDevice
from lragent_jax.models.pytree import pytree

CUDNN, XLA = "cudnn", "xla"
ATTENTION_IMPLEMENTATIONS = (CUDNN, XLA)
"""Of `jax.nn.dot_product_attention`. XLA's holds all scores of a layer at once and runs everywhere."""


@pytree
class PackedRows:
    """Token ids, each token's position in its own sequence, and which sequence of the row it belongs to; 0 is padding.

    The sequences of a row are numbered from 1 in the order they lie in. `adapter_ids` says which adapter runs each
    token, where tokens of one sequence are run by several that share its cache; None where there is one adapter.
    """

    tokens: Int[HostOrDevice, "B T"]
    positions: Int[HostOrDevice, "B T"]
    segments: Int[HostOrDevice, "B T"]
    adapter_ids: Int[HostOrDevice, "B T"] | None = None

    def mask(self) -> Bool[Array, "B 1 T T"]:
        """Which key belongs to the same sequence as which query; that keys come first is for attention to add."""
        return (self.segments[:, :, None] == self.segments[:, None, :])[:, None]


def attend_packed(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Bool[Array, "B 1 T T"],
    implementation: str | None,
    sm_scale: float | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention of every token within its own sequence; `sm_scale` is 1/sqrt(H) by default.

    `implementation` is one of `ATTENTION_IMPLEMENTATIONS`; None takes cuDNN's flash attention where it can run.
    """
    if implementation is None:
        implementation = CUDNN if _cudnn_takes(q, q.shape[3]) else XLA
    # A mask of truth values, not a bias: cuDNN would compute a gradient for a bias, as large as all scores.
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=True, scale=sm_scale, implementation=implementation  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


def attend_packed_split(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    low_rank: Float[Array, "B T r"],
    mask: Bool[Array, "B 1 T T"],
    implementation: str | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N r"]]:
    """(P V, P L) under the same probabilities: what a reader of a split cache has before its B is applied.

    L, which all heads share, lies beside V in values of more lanes; q and k get zeros there. That is one softmax for
    both. Where the lanes are more than cuDNN takes, L goes through an attention of its own.
    """
    head_dim, rank = q.shape[3], low_rank.shape[2]
    by_head = jnp.broadcast_to(low_rank[:, :, None], (*v.shape[:3], rank))
    if head_dim + rank <= _MAX_HEAD_DIM:
        both = _attend_wide(q, k, jnp.concatenate([v, by_head], axis=-1), mask, implementation)
        return both[..., :head_dim], both[..., head_dim:]
    return attend_packed(q, k, v, mask, implementation), _attend_wide(q, k, by_head, mask, implementation)


def _attend_wide(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    values: Float[Array, "B T K lanes"],
    mask: Bool[Array, "B 1 T T"],
    implementation: str | None,
) -> Float[Array, "B T N lanes"]:
    """Attention with values of another width than q and k have: all are padded to one that they have in common."""
    head_dim, lanes = q.shape[3], values.shape[3]
    width = max(head_dim, lanes)
    cudnn_width = -(-width // _CUDNN_LANES) * _CUDNN_LANES
    if implementation == CUDNN or (implementation is None and _cudnn_takes(q, cudnn_width)):
        width = cudnn_width
    q, k, values = (jnp.pad(x, ((0, 0),) * 3 + ((0, width - x.shape[3]),)) for x in (q, k, values))
    return attend_packed(q, k, values, mask, implementation, sm_scale=head_dim**-0.5)[..., :lanes]


_MAX_HEAD_DIM = 128
"""Of cuDNN's attention, forward and backward, on every card that has it."""

_CUDNN_LANES = 64
"""Head widths that its kernels are made for are multiples of this."""


def _cudnn_takes(q: Float[Array, "B T N H"], head_dim: int) -> bool:
    on_nvidia = default_platform() in ("gpu", "cuda") and jax.devices()[0].device_kind.startswith("NVIDIA")
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return on_nvidia and half and q.shape[1] % 64 == 0 and head_dim <= _MAX_HEAD_DIM and head_dim % 8 == 0
