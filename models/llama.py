"""A Llama that reads and writes a split KV cache: Flax NNX modules, used functionally.

`Llama` is declared once; `abstract_params` (shapes, dtypes, axes) is what random initialisation, every weight reader,
shardings and checkpoints fill in. Caches, page tables and adapters are pytrees that go in and come out.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec, Sharding
from jaxtyping import Array, Bool, Float, Int

from lragent_jax.kernels import page_write
from lragent_jax.kernels.rms_norm import rms_norm
from lragent_jax.kernels.rotary import rotate
from lragent_jax.models import cache_view
from lragent_jax.models.adapter_bank import (
    AdapterBank,
    LoraPair,
    expand_by_head,
    lora_delta,
)
from lragent_jax.models.cache_view import BaseCache, LayerCache, LowRankCache, PageTable
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.hashed_graph import HashedGraph
from lragent_jax.models.layer_adapters import LayerAdapters, written_groups
from lragent_jax.models.matrix_product import matrix_product, unjoined
from lragent_jax.models.packed_rows import PackedRows, attend_packed, attend_packed_split
from lragent_jax.models.rope import inverse_frequencies, rotation
from lragent_jax.models.row_products import row_products
from lragent_jax.models.tensor_parallel import (
    AXIS,
    BY_COLUMN,
    BY_ROW,
    HEADS,
    LORA_A_BY_ROW,
    WHOLE,
    look_up,
    per_shard,
    sum_over_shards,
)
from lragent_jax.models.weights import Shardings, leaf_shardings


def _projection(x: Float[Array, "B T in_width"], kernel: Float[Array, "in_width out_width"]) -> Array:
    return jnp.einsum("bti,io->bto", x, kernel)


class Linear(nnx.Module):
    """y = x W (+ b). `axes` are the legend's letters of W's two sides, for shardings."""

    def __init__(self, in_width: int, out_width: int, axes: tuple[str, str], dtype, bias: bool = False):
        self.kernel = nnx.Param(jnp.zeros((in_width, out_width), dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros((out_width,), dtype), axes=axes[1:]) if bias else None

    def __call__(self, x: Float[Array, "B T in_width"]) -> Float[Array, "B T out_width"]:
        return self.with_bias(matrix_product(_projection, x, self.kernel[...]))

    def with_bias(self, y: Float[Array, "B T out_width"]) -> Float[Array, "B T out_width"]:
        return y if self.bias is None else y + self.bias[...]


class ReducingLinear(Linear):
    """A linear map whose input is what tensor parallelism cuts: o and down, adapters included.

    Every device multiplies its part of the input by its rows of W and of A; what the adapters add is added to the
    partial sums, before they are summed, so that it needs no all-reduce of its own.
    """

    def __call__(
        self,
        x: Float[Array, "B T in_width"],
        target: str,
        adapters: LayerAdapters,
        residual: Float[Array, "B T out_width"] | None = None,
        implementation: str | None = "xla",
    ) -> Float[Array, "B T out_width"]:
        pair = adapters.pairs.get(target)
        if residual is not None:
            if pair is None:
                found = row_products(x, [self.kernel[...]], residual=residual, implementation=implementation)
                if found is not None:
                    return found[0][0]
            return residual + self(x, target, adapters, implementation=implementation)

        def partial(x, kernel, pair: LoraPair | None, *chosen):
            found = row_products(x, [kernel], implementation=implementation)
            y = matrix_product(_projection, x, kernel) if found is None else found[0][0]
            return sum_over_shards(y if pair is None else y + lora_delta(x, pair, *chosen))

        pair_specs = jax.tree.unflatten(jax.tree.structure(pair), [] if pair is None else [LORA_A_BY_ROW, WHOLE])
        return per_shard(partial, (HEADS, BY_ROW, pair_specs, WHOLE, WHOLE), WHOLE)(
            x, self.kernel[...], pair, adapters.group_of.get(target), adapters.adapter_ids
        )


class RMSNorm(nnx.Module):
    """x / rms(x) · scale, normalised in f32."""

    def __init__(self, width: int, eps: float, dtype):
        self.scale = nnx.Param(jnp.ones((width,), dtype), axes=("D",))
        self.eps = eps

    @property
    def arguments(self) -> tuple[Float[Array, " D"], float]:
        """Of a kernel that normalises on its own."""
        return self.scale[...], self.eps

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return rms_norm(x, self.scale[...], self.eps)


class Attention(nnx.Module):
    """Grouped-query attention over the paged caches."""

    def __init__(self, config: LlamaConfig, dtype):
        self.config = config
        shapes, bias = config.projection_shapes(), config.qkv_bias
        self.q = Linear(*shapes["q"], ("D", "N"), dtype, bias)
        self.k = Linear(*shapes["k"], ("D", "K"), dtype, bias)
        self.v = Linear(*shapes["v"], ("D", "K"), dtype, bias)
        self.o = ReducingLinear(*shapes["o"], ("N", "D"), dtype)

    def __call__(
        self, x, cache: LayerCache, adapters: LayerAdapters, table: PageTable, rope, inv_freq, *, write_base: bool,
        implementation: str | None, norm: RMSNorm | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:  # fmt: skip
        """The attention of x; with `norm`, that of what it makes of x, added to x."""
        residual = None if norm is None else x
        written = written_groups(cache, adapters, table)
        x, low_rank, q, *kv_rows = self.project(x, norm, adapters, written, write_base, implementation)
        k, v = self.keys_and_values(x, kv_rows, adapters, table)
        projections = page_write.Projections(self.heads(q), k, v)
        new = page_write.LowRank(**{
            target: low_rank[target] if target in low_rank else adapters.low_rank(target, x, groups)
            for target, groups in written.items()
        })  # fmt: skip
        if "q" in adapters.pairs:
            expands = functools.partial(cache_view.expands_queries, projections, new, cache, implementation)
            delta = self.query_delta(x, low_rank.get("q"), adapters, expands)
            projections = projections._replace(q_delta=delta)
        q, cache = cache_view.rotate_and_write(
            projections, page_write.Rotation(*rope), new, cache, table, implementation
        )  # fmt: skip
        attended = cache_view.attend(
            q, cache, adapters.pairs, table, adapters.adapter_ids, inv_freq, implementation
        ).reshape(*x.shape[:2], -1)
        return self.o(attended, "o", adapters, residual, implementation), cache

    def write(
        self, x: Float[Array, "B T D"], cache: LayerCache, adapters: LayerAdapters, table: PageTable, rope, *,
        norm: RMSNorm, write_base: bool, implementation: str | None,
    ) -> LayerCache:  # fmt: skip
        """What the tokens leave in the cache, and no attention."""
        written = written_groups(cache, adapters, table)
        linears = [self.k, self.v] if write_base else []
        if not linears and not written:
            return cache
        x, *apart = unjoined(norm(x), 1 + len(linears))
        kv_rows = [linear(y) for linear, y in zip(linears, apart, strict=True)]
        k, v = self.keys_and_values(x, kv_rows, adapters, table)
        # There are no queries: keys, or zeros, stand in for them, and what comes of those is dropped.
        heads = cache.kv.shape[1]
        q = jnp.zeros((*x.shape[:2], heads, self.config.head_dim), x.dtype) if k is None else k
        low_rank = {target: adapters.low_rank(target, x, groups) for target, groups in written.items()}
        _, cache = cache_view.rotate_and_write(
            page_write.Projections(q, k, v), page_write.Rotation(*rope), page_write.LowRank(**low_rank),
            cache, table, implementation,
        )  # fmt: skip
        return cache

    def keys_and_values(
        self, x: Float[Array, "B T D"], rows: Sequence[Float[Array, "B T width"]], adapters: LayerAdapters,
        table: PageTable,
    ) -> tuple[Float[Array, "B T K H"] | None, Float[Array, "B T K H"] | None]:  # fmt: skip
        """The base projections of x by heads, if there are any. Merged, the adapters are part of what is cached."""
        if not rows:
            return None, None
        k, v = (self.heads(y) for y in rows)
        if not table.num_low_rank_tables:
            k, v = (
                y + self.heads(adapters.delta(target, x)) if target in adapters.pairs else y
                for target, y in (("k", k), ("v", v))
            )
        return k, v

    def project(
        self, x: Float[Array, "B T D"], norm: RMSNorm | None, adapters: LayerAdapters,
        written: dict[str, Int[Array, "g B"]], write_base: bool, implementation: str | None,
    ) -> tuple[Any, ...]:  # fmt: skip
        """What `norm` makes of x, as far as adapters still read it; X A by target, as far as the projections' kernel
        makes it; the base projections [B, T, width]: q, and k and v if written.
        """
        linears = [self.q, self.k, self.v] if write_base else [self.q]
        adapted = adapters.pairs.keys() & {"q", "k", "v"}
        for shrinks in (adapters.shrinks(written), {}):  # without, if the kernel takes no A of that rank
            read = norm is not None and not adapted <= shrinks.keys()
            found = row_products(
                x, [linear.kernel[...] for linear in linears], norm=norm and norm.arguments, keep_normed=read,
                shrinks=shrinks, implementation=implementation,
            )  # fmt: skip
            if found is not None:
                products, low_rank = found
                projected = [linear.with_bias(y) for linear, y in zip(linears, products, strict=False)]
                return products[-1] if read else x, low_rank, *projected
        x, *apart = unjoined(x if norm is None else norm(x), 1 + len(linears))
        return x, {}, *(linear(y) for linear, y in zip(linears, apart, strict=True))

    def query_delta(
        self, x: Float[Array, "B T D"], low_rank: Float[Array, "1 B T r"] | None, adapters: LayerAdapters,
        expands: Callable[[int], bool],
    ) -> Float[Array, "B T N H"] | page_write.Expansion:  # fmt: skip
        """What the adapters add to q; of x, or of the X A that there is. `expands`: whether the page write had better
        make it of an X A of that rank.
        """
        lora_b = adapters.pairs["q"].lora_b
        if low_rank is not None:
            own, ids = low_rank[0], adapters.adapter_ids
        elif adapters.by_token is None and expands(lora_b.shape[1]):
            own, ids = adapters.own_low_rank("q", x)
        else:
            return self.heads(adapters.delta("q", x))
        return page_write.Expansion(own, lora_b.reshape(*lora_b.shape[:2], -1, self.config.head_dim), ids)

    def packed(
        self, x: Float[Array, "B T D"], adapters: LayerAdapters, rope, mask: Bool[Array, "B 1 T T"],
        implementation: str | None,
    ) -> Float[Array, "B T D"]:  # fmt: skip
        """The same over packed rows, without a cache.

        Where every token has its adapter, it reads keys and values as a split cache would hold them: what tokens of
        all adapters left there, base and low-rank, under its own B.
        """
        q, k = (
            rotate(self.heads(linear(x) + adapters.delta(target, x)), *rope)
            for target, linear in (("q", self.q), ("k", self.k))
        )
        by_token, pair = adapters.by_token, adapters.pairs.get("v")
        if by_token is None or pair is None:
            v = self.heads(self.v(x) + adapters.delta("v", x))
            attended = attend_packed(q, k, v, mask, implementation)
        else:
            low_rank = jnp.einsum("btd,dr->btr", x, pair.lora_a[0])
            base, low_rank = attend_packed_split(q, k, self.heads(self.v(x)), low_rank, mask, implementation)
            attended = base + expand_by_head(low_rank, pair.lora_b, by_token, self.config.num_kv_heads)
        return self.o(attended.reshape(*x.shape[:2], -1), "o", adapters)

    def heads(self, x: Float[Array, "B T width"]) -> Float[Array, "B T heads H"]:
        return x.reshape(*x.shape[:2], -1, self.config.head_dim)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: LlamaConfig, dtype):
        shapes = config.projection_shapes()
        self.gate = Linear(*shapes["gate"], ("D", "F"), dtype)
        self.up = Linear(*shapes["up"], ("D", "F"), dtype)
        self.down = ReducingLinear(*shapes["down"], ("F", "D"), dtype)

    def __call__(
        self, x: Float[Array, "B T D"], adapters: LayerAdapters, norm: RMSNorm | None = None,
        implementation: str | None = "xla",
    ) -> Float[Array, "B T D"]:  # fmt: skip
        """The MLP of x; with `norm`, that of what it makes of x, added to x."""
        found = None
        if adapters.pairs.keys().isdisjoint(("gate", "up")):
            kernels = [self.gate.kernel[...], self.up.kernel[...]]
            found = row_products(x, kernels, norm=norm and norm.arguments, gated=True, implementation=implementation)
        hidden = found[0][0] if found is not None else self.hidden(x if norm is None else norm(x), adapters)
        return self.down(hidden, "down", adapters, None if norm is None else x, implementation)

    def hidden(self, x: Float[Array, "B T D"], adapters: LayerAdapters) -> Float[Array, "B T F"]:
        x_gate, x_up = unjoined(x, 2)
        gate = self.gate(x_gate) + adapters.delta("gate", x_gate)
        return jax.nn.silu(gate) * (self.up(x_up) + adapters.delta("up", x_up))


class Block(nnx.Module):
    """Pre-norm attention and MLP, each with a residual."""

    def __init__(self, config: LlamaConfig, dtype):
        self.attention_norm = RMSNorm(config.width, config.norm_eps, dtype)
        self.attention = Attention(config, dtype)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps, dtype)
        self.mlp = MLP(config, dtype)

    def __call__(
        self, x, cache: LayerCache, adapters: LayerAdapters, table: PageTable, rope, *, implementation: str | None,
        **kwargs,
    ):  # fmt: skip
        inv_freq = inverse_frequencies(self.attention.config)
        x, cache = self.attention(
            x, cache, adapters, table, rope, inv_freq, norm=self.attention_norm, implementation=implementation, **kwargs
        )
        return self.mlp(x, adapters, self.mlp_norm, implementation), cache

    def write(
        self, x: Float[Array, "B T D"], cache: LayerCache, adapters: LayerAdapters, table: PageTable, rope, *,
        write_base: bool, implementation: str | None,
    ) -> LayerCache:  # fmt: skip
        """What the tokens leave in the cache, for those whose hidden states nobody reads."""
        return self.attention.write(
            x, cache, adapters, table, rope, norm=self.attention_norm, write_base=write_base,
            implementation=implementation,
        )  # fmt: skip

    def packed(self, x: Float[Array, "B T D"], adapters: LayerAdapters, *args) -> Float[Array, "B T D"]:
        """The same over packed rows, without a cache."""
        x = x + self.attention.packed(self.attention_norm(x), adapters, *args)
        return self.mlp(x, adapters, self.mlp_norm)


@functools.partial(jax.jit, static_argnames=("graphdef", "write_base", "implementation"))
def run_block(graphdef: nnx.GraphDef, params: nnx.State, *args, **kwargs):
    """A block as a function of its weights: layers of one shape are traced and lowered once, and inlined by XLA."""
    return nnx.merge(graphdef, params)(*args, **kwargs)


@functools.partial(jax.jit, static_argnames=("graphdef", "write_base", "implementation"))
def run_last_block(
    graphdef: nnx.GraphDef, params: nnx.State, x, cache: LayerCache, adapters: LayerAdapters, table: PageTable, rope, *,
    write_base: bool, implementation: str | None,
):  # fmt: skip
    """The block that no other follows, where only each row's last token is read: [B, 1, D], and the cache.

    All tokens leave keys and values there; queries, attention and MLP are those of the tokens that are read.
    """
    block: Block = nnx.merge(graphdef, params)
    cache = block.write(x, cache, adapters, table, rope, write_base=write_base, implementation=implementation)
    slots, table = table.last_tokens(x.shape[1])
    x, *rope = (jnp.take_along_axis(y, slots[:, None, None], axis=1) for y in (x, *rope))
    return block(x, cache, adapters, table, tuple(rope), write_base=False, implementation=implementation)


@functools.partial(jax.jit, static_argnames=("graphdef", "implementation", "saveable"))
def run_packed_block(graphdef: nnx.GraphDef, params: nnx.State, x, adapters, rope, mask, implementation, saveable):
    """The same over packed rows; what `saveable` does not allow to be kept is computed again in a backward pass."""

    def run(params: nnx.State, x, adapters, rope, mask):
        return nnx.merge(graphdef, params).packed(x, adapters, rope, mask, implementation)

    return jax.checkpoint(run, policy=saveable)(params, x, adapters, rope, mask)


class Llama(nnx.Module):
    """Token ids to hidden states; `logits` turns those it is asked for into scores over the vocabulary."""

    def __init__(self, config: LlamaConfig, dtype):
        self.config = config
        self.embed = nnx.Param(jnp.zeros((config.vocab_size, config.width), dtype), axes=("V", "D"))
        # Unrolled, one array per layer and weight: a scan over stacked weights reads them at a third of the speed.
        self.layers = nnx.List([Block(config, dtype) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.width, config.norm_eps, dtype)
        shape = (config.width, config.vocab_size)
        self.unembed = None if config.tied_embeddings else nnx.Param(jnp.zeros(shape, dtype), axes=("D", "V"))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        adapter_ids: Int[Array, " B"],
        table: PageTable,
        bank: AdapterBank,
        base_cache: BaseCache,
        low_rank_cache: LowRankCache,
        *,
        write_base: bool = True,
        last_only: bool = False,
        implementation: str | None = None,
    ) -> tuple[Float[Array, "B S D"], BaseCache, LowRankCache]:
        """Runs the tokens at positions [q_start, kv_len) of their rows.

        `write_base=False` skips the base projections of K and V, for tokens whose base pages exist: only low-rank
        pages are written then. Returns normalised hidden states in the parameters' dtype (those of padding mean
        nothing), of all tokens (S = T) or with `last_only` of each row's last (S = 1), and the caches with the tokens
        in them.
        """
        rope = rotation(table.positions(tokens.shape[1]), inverse_frequencies(self.config))
        x = look_up(self.embed[...], tokens)
        written = []
        for i, block in enumerate(self.layers):
            cache = LayerCache(
                kv=base_cache.kv[i],
                low_rank_v=None if low_rank_cache.v is None else low_rank_cache.v[i],
                low_rank_k=None if low_rank_cache.k is None else low_rank_cache.k[i],
            )
            adapters = LayerAdapters(pairs=bank.layers[i], group_of=bank.group_of, adapter_ids=adapter_ids)
            is_last = last_only and i == len(self.layers) - 1
            x, cache = (run_last_block if is_last else run_block)(
                *nnx.split(block), x, cache, adapters, table.of_layer(i), rope,
                write_base=write_base, implementation=implementation,
            )  # fmt: skip
            written.append(cache)
        base_cache = BaseCache(kv=tuple(cache.kv for cache in written))
        low_rank_cache = LowRankCache(
            v=None if low_rank_cache.v is None else tuple(cache.low_rank_v for cache in written),
            k=None if low_rank_cache.k is None else tuple(cache.low_rank_k for cache in written),
        )
        return self.norm(x), base_cache, low_rank_cache

    def packed(
        self,
        rows: PackedRows,
        pairs: tuple[dict[str, LoraPair], ...],
        *,
        saveable: Callable[..., bool] | None = None,
        implementation: str | None = None,
    ) -> Float[Array, "B T D"]:
        """Runs whole sequences without caches, several to a row, for training: differentiable in `pairs`.

        `pairs` are, per layer, one adapter's matrices by target, with A = g = 1. Where the rows say which adapter runs
        each token, they are those of A adapters: g = A, but for v, of which all adapters share one lora_a (g = 1), the
        A-group of the cache that they share; k cannot be adapted then, for keys would have to be rebuilt for every
        reader, and `ValueError` says so. A backward pass keeps the input of every block and what `saveable` allows
        (see `jax.checkpoint_policies`), and computes the rest once more. `implementation` is that of `attend_packed`.
        Returns normalised hidden states in the parameters' dtype.
        """
        if rows.adapter_ids is not None and any("k" in of_layer for of_layer in pairs):
            raise ValueError("with an adapter per token, k cannot be one of the targets")
        rope = rotation(rows.positions, inverse_frequencies(self.config))
        mask = rows.mask()
        x = look_up(self.embed[...], rows.tokens)
        for block, of_layer in zip(self.layers, pairs, strict=True):
            adapters = LayerAdapters(pairs=of_layer, group_of={}, adapter_ids=rows.adapter_ids)
            x = run_packed_block(*nnx.split(block), x, adapters, rope, mask, implementation, saveable)
        return self.norm(x)

    def logits(self, hidden: Float[Array, "*positions D"]) -> Float[Array, "*positions V"]:
        """Scores over the vocabulary, f32; where weights are cut, each device has those of its part of it."""
        tied = self.unembed is None
        equation = "...d,vd->...v" if tied else "...d,dv->...v"

        def scores(hidden, unembed):
            return jnp.einsum(equation, hidden, unembed, preferred_element_type=jnp.float32)

        by_vocabulary = PartitionSpec(*(None,) * (hidden.ndim - 1), AXIS)
        weight, spec = (self.embed, BY_ROW) if tied else (self.unembed, BY_COLUMN)
        return per_shard(scores, (WHOLE, spec), by_vocabulary)(hidden, weight[...])


Params = nnx.State
"""A Llama's weights: a pytree of arrays whose paths are the module's attribute names."""


def abstract_params(config: LlamaConfig, dtype) -> tuple[nnx.GraphDef, Params]:
    """The one declaration of the weights: structure, and shape, dtype and axes of each; nothing is allocated."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Llama(config, dtype)))
    return HashedGraph.of(graphdef), params


def random_params(
    config: LlamaConfig, dtype, seed: int = 0, shardings: Shardings = None
) -> tuple[nnx.GraphDef, Params]:
    """Weights drawn on the device: normal with deviation 1/sqrt(input width), norms 1, biases small.

    They are drawn where `shardings` says they lie (`None`: on the default device); the numbers do not depend on it.
    """
    graphdef, abstract = abstract_params(config, dtype)

    @functools.cache
    def draw(shape: tuple[int, ...], scale: float, sharding: Sharding | None) -> Callable:
        def numbers(key, index):
            return (jax.random.normal(jax.random.fold_in(key, index), shape) * scale).astype(dtype)

        return jax.jit(numbers, out_shardings=sharding)

    leaves, treedef = jax.tree.flatten(abstract)
    key = jax.random.key(seed)
    filled = []
    for index, (leaf, sharding) in enumerate(zip(leaves, leaf_shardings(abstract, shardings), strict=True)):
        is_norm = len(leaf.shape) == 1 and leaf.shape[0] == config.width
        scale = 0.02 if len(leaf.shape) == 1 else float(1 / np.sqrt(min(leaf.shape[0], config.mlp_width)))
        ones = functools.partial(jnp.ones, leaf.shape, dtype, device=sharding)
        filled.append(ones() if is_norm else draw(leaf.shape, scale, sharding)(key, index))
    return graphdef, jax.tree.unflatten(treedef, filled)
