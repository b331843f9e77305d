"""How an engine is set up, checked before anything is loaded."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lragent_jax.devices import choose_devices
from lragent_jax.kernels.lora_attention.dispatch import IMPLEMENTATIONS
from lragent_jax.models.errors import InputError
from lragent_jax.models.weights import DTYPES
from lragent_jax.processes import join_processes
from lragent_jax.sharing import Sharing, SharingMode


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Sizes and rules of an engine; every field is a keyword of `Engine`'s constructors.

    Attributes:
      sharing: the sharing mode, see `lragent_jax.sharing`.
      num_pages: base pages in the pool.
      page_size: tokens per page, a multiple of 8; 64 by default, 128 on TPU.
      num_low_rank_pages: pages of the low-rank pool; by default `num_pages` for every A-group (in mode `base`: every
        adapter) that is loaded, and the pool grows with them, which compiles programs anew.
      recompute_layers: in mode `droidspeak`, the layers whose K and V every adapter computes and keeps for itself; by
        default the first third. `lragent_jax.sensitivity.critical_layers` measures a better choice.
      num_recomputed_pages: pages of the pool of those layers, which adapters share out among them as they do the base
        pages of `none`; by default `num_pages` for every adapter that is loaded, or that `max_adapters` makes room
        for, and for the model without one. Like the base pool it does not grow with adapters that are loaded later.
      max_adapters, max_rank: room to reserve in the adapter bank. Adapters that are loaded later into that room, for
        targets that some adapter has, compile nothing anew unless they bring an A-group.
      prefill_buckets: chunk lengths in tokens that programs are compiled for; contexts are cut into them.
      prefix_cache: whether pages stay when their trajectory has closed, for every context that begins with the same
        token ids, until a call needs them.
      decode_block: the most tokens per row between two looks of the host at them.
      max_batch_size: requests that have pages at a time; more wait.
      min_batch_size: rows of a decode program, padding included, at the least. A larger one is fewer programs to
        compile; a step of fewer rows then takes as long as one of so many.
      prefill_tokens: tokens, padding included, that are prefilled between two looks; by default the largest bucket.
        What decodes meanwhile gets its tokens in between.
      prefill_batch_size: rows of a prefill program, padding to a power of two included; by default as many as
        `prefill_tokens` and `max_batch_size` let there be. A device that is busy with one chunk gains little by more
        of them at a time, and every size is a program to compile.
      reserved_tokens: new tokens that a request gets pages for when it is admitted beside others, and whenever it needs
        more; if there are none then, the request that came last gives up its own and goes on later.
      implementation: of `lora_attention`; None takes the first that fits.
      tensor_parallel: the devices that every weight and the base cache's kv heads are cut for. It must divide the
        model's kv heads, MLP width and vocabulary. In several processes, as many devices of each.
      distributed: whether this process is one of several that run one engine, one per host as a rule, all of which
        make the same calls. Then `coordinator_address` (host:port of the first), `num_processes` and `process_id` are
        those of `jax.distributed.initialize`, which finds them out by itself on Cloud TPU, Slurm, Kubernetes and MPI.
    """

    sharing: SharingMode = "base_lr"
    num_pages: int = 1024
    page_size: int | None = None
    num_low_rank_pages: int | None = None
    recompute_layers: Sequence[int] | None = None
    num_recomputed_pages: int | None = None
    max_adapters: int = 0
    max_rank: int = 0
    prefill_buckets: Sequence[int] | None = None
    prefix_cache: bool = True
    decode_block: int = 16
    max_batch_size: int = 64
    min_batch_size: int = 1
    prefill_tokens: int = 0
    prefill_batch_size: int | None = None
    reserved_tokens: int = 256
    implementation: str | None = None
    tensor_parallel: int = 1
    distributed: bool = False
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    @classmethod
    def from_keywords(cls, keywords: dict[str, Any]) -> "EngineOptions":
        """`EngineOptions(**keywords)`, with an `InputError` for keywords that do not exist."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(keywords) - set(known)):
            raise InputError(f"unknown engine options: {', '.join(unknown)}; there are: {', '.join(known)}")
        return cls(**keywords)

    def __post_init__(self):
        Sharing(self.sharing)
        self._join_processes()  # first of all: JAX's devices are fixed once somebody has asked for them
        on = jax.default_backend()
        defaults = {
            "page_size": 128 if on == "tpu" else 64,
            # Small chunks cost a CPU their FLOP and an accelerator a whole read of the weights.
            "prefill_buckets": (16, 64, 256) if on == "cpu" else (16, 64, 256, 1024, 4096),
        }
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        least = {
            "num_pages": 1, "num_low_rank_pages": 1, "num_recomputed_pages": 1, "decode_block": 1, "max_adapters": 0,
            "max_rank": 0, "max_batch_size": 1, "min_batch_size": 1, "prefill_tokens": 0, "prefill_batch_size": 1,
            "reserved_tokens": 1, "tensor_parallel": 1,
        }  # fmt: skip
        for name in least:
            value = getattr(self, name)
            if value is None and name in ("num_low_rank_pages", "num_recomputed_pages", "prefill_batch_size"):
                continue
            if not isinstance(value, int) or value < least[name]:
                raise InputError(f"{name} must be an integer of at least {least[name]}, not {value!r}")
        if self.min_batch_size > self.max_batch_size:
            raise InputError(
                f"min_batch_size {self.min_batch_size} is more than max_batch_size {self.max_batch_size}: lower the "
                "one or raise the other"
            )
        if not isinstance(self.prefix_cache, bool):
            raise InputError(f"prefix_cache must be True or False, not {self.prefix_cache!r}")
        if not isinstance(self.page_size, int) or self.page_size < 8 or self.page_size % 8:
            raise InputError(f"page_size must be a positive multiple of 8 tokens, not {self.page_size!r}")
        buckets = _sorted_integers(self.prefill_buckets)
        if not buckets or buckets[0] < 1:
            raise InputError(f"prefill_buckets must be positive chunk lengths, not {self.prefill_buckets!r}")
        object.__setattr__(self, "prefill_buckets", buckets)
        # The largest chunk has to fit.
        object.__setattr__(self, "prefill_tokens", max(self.prefill_tokens, buckets[-1]))
        if self.recompute_layers is not None:
            layers = _sorted_integers(self.recompute_layers)
            if layers is None or (layers and layers[0] < 0):
                raise InputError(f"recompute_layers must be numbers of layers, not {self.recompute_layers!r}")
            object.__setattr__(self, "recompute_layers", layers)
        known = [implementation.name for implementation in IMPLEMENTATIONS]
        if self.implementation is not None and self.implementation not in known:
            raise InputError(f"unknown attention implementation {self.implementation!r}; there are: {', '.join(known)}")
        if self.tensor_parallel > 1:
            choose_devices(self.tensor_parallel)

    def _join_processes(self) -> None:
        if not isinstance(self.distributed, bool):
            raise InputError(f"distributed must be True or False, not {self.distributed!r}")
        which = {name: getattr(self, name) for name in ("coordinator_address", "num_processes", "process_id")}
        if self.distributed:
            join_processes(**which)
        elif given := [name for name, value in which.items() if value is not None]:
            raise InputError(f"{', '.join(given)} without distributed=True: this engine runs in one process")


def default_dtype() -> str:
    """Of weights and caches: float32 on a CPU, at twice the memory, and bfloat16 elsewhere."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def engine_dtype(name: str | None):
    """The weights' and caches' dtype by name; None takes `default_dtype`."""
    name = default_dtype() if name is None else name
    if name not in DTYPES:
        raise InputError(f"dtype must be bfloat16, float16 or float32, not {name!r}")
    return jnp.dtype(name)


def _sorted_integers(values: Any) -> tuple[int, ...] | None:
    """Each once, in order; None if `values` is anything but integers."""
    try:
        return tuple(sorted({operator.index(value) for value in values}))
    except TypeError:
        return None
