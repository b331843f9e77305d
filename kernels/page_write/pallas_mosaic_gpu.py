"""RoPE and the page write in one kernel for NVIDIA Hopper: one warpgroup per token, mostly loads and stores.

Where what adapters add to q is made here, of many tokens' X A, a warpgroup rotates one block of heads of a group of
tokens: it loads B once. An array of what is added would be written and read again, as large as q.

Heads are taken in blocks, the two halves of a head as two arrays of registers, so that a rotation is arithmetic
between registers of one thread. Cosines and sines lie in memory once per head of a block: a load that repeats them for
every head has no layout. Pools go in and out as the same memory, and only slots of tokens that are written are touched.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lragent_jax.kernels.hopper import interpreter, refuse_other_gpus
from lragent_jax.kernels.interpret import is_interpreted
from lragent_jax.kernels.page_write.arguments import Expansion, LowRank, Pools, Projections, Rotation, Slots

THREADS = 128
MAX_VECTOR = 8  # 16-bit numbers that a thread loads at once
MAX_HEADS = 8  # of a block
MOST_TOKENS = 2**20  # of one call; more are left to others
RANKS_AT_ONCE = 8  # rows of a B that are under way before the first is multiplied
FEW_TOKENS = 256  # up to here every block of heads is a program of its own: waiting times overlap
MAX_GROUP = 16  # tokens whose q's part is made of the same B in registers
TOKENS_AT_ONCE = 2  # of a group, under way before the first is rotated
WARPGROUPS = 2  # of a program where tokens are in groups: neighbouring blocks of heads find angles in the L1 cache
MIN_GROUP = 8  # where that pays: every group loads B again
MAX_RANK = 8  # of a B that is held in registers: of rank 16 too few programs fit, and XLA's array costs no more

# JAX 0.10 asks for an index beside the reference, 0.12 takes none.
_idx = inspect.signature(plgpu.load).parameters.get("idx")
INDEX = ((),) if _idx is not None and _idx.default is inspect.Parameter.empty else ()


class Inputs(NamedTuple):
    """The kernel's arguments, in device memory; M = B T tokens.

    Of few tokens whose q has no `expansion`, `q` holds everything that XLA has made of them, in one kernel: q with its
    adapter's part, k, v, and low-rank values and keys, padded to heads.
    """

    q: Any  # [M, N, H] or [M, N + 2 K + .., H]
    angles: Any  # [M, 2, heads, H/2]: cosines, sines
    slots: Any  # [1 + g, M]
    q_delta: Any = None  # [M, N, H]
    k: Any = None  # [M, K, H]
    v: Any = None  # [M, K, H]
    low_rank_v: Any = None  # [g, M, r_v]
    low_rank_k: Any = None  # [g, M, r_k]
    expansion: Any = None  # Expansion: [M, r], [A, r, N, H], [M]


class Shapes(NamedTuple):
    """What a kernel is compiled for. heads: of a block. few: the heads of one token are divided among programs. group:
    tokens that a warpgroup makes q's part of with one B in registers, for a block of heads; else 0.
    """

    N: int
    K: int
    H: int
    heads: int
    tables: int
    ranks: tuple[int, int]  # of low-rank values and keys that are written, or 0
    base: bool  # whether k and v are written
    few: bool
    group: int
    interpret: bool

    @property
    def blocks(self) -> int:
        return self.N // self.heads

    @property
    def pools(self) -> int:
        """That a token is written to."""
        return self.base + sum(rank > 0 for rank in self.ranks)

    def query_parts(self, M: int) -> int:
        """Where tokens are in groups: how many warpgroups rotate queries. Behind them, one per token writes pages."""
        return M // self.group * self.blocks

    def mesh(self, M: int) -> plgpu.Mesh:
        if self.group:
            programs = pl.cdiv(self.query_parts(M) + (M if self.pools else 0), WARPGROUPS)
            return plgpu.Mesh(
                grid=(programs,), grid_names=("program",), num_threads=WARPGROUPS, thread_name="warpgroup"
            )
        if self.few:
            return plgpu.Mesh(grid=(self.blocks + self.pools, M), grid_names=("part", "token"))
        return plgpu.Mesh(grid=(M,), grid_names=("token",))

    def load(self, ref) -> jax.Array:
        """`ref` [heads, lanes] in registers, some neighbouring lanes per thread."""
        if self.interpret:
            return ref[...]
        vector = min(math.prod(ref.shape) // THREADS, MAX_VECTOR)
        layout = plgpu.Layout.WG_STRIDED(tuple(ref.shape), vec_size=vector)
        return plgpu.load(ref, *INDEX, layout=layout, optimized=False)

    def halves(self, ref, token, first_head) -> list[jax.Array]:
        """x[i] and x[i + H/2] of a block of heads, f32."""
        half, heads = self.H // 2, pl.ds(first_head, self.heads)
        return [self.load(ref.at[token, heads, pl.ds(lane, half)]).astype(jnp.float32) for lane in (0, half)]

    def angles(self, inputs: Inputs, token) -> list[jax.Array]:
        """Cosines and sines of a token, for a half of every head of a block."""
        return [self.load(inputs.angles.at[token, i]) for i in range(2)]

    def low_rank(self, inputs: Inputs, target: int, table: int, token) -> list[jax.Array]:
        """The token's numbers of low-rank values (target 0) or keys (1)."""
        apart, rank = (inputs.low_rank_v, inputs.low_rank_k)[target], self.ranks[target]
        if apart is not None:
            return [apart[table, token, i] for i in range(rank)]
        first = (self.N + 2 * self.K * self.base) * self.H + self.tables * self.ranks[0] * target + table * rank
        return [inputs.q[token, i // self.H, i % self.H] for i in range(first, first + rank)]


def rotated(x: list[jax.Array], angles) -> tuple[jax.Array, jax.Array]:
    (first, second), (cos, sin) = x, angles
    return first * cos - second * sin, second * cos + first * sin


def rows_of_b(s: Shapes, expansion: Expansion, token, first_head, ranks: range) -> list[list[jax.Array]]:
    """These rows of the B of a token's adapter, of a block of heads, as the halves of q."""
    # As XLA reads: what does not exist is another's, and attention makes it no number.
    adapter = jnp.clip(expansion.adapter_ids[token], 0, expansion.lora_b.shape[0] - 1)
    return [s.halves(expansion.lora_b.at[adapter], i, first_head) for i in ranks]


def low_rank_of(expansion: Expansion, token, ranks: range) -> list[jax.Array]:
    return [expansion.low_rank[token, i].astype(jnp.float32) for i in ranks]


def multiplied(numbers, matrix, total: Sequence[jax.Array] = ()) -> list[jax.Array]:
    """`total`, if there is one, and numbers · matrix, f32."""
    for number, halves in zip(numbers, matrix, strict=True):
        products = [number * half for half in halves]
        total = [x + y for x, y in zip(total, products, strict=True)] if total else products
    return list(total)


def expanded(s: Shapes, expansion: Expansion, token, first_head) -> list[jax.Array]:
    """(X A) B of a token, of a block of heads, as the halves of q: summed in f32."""
    rank, total = expansion.low_rank.shape[1], []
    for first in range(0, rank, RANKS_AT_ONCE):
        ranks = range(first, min(first + RANKS_AT_ONCE, rank))
        matrix = rows_of_b(s, expansion, token, first_head, ranks)
        total = multiplied(low_rank_of(expansion, token, ranks), matrix, total)
    return total


def store_rotated(s: Shapes, q_out, token, block, q, deltas, angles) -> None:
    """RoPE(q + deltas) of a block of heads; what is added is rounded, and so is its sum with q."""
    for delta in deltas:
        rounded = [half.astype(q_out.dtype).astype(jnp.float32) for half in delta]
        q = [(x + dx).astype(q_out.dtype).astype(jnp.float32) for x, dx in zip(q, rounded, strict=True)]
    for lane, x in zip((0, s.H // 2), rotated(q, angles), strict=True):
        q_out[token, pl.ds(block * s.heads, s.heads), pl.ds(lane, s.H // 2)] = x.astype(q_out.dtype)


def rotate_queries(s: Shapes, inputs: Inputs, q_out, token, blocks) -> Callable[[], None]:
    """These blocks of heads of one token are loaded; what comes back rotates and stores them."""
    angles = s.angles(inputs, token)
    loaded = [
        [s.halves(x, token, block * s.heads) for x in (inputs.q, inputs.q_delta) if x is not None] for block in blocks
    ]
    if inputs.expansion is not None:
        for block, parts in zip(blocks, loaded, strict=True):
            parts.append(expanded(s, inputs.expansion, token, block * s.heads))

    def store():
        for block, (q, *deltas) in zip(blocks, loaded, strict=True):
            store_rotated(s, q_out, token, block, q, deltas, angles)

    return store


def rotate_group(s: Shapes, inputs: Inputs, q_out, group, block) -> None:
    """One block of heads of a group's tokens, which are of one row: B of its adapter is loaded once."""
    first, ranks = group * s.group, range(inputs.expansion.low_rank.shape[1])
    matrix = rows_of_b(s, inputs.expansion, first, block * s.heads, ranks)
    at_once = math.gcd(s.group, TOKENS_AT_ONCE)

    def rotate_some(step, _):
        tokens = [first + step * at_once + i for i in range(at_once)]
        loaded = [
            (
                s.halves(inputs.q, token, block * s.heads),
                s.angles(inputs, token),
                low_rank_of(inputs.expansion, token, ranks),
            )
            for token in tokens
        ]
        for token, (q, angles, numbers) in zip(tokens, loaded, strict=True):
            store_rotated(s, q_out, token, block, q, [multiplied(numbers, matrix)], angles)

    lax.fori_loop(0, s.group // at_once, rotate_some, None)


def where_written(slots, table: int, token, pool, write) -> None:
    """write(page, slot) for a token that is written to that pool."""
    num_pages, page_size = pool.shape[0], pool.shape[-1] if len(pool.shape) == 3 else pool.shape[2]
    target = slots[table, token]

    @pl.when((target >= 0) & (target < num_pages * page_size))
    def _():
        write(lax.div(target, jnp.int32(page_size)), lax.rem(target, jnp.int32(page_size)))


def write_base(s: Shapes, inputs: Inputs, pool, token) -> Callable[[], None]:
    """A token's k and v are loaded; what comes back rotates and stores them."""
    k, k_head, v, v_head = inputs.k, 0, inputs.v, 0
    if k is None:
        k, k_head, v, v_head = inputs.q, s.N, inputs.q, s.N + s.K
    angles = s.angles(inputs, token)
    blocks = range(0, s.K, s.heads)
    loaded = [(s.halves(k, token, k_head + i), s.load(v.at[token, pl.ds(v_head + i, s.heads)])) for i in blocks]

    def write(page, slot):
        for head, (keys, values) in zip(blocks, loaded, strict=True):
            heads = pl.ds(head, s.heads)
            for lane, x in zip((0, s.H // 2), rotated(keys, angles), strict=True):
                pool[page, heads, slot, pl.ds(lane, s.H // 2)] = x.astype(pool.dtype)
            pool[page, heads, slot, pl.ds(s.H, s.H)] = values

    return lambda: where_written(inputs.slots, 0, token, pool, write)


def write_low_rank(s: Shapes, inputs: Inputs, target: int, pool, token) -> Callable[[], None]:
    """The same of its low-rank numbers: one at a time, for they lie p numbers apart; a token has few of them."""
    loaded = [s.low_rank(inputs, target, table, token) for table in range(s.tables)]

    def store():
        for table, numbers in enumerate(loaded):

            def write(page, slot, numbers=numbers):
                for i, number in enumerate(numbers):
                    pool[page, i, slot] = number

            where_written(inputs.slots, 1 + table, token, pool, write)

    return store


def page_writes(s: Shapes, inputs: Inputs, pools: Pools, token) -> list[Callable[[], Callable[[], None]]]:
    """What there is to write of a token, each to a pool."""
    tasks = [functools.partial(write_base, s, inputs, pools.kv, token)] if s.base else []
    for target, pool in enumerate((pools.low_rank_v, pools.low_rank_k)):
        if pool is not None:
            tasks.append(functools.partial(write_low_rank, s, inputs, target, pool, token))
    return tasks


def run_together(tasks) -> None:
    for store in [task() for task in tasks]:
        store()


def kernel_body(s: Shapes, inputs: Inputs, q_out, pools: Pools) -> None:
    """All that a token needs is under way before it is waited for, where it goes to included; behind B, in groups."""
    if s.group:
        M = q_out.shape[0]
        part = lax.axis_index("program") * WARPGROUPS + lax.axis_index("warpgroup")
        group, block = lax.div(part, jnp.int32(s.blocks)), lax.rem(part, jnp.int32(s.blocks))
        token = part - s.query_parts(M)
        pl.when(token < 0)(lambda: rotate_group(s, inputs, q_out, group, block))
        pl.when((token >= 0) & (token < M))(lambda: run_together(page_writes(s, inputs, pools, token)))
        return
    token = lax.axis_index("token")
    tasks = page_writes(s, inputs, pools, token)
    if not s.few:
        run_together([functools.partial(rotate_queries, s, inputs, q_out, token, range(s.blocks)), *tasks])
        return
    part = lax.axis_index("part")
    pl.when(part < s.blocks)(lambda: rotate_queries(s, inputs, q_out, token, [part])())
    for i, task in enumerate(tasks):
        pl.when(part == s.blocks + i)(lambda task=task: task()())


def heads_of_block(N: int, K: int) -> int:
    """As many as divide both kinds of heads."""
    return math.gcd(N, K, MAX_HEADS)


def group_size(B: int, T: int, rank: int) -> int:
    """Tokens whose q's part is made with one B in registers, of one row all of them, hence of one adapter.

    0 where tokens are few, or B is too large for that: there every token loads it.
    """
    return math.gcd(T, MAX_GROUP) if B * T > FEW_TOKENS and rank <= MAX_RANK else 0


def refuse(projections: Projections, pools: Pools, low_rank: LowRank) -> None:
    """Raises NotImplementedError for what the kernel was not written for."""
    q, kv = projections.q, pools.kv
    N, H = q.shape[2:]
    arrays = [x for x in jax.tree.leaves((projections, pools, low_rank)) if x.dtype != jnp.int32]
    if q.dtype not in ("bfloat16", "float16") or any(x.dtype != q.dtype for x in arrays):
        raise NotImplementedError(f"dtypes {sorted({str(x.dtype) for x in arrays})}: all must be bfloat16, or float16")
    if q.shape[0] * q.shape[1] > MOST_TOKENS:
        raise NotImplementedError(f"{q.shape[0] * q.shape[1]} tokens: it is written for up to {MOST_TOKENS}")
    if H not in (64, 128):
        raise NotImplementedError(f"head dim {H}: it is written for 64 and 128")
    heads = heads_of_block(N, kv.shape[1])
    if heads * H // 2 % THREADS:
        raise NotImplementedError(f"{N} and {kv.shape[1]} heads of {H}: blocks of {heads} do not fill a warpgroup")
    if not 16 <= kv.shape[2] <= 128:
        raise NotImplementedError(f"page size {kv.shape[2]}: it is written for 16 to 128")
    refuse_other_gpus()


def expands(projections: Projections, low_rank: LowRank, pools: Pools, rank: int) -> bool:
    """See `api.expands`. Of few tokens XLA adds what it has made of them in a kernel that there is anyway."""
    refuse(projections, pools, low_rank)
    B, T = projections.q.shape[:2]
    return group_size(B, T, rank) >= MIN_GROUP


def make_inputs(
    projections: Projections, rotation: Rotation, low_rank: LowRank, slots: Slots, heads: int, few: bool
) -> Inputs:
    q, k, v, q_delta = projections
    H, M = q.shape[3], q.shape[0] * q.shape[1]
    angles = jnp.broadcast_to(jnp.stack([x.reshape(M, 1, H // 2) for x in rotation], axis=1), (M, 2, heads, H // 2))
    targets = slots.base.reshape(1, M)
    if slots.low_rank is not None:
        targets = jnp.concatenate([targets, slots.low_rank.reshape(-1, M)])
    expansion = None
    if isinstance(q_delta, Expansion):
        low, lora_b, ids = q_delta
        expansion = Expansion(low.reshape(M, -1), lora_b, jnp.broadcast_to(ids[:, None], q.shape[:2]).reshape(M))
        q_delta = None
    if expansion is not None or not few:
        q, q_delta, k, v = (None if x is None else x.reshape(M, -1, H) for x in (q, q_delta, k, v))
        low_rank_v, low_rank_k = (None if x is None else x.reshape(x.shape[0], M, -1) for x in low_rank)
        return Inputs(q, angles, targets, q_delta, k, v, low_rank_v, low_rank_k, expansion)
    parts = [q if q_delta is None else q + q_delta, *(x for x in (k, v) if x is not None)]
    parts += [jnp.einsum("gbtr->btgr", x) for x in low_rank if x is not None]
    joined = jnp.concatenate([x.reshape(M, -1) for x in parts], axis=1)
    joined = jnp.pad(joined, ((0, 0), (0, -joined.shape[1] % H)))
    return Inputs(joined.reshape(M, -1, H), angles, targets)


@functools.partial(jax.jit, static_argnames="interpret")  # traced and lowered once for all layers of a model
def call(
    projections: Projections, rotation: Rotation, low_rank: LowRank, slots: Slots, pools: Pools, *, interpret: bool
) -> tuple[Float[Array, "B T N H"], Pools]:
    B, T, N, H = projections.q.shape
    K = pools.kv.shape[1]
    q_delta = projections.q_delta
    group = group_size(B, T, q_delta.low_rank.shape[2]) if isinstance(q_delta, Expansion) else 0
    s = Shapes(
        N, K, H, heads=heads_of_block(N, K), tables=0 if slots.low_rank is None else slots.low_rank.shape[0],
        ranks=tuple(0 if x is None else x.shape[-1] for x in low_rank), base=projections.k is not None,
        few=B * T <= FEW_TOKENS, group=group, interpret=interpret,
    )  # fmt: skip
    inputs = make_inputs(projections, rotation, low_rank, slots, s.heads, s.few)
    given = (projections.k, *low_rank)
    written = Pools(*(None if new is None else pool for new, pool in zip(given, pools, strict=True)))
    arrays, as_inputs = jax.tree.flatten(inputs)
    pool_arrays, as_pools = jax.tree.flatten(written)

    def body(*refs):
        *refs, q_out = refs
        pool_refs = jax.tree.unflatten(as_pools, refs[len(arrays) :])
        kernel_body(s, jax.tree.unflatten(as_inputs, refs[: len(arrays)]), q_out, pool_refs)

    kernel = pl.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((B * T, N, H), projections.q.dtype),
        mesh=s.mesh(B * T),
        # Nothing is read that was written before: there is nothing to wait for. Its layouts are written down: the
        # solver that the other semantics bring would only find them again, slowly.
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        name=f"rotate_and_write_h{H}",
        **interpreter(interpret),
    )
    in_place = [jax.new_ref(pool) for pool in pool_arrays]
    q_out = kernel(*arrays, *in_place)
    pool_arrays = [ref[...] for ref in in_place]
    written = jax.tree.unflatten(as_pools, pool_arrays)
    pools = Pools(*(old if new is None else new for old, new in zip(pools, written, strict=True)))
    return q_out.reshape(projections.q.shape), pools


def rotate_and_write(
    projections: Projections, rotation: Rotation, low_rank: LowRank, slots: Slots, pools: Pools
) -> tuple[Float[Array, "B T N H"], Pools]:
    """See `api.rotate_and_write`."""
    refuse(projections, pools, low_rank)
    return call(projections, rotation, low_rank, slots, pools, interpret=is_interpreted())
