"""What every measurement of a study runs on: one model, and an engine at a time over it."""

import dataclasses
import gc
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from lragent_jax.engine import Engine, Progress
from lragent_jax.episodes import max_tokens, num_pages
from lragent_jax.models.errors import InputError
from lragent_jax.models.folder import find_model, read_model
from lragent_jax.options import default_dtype
from lragent_jax.react import ROLES
from lragent_jax.sharing import SharingMode
from lragent_jax.study.agent_set import AgentSet
from lragent_jax.tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """How fast, not what: none of these decides a result but for rounding. None takes what fits the device.

    `batch_size` episodes run at a time, fewer where they are so long that `pool_gigabytes` do not hold them. They are
    read `prefill_batch_size` at a time, all of them before any is written on: a step of decoding is one for all, in a
    program of `min_batch_size` rows at least (None: of all).
    `compile_ahead`: whether an engine for episodes compiles all of its programs before the first, several at a time.
    """

    dtype: str | None = None
    batch_size: int | None = None
    min_batch_size: int | None = None
    pool_gigabytes: float | None = None
    page_size: int | None = None
    prefill_buckets: Sequence[int] | None = None
    prefill_batch_size: int | None = None
    decode_block: int | None = None
    implementation: str | None = None
    compile_ahead: bool | None = None

    @classmethod
    def fitting(cls, **given: Any) -> "BenchOptions":
        """The options that are given, and for the rest those of this backend."""
        on_cpu = jax.default_backend() == "cpu"
        defaults = {
            "dtype": default_dtype(),
            # On a CPU a program takes as long to compile as thousands of tokens to run, and a token behind a stop
            # string costs what any token does.
            "batch_size": 32 if on_cpu else 64,
            "min_batch_size": 4 if on_cpu else None,  # a step of few rows is a CPU's gain, and takes a GPU as long
            "pool_gigabytes": 6.0 if on_cpu else 40.0,
            "prefill_buckets": (16, 128) if on_cpu else (256, 1024),
            # Most chunks are a label or a line. On a CPU each by itself would read all weights for a dozen tokens.
            "prefill_batch_size": 8 if on_cpu else 4,
            "decode_block": 1 if on_cpu else 12,
            "compile_ahead": not on_cpu,  # it compiles some programs too many, and a CPU has no cores to spare for that
        }
        return cls(**defaults | {name: value for name, value in given.items() if value is not None})

    def of_engine(self) -> dict[str, Any]:
        names = ("page_size", "prefill_buckets", "prefill_batch_size", "decode_block", "implementation")
        return {name: getattr(self, name) for name in names}


class Workbench:
    """Engines of any agents and mode over one model, whose pools all have one size, so that they share programs.

    An engine lives until the next one is asked for: two would not fit the device.
    """

    def __init__(
        self, model: str | Path, options: BenchOptions, longest_episode: int, progress: Progress | None = None
    ):
        tokenizer = load_tokenizer(model)
        if tokenizer is None:
            raise InputError(f"{model} came without a tokenizer, and agents read text")
        self.tokenizer: Tokenizer = tokenizer
        self.model_name = find_model(model)[1].name
        self.config, self.graphdef, self.params = read_model(model, options.dtype, progress=progress)
        self.options = options
        self._bare = Engine(*self.parts, {}, tokenizer=tokenizer, num_pages=1, **options.of_engine())
        self._engine: tuple[tuple, Engine] | None = None
        self._longest_episode = longest_episode
        self._num_pages = self._pool_size(longest_episode)

    @property
    def parts(self):
        """The model as `read_model` returns it."""
        return self.config, self.graphdef, self.params

    def settings(self) -> dict[str, Any]:
        """What results cannot be compared across, as JSON."""
        config = json.dumps(dataclasses.asdict(self.config), default=str, sort_keys=True)
        return {
            "model": self.model_name,
            "model_config": hashlib.sha256(config.encode()).hexdigest()[:16],
            "dtype": self.options.dtype,
        }

    def surroundings(self) -> dict[str, Any]:
        """What results were measured with besides, as JSON."""
        device = jax.devices()[0]
        return {
            "device": f"{device.platform} {device.device_kind}",
            "jax": jax.__version__,
            "batch_size": self.options.batch_size,
            "num_pages": self._num_pages,
            "page_size": self._bare.options.page_size,
            "prefill_buckets": list(self._bare.options.prefill_buckets or ()),
            "prefill_batch_size": self.options.prefill_batch_size,
            "min_batch_size": self.options.min_batch_size,
            "decode_block": self.options.decode_block,
        }

    def batch_size(self, tokens: int) -> int:
        """Episodes of so many tokens that run at a time."""
        size = self.options.batch_size
        assert size is not None
        while size > 1 and self._pages(tokens, size) > self._num_pages:
            size //= 2
        return size

    def engine(
        self, agents: AgentSet, mode: SharingMode, recompute_layers: Sequence[int] | None,
        progress: Progress | None = None,
    ) -> Engine:  # fmt: skip
        """For episodes: a large pool."""
        key = (agents, mode, tuple(recompute_layers or ()))
        if self._engine is None or self._engine[0] != key:
            self.release()
            sizes = dict.fromkeys(("num_pages", "num_low_rank_pages", "num_recomputed_pages"), self._num_pages)
            engine = self._make(agents, sharing=mode, recompute_layers=recompute_layers, **sizes, **self._of_batches())
            self._engine = key, engine
            if self.options.compile_ahead:
                assert self.options.batch_size is not None
                engine.warmup(self.options.batch_size, progress, scoring=False)
        return self._engine[1]

    def small_engine(self, agents: AgentSet, recompute_layers: Sequence[int] | None) -> Engine:
        """For `replay`, which makes pools of its own."""
        self.release()
        return self._make(agents, sharing="full", recompute_layers=recompute_layers, num_pages=1)

    def release(self) -> None:
        """Frees the device of the last engine's caches."""
        self._engine = None
        gc.collect()

    def _make(self, agents: AgentSet, **options: Any) -> Engine:
        # Episodes alike whatever ran before them: none meets pages of another.
        return Engine(
            *self.parts, dict(agents.adapters), tokenizer=self.tokenizer, prefix_cache=False,
            **self.options.of_engine(), **options,
        )  # fmt: skip

    def _of_batches(self) -> dict[str, int]:
        """Of an engine for episodes: a whole batch is read, whatever its length, before its first step."""
        rows, buckets = self.options.batch_size, self._bare.options.prefill_buckets
        assert rows is not None
        assert buckets is not None
        padded = 2 * (max_tokens(self._bare, self._longest_episode) + buckets[-1])  # at most, of chunks and of rows
        least = min(self.options.min_batch_size or rows, rows)
        return {"max_batch_size": rows, "min_batch_size": least, "prefill_tokens": rows * padded}

    def _pages(self, tokens: int, batch_size: int) -> int:
        """Base pages of a batch when every agent writes its own."""
        return len(ROLES) * num_pages(self._bare, tokens, batch_size)

    def _pool_size(self, longest_episode: int) -> int:
        batch_size, gigabytes = self.options.batch_size, self.options.pool_gigabytes
        assert batch_size is not None
        assert gigabytes is not None
        page_bytes = self._bare.cache_stats().base.bytes_per_page
        fitting = max(int(gigabytes * 1e9) // page_bytes, self._pages(longest_episode, 1))
        return min(self._pages(longest_episode, batch_size), fitting)
