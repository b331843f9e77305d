"""What is rotated and written, where to, and the pools that it goes into, as named tuples.

Letters: B batch · T query tokens · N query heads · K kv heads · H head dim · r rank · g low-rank tables · P pages ·
p page size.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


class Expansion(NamedTuple):
    """X A of every token, and the B's that it is multiplied by, each row with its own adapter's."""

    low_rank: Float[Array, "B T r"]
    lora_b: Float[Array, "A r N H"]
    adapter_ids: Int32[Array, " B"]

    def expanded(self) -> Float[Array, "B T N H"]:
        """(X A) B in the dtype of both."""
        return jnp.einsum("btr,brnh->btnh", self.low_rank, self.lora_b[self.adapter_ids])


class Projections(NamedTuple):
    """Of every token, before RoPE; k and v are None where none are written.

    `q_delta`: what adapters add to q, or what it is to be made of.
    """

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"] | None = None
    v: Float[Array, "B T K H"] | None = None
    q_delta: Float[Array, "B T N H"] | Expansion | None = None


class Rotation(NamedTuple):
    """Cosines and sines of every token's angles, f32."""

    cos: Float[Array, "B T Hh"]
    sin: Float[Array, "B T Hh"]


class LowRank(NamedTuple):
    """X A of every token for every table it may be written by, before B and, for keys, before RoPE."""

    v: Float[Array, "g B T r_v"] | None = None
    k: Float[Array, "g B T r_k"] | None = None


class Slots(NamedTuple):
    """Where in its pool each token goes: page · p + slot, or −1 where it is not written."""

    base: Int32[Array, "B T"]
    low_rank: Int32[Array, "g B T"] | None = None


class Pools(NamedTuple):
    """The page pools of a layer; tokens lie on the last axis of the low-rank ones."""

    kv: Float[Array, "P K p HH"]
    low_rank_v: Float[Array, "P_lr r_v p"] | None = None
    low_rank_k: Float[Array, "P_lr r_k p"] | None = None
