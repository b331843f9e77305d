"""The engine's two programs, `prefill` and `decode`, compiled for TPUs that need not be there.

libtpu compiles for a description of a slice (`jax.experimental.topologies`) on any machine. What comes out is the
program a TPU would run: its memory, its kernels, its collectives. Nothing here runs.
"""

import dataclasses
import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

from lragent_jax import generation
from lragent_jax.generation import Cache, Slots
from lragent_jax.kernels import lora_attention as attention
from lragent_jax.kernels.lora_attention import LoraB, LowRank
from lragent_jax.models.adapter_bank import CACHED_TARGETS, AdapterBank, LoraPair
from lragent_jax.models.cache_view import BaseCache, LowRankCache, PageTable
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.llama import abstract_params
from lragent_jax.models.sharding import bank_shardings, cache_shardings, param_shardings
from lragent_jax.models.tensor_parallel import AXIS, WHOLE
from lragent_jax.sampling import sampling_arrays

# What libtpu would ask a cloud machine's metadata server for.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # or the first of several processes keeps the library for itself
}


@functools.cache
def slice_devices(generation_name: str, chips: str) -> tuple[Any, ...]:
    """The devices of a slice, e.g. `slice_devices("v5e", "2x4")`; a tpu7x chip is two."""
    for name, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    bounds = {"chips_per_host_bounds": [1, 1, 1]} if math.prod(map(int, chips.split("x"))) == 1 else {}
    topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{generation_name}:{chips}", **bounds)
    return tuple(topology.devices)


def model_mesh(devices) -> Mesh:
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is compiled: a model of `config` over `mesh`, adapters of one A-group, and a batch.

    targets: the adapted projections. split: whether K and V adapters are in low-rank pages (`base_lr`), or merged
    (`none`). pages: of both pools. width: columns of the page table.
    """

    config: LlamaConfig
    mesh: Mesh
    targets: tuple[str, ...] = ("q", "v")
    split: bool = True
    rank: int = 16
    num_adapters: int = 3
    batch: int = 1
    tokens: int = 1024
    page_size: int = 128
    pages: int = 5600
    width: int = 264
    dtype: str = "bfloat16"
    implementation: str | None = "pallas_mosaic_tpu"

    def array(self, *shape: int, dtype=None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype or self.dtype, sharding=NamedSharding(self.mesh, WHOLE))

    def ints(self, *shape: int) -> np.ndarray:
        """What the host sends."""
        return np.zeros(shape, np.int32)

    def params(self) -> tuple[nnx.GraphDef, Any]:
        graphdef, abstract = abstract_params(self.config, self.dtype)
        return graphdef, place(abstract, param_shardings(self.config, abstract, self.mesh))

    def bank(self) -> AdapterBank:
        shapes, A, r = self.config.projection_shapes(), self.num_adapters + 1, self.rank

        def pair(target: str) -> LoraPair:
            groups = 1 if target in CACHED_TARGETS else A
            in_width, out_width = shapes[target]
            return LoraPair(lora_a=self.zeros(groups, in_width, r), lora_b=self.zeros(A, r, out_width))

        bank = jax.eval_shape(
            lambda: AdapterBank(
                layers=tuple({t: pair(t) for t in self.targets} for _ in range(self.config.num_layers)),
                group_of={t: jnp.zeros(A, jnp.int32) for t in self.targets},
            )
        )
        return place(bank, bank_shardings(bank, self.mesh))

    def zeros(self, *shape: int):
        return jnp.zeros(shape, self.dtype)

    def cache(self) -> Cache:
        c, p = self.config, self.page_size

        def pools(*shape: int):
            return tuple(self.zeros(*shape) for _ in range(c.num_layers))

        def low_rank(target: str):
            return pools(self.pages, self.rank, p) if self.split and target in self.targets else None

        base, low = jax.eval_shape(
            lambda: (
                BaseCache(kv=pools(self.pages, c.num_kv_heads, p, 2 * c.head_dim)),
                LowRankCache(v=low_rank("v"), k=low_rank("k")),
            )
        )
        base_shardings, low_shardings = cache_shardings(base, low, self.mesh)
        return Cache(base=place(base, base_shardings), low_rank=place(low, low_shardings))

    def table(self) -> PageTable:
        B, W = self.batch, self.width
        g = 1 if self.split and any(target in self.targets for target in CACHED_TARGETS) else 0

        ints = self.ints
        return PageTable(
            q_starts=ints(B), kv_lens=ints(B), base=ints(B, W), base_write_from=ints(B), low_rank=ints(g, B, W),
            low_rank_write_from=ints(g, B), group_ids=ints(g, B), read_slots=ints(B),
        )  # fmt: skip

    def everywhere(self, tree):
        """The tree's shapes and dtypes, on every device."""
        return jax.tree.map(lambda x: self.array(*x.shape, dtype=x.dtype), tree)

    def caches(self) -> list[Any]:
        """The pools of each kind of cache, of all layers."""
        cache = self.cache()
        return [pools for pools in (cache.base.kv, cache.low_rank.v, cache.low_rank.k) if pools]

    def arguments(self, program: str) -> tuple[Any, ...]:
        """Those of `program` ("prefill" or "decode") behind the graphdef."""
        ids, table, shared = self.ints(self.batch), self.table(), (self.params()[1], self.bank(), self.cache())
        if program == "prefill":
            return (*shared, self.ints(self.batch, self.tokens), ids, table)
        sampling = sampling_arrays([], [], (), self.batch)
        return (*shared, self.slots(), ids, sampling, ids, table, self.ints())

    def lower(self, program: str) -> jax.stages.Lowered:
        """`program` of the batch, ready to be compiled; its caches are donated."""
        args = (self.params()[0], *self.arguments(program))
        with jax.set_mesh(self.mesh):
            if program == "prefill":
                last_only = generation.has_last_only(self.tokens)
                return generation.prefill.lower(*args, last_only=last_only, implementation=self.implementation)
            return generation.decode.lower(*args, block=32, implementation=self.implementation)

    def slots(self) -> Slots:
        return self.everywhere(jax.eval_shape(lambda: Slots.empty(self.batch)))


def place(tree, shardings):
    """The tree's shapes and dtypes, with these shardings."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    placed = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for leaf, sharding in leaves]
    return jax.tree.unflatten(jax.tree.structure(tree), placed)


@dataclasses.dataclass(frozen=True)
class KernelShape:
    """One call of attention on one device; the pools are far larger than what a kernel may need for itself."""

    mesh: Mesh
    B: int
    T: int
    N: int
    K: int
    H: int
    r_v: int
    r_k: int
    dtype: str

    def __str__(self) -> str:
        path = "decode" if self.T == 1 else f"prefill {self.T}"
        return f"{path} B={self.B} N={self.N} K={self.K} H={self.H} r_v={self.r_v} r_k={self.r_k} {self.dtype}"

    def array(self, *shape: int, dtype=None) -> Any:
        sharding = NamedSharding(self.mesh, WHOLE)
        return None if 0 in shape else jax.ShapeDtypeStruct(shape, dtype or self.dtype, sharding=sharding)

    def arguments(self) -> tuple:
        """Those of `attend` below."""
        p, A, W = 128, 4, 264
        itemsize = jnp.dtype(self.dtype).itemsize
        P = 2**29 // (p * self.K * 2 * self.H * itemsize)
        ints = functools.partial(self.array, dtype=jnp.int32)
        adapted = self.r_v or self.r_k

        def low_rank_pool(r: int) -> Any:
            return self.array(2**27 // (p * r * itemsize), r, p) if r else None

        low_rank = LowRank(low_rank_pool(self.r_v), low_rank_pool(self.r_k)) if adapted else None
        lora_b = LoraB(self.array(A, self.r_v, self.K, self.H), self.array(A, self.r_k, self.K, self.H))
        B = self.B
        table = attention.PageTable(ints(B, W), ints(B, W) if adapted else None, ints(B), ints(B))
        inv_freq = self.array(self.H // 2, dtype=jnp.float32) if self.r_k else None
        q, base = self.array(B, self.T, self.N, self.H), self.array(P, self.K, p, 2 * self.H)
        return q, base, low_rank, lora_b if adapted else None, table, ints(B) if adapted else None, inv_freq

    def caches(self) -> list[Any]:
        """The pools."""
        _, base, low_rank, *_ = self.arguments()
        return [base, *(pool for pool in low_rank or () if pool is not None)]

    def lower(self) -> jax.stages.Lowered:
        def attend(*args):
            *args, inv_freq = args
            return attention.lora_attention(*args, rope_inv_freq=inv_freq, implementation="pallas_mosaic_tpu")

        with jax.set_mesh(self.mesh):
            return jax.jit(attend).lower(*self.arguments())


def heuristic_shapes() -> list[tuple]:
    """`KernelShape`s but for the mesh: every block size of the heuristic and every kind of low-rank cache."""
    models = ((32, 8, 128), (4, 1, 128), (9, 3, 64), (32, 8, 64))
    ranks = ((0, 0), (8, 0), (16, 16), (64, 64))
    bf16 = [
        (B, T, *model, *rank, "bfloat16")
        for model in models
        for (B, T), rank in zip(((1, 1), (8, 1), (1, 1024), (2, 8)), ranks, strict=True)
    ]
    more = [
        (1, 1, 32, 8, 128, 16, 0),
        (8, 1, 32, 8, 128, 64, 64),
        (1, 1024, 32, 8, 128, 64, 64),
        (1, 1024, 4, 1, 128, 16, 0),
    ]
    f32 = [(2, 1, 32, 8, 128, 16, 16, "float32"), (2, 512, 32, 8, 128, 16, 16, "float32")]
    return bf16 + [(*shape, "bfloat16") for shape in more] + f32
