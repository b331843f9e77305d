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

    The sequences of a row are numbered from 1 in the order they lie in.
    """

    tokens: Int[HostOrDevice, "B T"]
    positions: Int[HostOrDevice, "B T"]
    segments: Int[HostOrDevice, "B T"]

    def mask(self) -> Bool[Array, "B 1 T T"]:
        """Which key belongs to the same sequence as which query; that keys come first is for attention to add."""
        return (self.segments[:, :, None] == self.segments[:, None, :])[:, None]


def attend_packed(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Bool[Array, "B 1 T T"],
    implementation: str | None,
) -> Float[Array, "B T N H"]:
    """Causal attention of every token within its own sequence.

    `implementation` is one of `ATTENTION_IMPLEMENTATIONS`; None takes cuDNN's flash attention where it can run.
    """
    if implementation is None:
        implementation = CUDNN if _cudnn_takes(q) else XLA
    # A mask of truth values, not a bias: cuDNN would compute a gradient for a bias, as large as all scores.
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=implementation)  # pyright: ignore[reportArgumentType]


def _cudnn_takes(q: Float[Array, "B T N H"]) -> bool:
    on_nvidia = default_platform() in ("gpu", "cuda") and jax.devices()[0].device_kind.startswith("NVIDIA")
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return on_nvidia and half and q.shape[1] % 64 == 0 and q.shape[3] <= 128 and q.shape[3] % 8 == 0
