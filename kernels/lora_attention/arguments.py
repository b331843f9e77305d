"""What attention reads beside its queries, as named tuples: no call site can swap two pools or two tables.

Letters: B batch · K kv heads · H head dim · r rank · A adapters · P pages · p page size · W pages in a row's table.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


class LowRank(NamedTuple):
    """Page pools of the low-rank cache: X A for every token, before B and, for keys, before RoPE."""

    v: Float[Array, "P_lr r_v p"] | None
    k: Float[Array, "P_lr r_k p"] | None = None


class PageTable(NamedTuple):
    """Where each row's keys lie and which of them are there. Position s is slot s % p of table entry s // p."""

    base: Int32[Array, "B W"]
    low_rank: Int32[Array, "B W"] | None  # of the reading row's own A-group; not read for rows without an adapter
    q_starts: Int32[Array, " B"]  # position of the row's first query
    kv_lens: Int32[Array, " B"]  # keys, the new ones included


class LoraB(NamedTuple):
    """The expanding halves of all adapters, s = alpha / r folded in. Row 0 stands for "no adapter"; it is not read."""

    v: Float[Array, "A r_v K H"] | None
    k: Float[Array, "A r_k K H"] | None = None

    def select(self, adapter_ids: Int32[Array, " B"]) -> "LoraB":
        """Each row's own B in f32, [B, r, K, H]: zeros for id 0, NaN for an id that does not exist.

        Indexing would take the last adapter for −1 and for A, and answer with another agent's weights. NaN is loud.
        """

        def rows(b):
            if b is None:
                return None
            ids = jnp.where(adapter_ids < 0, b.shape[0], adapter_ids)
            own = b.at[ids].get(mode="fill", fill_value=jnp.nan).astype(jnp.float32)
            return jnp.where((adapter_ids == 0)[:, None, None, None], 0.0, own)

        return LoraB(rows(self.v), rows(self.k))
