"""What lies between the projections and attention: queries and keys rotated, new tokens written into their pages."""

from lragent_jax.kernels.page_write.api import ON_GPUS, expands, rotate_and_write
from lragent_jax.kernels.page_write.arguments import Expansion, LowRank, Pools, Projections, Rotation, Slots

__all__ = [
    "ON_GPUS",
    "Expansion",
    "LowRank",
    "Pools",
    "Projections",
    "Rotation",
    "Slots",
    "expands",
    "rotate_and_write",
]
