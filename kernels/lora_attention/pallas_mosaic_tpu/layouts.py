"""Where K and V of a slot lie in its lanes, for operands that meet whole rows of lanes.

H < 128: they share a tile of lanes, K in lanes [0, H) and V in [H, 2H). Otherwise each has tiles of its own, and
nothing is added.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lragent_jax.kernels.lora_attention.pallas_mosaic_tpu.block_sizes import LANES


def lanes(H: int) -> int:
    """Lanes of a query and of a result."""
    return 2 * H if H < LANES else H


def in_k_lanes(x: Float[Array, "*dims H"]) -> Float[Array, "*dims width"]:
    missing = lanes(x.shape[-1]) - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])


def in_v_lanes(x: Float[Array, "*dims H"]) -> Float[Array, "*dims width"]:
    missing = lanes(x.shape[-1]) - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(missing, 0)])


def out_of_v_lanes(x: Float[Array, "*dims width"], H: int) -> Float[Array, "*dims H"]:
    return x[..., -H:]
