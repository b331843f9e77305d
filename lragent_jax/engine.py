"""The engine: agents, trajectories and one shared cache behind a few calls."""

import contextlib
import copy
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import jax
import numpy as np

from lragent_jax import scoring
from lragent_jax.adapter_registry import AdapterRegistry
from lragent_jax.batching import Batcher
from lragent_jax.call_arguments import (
    Ids,
    Prompt,
    check_positive,
    check_sources,
    is_batch,
    one_params,
    params_per_row,
    per_row,
)
from lragent_jax.calls import LOOK_STEPS, Call, Caller
from lragent_jax.devices import Devices
from lragent_jax.executor import Executor
from lragent_jax.metrics import EngineMetrics
from lragent_jax.models.adapter import Adapter, random_adapter
from lragent_jax.models.adapter_checkpoint import read_adapter
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import AdapterError, InputError, OutOfPagesError
from lragent_jax.models.folder import read_config, read_model
from lragent_jax.models.llama import random_params
from lragent_jax.options import EngineOptions, engine_dtype
from lragent_jax.outputs import GenerationOutput, ScoreOutput, StreamPiece
from lragent_jax.paged_cache import CacheStats, PagedCache
from lragent_jax.sampling_params import SamplingParams
from lragent_jax.scheduler import Limits, batch_size
from lragent_jax.sharing import BASE_MODEL, PageKey, Sharing, SharingMode, layers_to_recompute
from lragent_jax.tokenizer import Tokenizer, load_tokenizer
from lragent_jax.trajectory import LiveTrajectories, Trajectory
from lragent_jax.warmup import Warmup, WarmupTimes

Progress = Callable[[int, int, str], None]
"""(steps done, steps in all, what is going on), called from long work."""


class Engine:
    """One Llama, its adapters, and the caches that they share.

    Made by `from_pretrained` or `from_preset`. All methods may be called from several threads: what they generate at a
    time is generated in one batch, by whichever of them drives. `AsyncEngine` does the same for servers.
    """

    def __init__(
        self,
        config: LlamaConfig,
        graphdef,
        params,
        adapters: Mapping[str, Adapter],
        *,
        tokenizer: Tokenizer | None = None,
        **options: Any,
    ):
        """`options` are the fields of `EngineOptions`."""
        self.config, self.tokenizer, self.options = config, tokenizer, EngineOptions.from_keywords(options)
        self._sharing = Sharing(self.options.sharing)
        chosen = layers_to_recompute(self.options.recompute_layers, config.num_layers)
        dtype = jax.tree.leaves(params)[0].dtype
        self._devices = Devices.of(self.options.tensor_parallel)
        home = self._devices.home(params)
        self._registry = AdapterRegistry(
            config, dtype, adapters, max_adapters=self.options.max_adapters, max_rank=self.options.max_rank,
            mesh=self._devices.mesh,
        )  # fmt: skip
        page_size = self.options.page_size
        assert page_size is not None
        self._cache = PagedCache(
            config,
            dtype,
            page_size=page_size,
            num_pages=self.options.num_pages,
            num_low_rank_pages=self._num_low_rank_pages(),
            low_rank_ranks={} if self._sharing.merged else self._registry.low_rank_ranks,
            recomputed_layers=chosen if self._sharing.recomputes else (),
            num_recomputed_pages=self._num_recomputed_pages(),
            mesh=self._devices.mesh,
            home=home,
        )
        prefill_batch_size = self.options.prefill_batch_size or batch_size(self.options.max_batch_size)
        self._executor = Executor(
            graphdef,
            self._devices.place(config, params),
            self._registry,
            self._cache,
            self._sharing,
            prefill_buckets=self.options.prefill_buckets or (),
            table_widths=_table_widths(-(-config.context_length // page_size)),
            decode_block=self.options.decode_block,
            max_batch_size=self.options.max_batch_size,
            min_batch_size=self.options.min_batch_size,
            token_budget=self.options.prefill_tokens,
            prefill_batch_size=prefill_batch_size,
            implementation=self.options.implementation,
            prefix_cache=self.options.prefix_cache,
            home=home,
        )
        self._trajectories = LiveTrajectories()
        self._cache.holders = self._trajectories
        self._cache.release_abandoned = self._trajectories.release_abandoned
        limits = Limits(
            batch_size=self.options.max_batch_size,
            token_budget=self.options.prefill_tokens,
            prefill_batch_size=prefill_batch_size,
            decode_block=self.options.decode_block,
            mixed_block=min(LOOK_STEPS, self.options.decode_block),
        )
        self.batcher = Batcher(
            self._executor, self._registry, self._trajectories, limits,
            reserved_tokens=self.options.reserved_tokens, eos_token_ids=config.eos_token_ids,
            scope=self._devices.scope,
        )  # fmt: skip
        # Nothing in here refers back to the engine: caches go when the last reference to it goes.
        self._new_trajectory = functools.partial(
            Trajectory, self._cache, functools.partial(_encode, tokenizer), config.vocab_size, config.context_length,
            self._trajectories,
        )  # fmt: skip
        self.caller = Caller(config, tokenizer, self._executor, self._registry, self.batcher, self._new_trajectory)

    # Making one.

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        adapters: Mapping[str, str | Path | Adapter] | None = None,
        *,
        dtype: str | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> "Engine":
        """Loads a model and its agents.

        `model`: a Hugging Face folder (safetensors), a GGUF file, or an Orbax checkpoint of ours. `adapters`: agent
        name to a PEFT folder or an Orbax one. `dtype`: of weights and caches; by default float32 on a CPU, bfloat16
        elsewhere. `options` are the fields of `EngineOptions`. Raises `CheckpointError`, `ConfigError`, `AdapterError`
        or `InputError`; whatever can be wrong is looked at before the weights are read.
        """
        if not isinstance(model, str | os.PathLike):
            raise InputError(f"model is the path of a folder or file, not {model!r}")
        sources = check_sources(adapters)
        checked = EngineOptions.from_keywords(options)
        wanted = engine_dtype(dtype)
        config, tokenizer = read_config(model), load_tokenizer(model)
        layers_to_recompute(checked.recompute_layers, config.num_layers)
        shardings = Devices.of(checked.tensor_parallel).weight_shardings(config, wanted)
        loaded = {
            name: source if isinstance(source, Adapter) else read_adapter(source, config)
            for name, source in sources.items()
        }
        for adapter in loaded.values():
            adapter.check_fits(config)
        config, graphdef, params = read_model(model, wanted, shardings, progress)
        return cls(config, graphdef, params, loaded, tokenizer=tokenizer, **options)

    @classmethod
    def from_preset(
        cls,
        preset: str,
        *,
        agents: Sequence[str] = ("plan", "action", "reflect"),
        rank: int = 8,
        targets: Sequence[str] = ("q", "v"),
        shared_a: bool = True,
        seed: int = 0,
        dtype: str | None = None,
        **options: Any,
    ) -> "Engine":
        """Random weights of a well-known shape (`LlamaConfig.preset`) and random adapters, for benchmarks and trials.

        With `shared_a` the agents form one A-group. There is no tokenizer: such an engine serves token ids.
        """
        if isinstance(agents, str) or len(set(agents)) != len(agents):
            raise InputError(f"agents is a list of names, each once, not {agents!r}")
        checked = EngineOptions.from_keywords(options)
        wanted = engine_dtype(dtype)
        config = LlamaConfig.preset(preset)
        layers_to_recompute(checked.recompute_layers, config.num_layers)
        shardings = Devices.of(checked.tensor_parallel).weight_shardings(config, wanted)
        adapters = {
            agent: random_adapter(
                config, rank=rank, targets=targets, seed=seed + i, shared_a_seed=seed if shared_a else None
            )
            for i, agent in enumerate(agents)
        }
        graphdef, params = random_params(config, wanted, seed, shardings)
        return cls(config, graphdef, params, adapters, **options)

    def with_sharing(self, sharing: SharingMode, **options: Any) -> "Engine":
        """Another engine over the same weights and adapters, with caches of its own; for comparing modes.

        It has this one's options but for those given; its low-rank and recomputed pools are sized anew.
        """
        sized_anew = {"num_low_rank_pages": None, "num_recomputed_pages": None}
        options = vars(self.options) | sized_anew | options | {"sharing": sharing}
        adapters = {name: self._registry.adapter(name) for name in self._registry.names}
        graphdef, params = self._executor.graphdef, self._executor.params
        with self._devices.scope():  # an engine over one device takes the mesh that is current, if there is one
            return Engine(self.config, graphdef, params, adapters, tokenizer=self.tokenizer, **options)

    # What it is.

    @property
    def sharing(self) -> SharingMode:
        return self._sharing.mode

    @property
    def agents(self) -> list[str]:
        """Names of the loaded adapters."""
        return self._registry.names

    @property
    def dtype(self):
        return self._cache.dtype

    @property
    def recomputed_layers(self) -> tuple[int, ...]:
        """The layers whose K and V every agent keeps for itself; empty in every mode but `droidspeak`."""
        return self._cache.recomputed_layers

    def cache_stats(self) -> CacheStats:
        """Pages and bytes of all pools: in use, free, and kept by the prefix cache.

        Kept pages belong to nobody and are there to be had, as free ones are; they do not count as used. When all
        trajectories are closed, nothing is.
        """
        with self.batcher.exclusive():
            return self._cache.stats()

    def metrics(self) -> EngineMetrics:
        """Times, hit rates, queues and pages; see `EngineMetrics`."""
        with self.batcher.exclusive():
            return self.batcher.snapshot()

    # Adapters.

    def load_adapter(self, name: str, source: str | Path | Adapter) -> None:
        """Adds an agent. Trajectories stay as they are; a new A-group makes the low-rank pool grow, and only that."""
        check_sources({name: source})
        adapter = source if isinstance(source, Adapter) else read_adapter(source, self.config)
        with self.batcher.exclusive():
            before = copy.copy(self._registry)
            self._registry.add(name, adapter)
            if not self._sharing.merged:
                try:
                    self._cache.grow_low_rank(self._num_low_rank_pages(), self._registry.low_rank_ranks)
                except BaseException:
                    vars(self._registry).update(vars(before))
                    raise

    def unload_adapter(self, name: str) -> None:
        """Removes an agent, and every page that no remaining agent can read.

        What it wrote for others stays in open trajectories (nobody could rebuild it). Raises `TrajectoryBusyError`, and
        changes nothing, while a request under that name is not done; the requests of others go on.
        """
        if name is None:
            raise AdapterError("None is the base model, which stays; name the agent to unload")
        with self.batcher.exclusive():
            content = self._registry.find(name).keys.content
            self.batcher.pause(without=name)  # rows of the bank are numbered anew
            self._registry.remove(name)
            in_use = self._keys_in_use()
            for holder in (*self._trajectories, self._cache.prefixes):
                holder.drop(lambda key: key in in_use)
                if content is not None and self._registry.find_content(content) is None:
                    holder.writer_unloaded(content)

    # Calls.

    def trajectory(self) -> Trajectory:
        """An empty context that every agent can read and extend."""
        return self._new_trajectory()

    @overload
    def generate(
        self,
        prompt: Prompt,
        agent: str | None = None,
        params: SamplingParams | None = None,
        *,
        progress: Progress | None = None,
        **sampling: Any,
    ) -> GenerationOutput: ...

    @overload
    def generate(
        self,
        prompt: Sequence[Prompt],
        agent: str | Sequence[str | None] | None = None,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Progress | None = None,
        **sampling: Any,
    ) -> list[GenerationOutput]: ...

    def generate(self, prompt, agent=None, params=None, *, progress=None, **sampling):
        """Generates with one agent, or with several at a time, in a batch with whatever other threads generate.

        `prompt`: a trajectory, which the generated tokens join; text or token ids, for a context of their own that is
        gone afterwards; or a list of those. What anybody has read before from its first token on is not read again, as
        far as the sharing mode allows. `agent`: a name, None for the base model, or a list of them. `params`: a
        `SamplingParams` (or one per row), or its fields as keywords. A list returns a list, however long: what has no
        room beside the rest waits for its turn. `progress` is told how many prompts are done.

        Raises `InputError`, `AdapterError`, `OutOfPagesError` (a prompt would not fit alone) or `TrajectoryBusyError`
        before anything is run or changed; whatever else goes wrong on the way, no token joins.
        """
        if not is_batch(prompt):
            return self._generate([prompt], [agent], [one_params(params, sampling)], progress)[0]
        count = len(prompt)
        agents, rows = per_row(agent, count, "agent"), params_per_row(params, sampling, count)
        return self._generate(list(prompt), agents, rows, progress)

    def stream(
        self, prompt: Prompt, agent: str | None = None, params: SamplingParams | None = None, **sampling: Any
    ) -> Iterator[StreamPiece]:
        """`generate` for one prompt, piece by piece: work begins when the first piece is asked for.

        The agent and the parameters are checked at once, the prompt only then. A caller that stops early keeps in the
        trajectory what it was given.
        """
        chosen = one_params(params, sampling)
        self._registry.find(agent)
        return self._stream(prompt, agent, chosen)

    def _stream(self, prompt: Prompt, agent: str | None, params: SamplingParams) -> Iterator[StreamPiece]:
        with self._call([prompt], [agent], [params], streams=True) as call:
            request = call.requests[0]
            pieces = request.pieces
            assert pieces is not None
            piece = StreamPiece("", [])
            while piece.output is None:
                if piece.text or piece.token_ids:
                    yield piece
                self.batcher.drive(lambda: bool(pieces) or request.error is not None)
                call.check()
                piece = pieces.popleft()
        yield piece  # the tokens have joined: whoever reads the last piece may go on with the trajectory

    def next_token_logits(self, trajectory: Trajectory, agent: str | None = None) -> np.ndarray:
        """What would come next, f32 [V]. Prefills what this agent lacks; no token joins."""
        return self._score(trajectory, [], agent).logits[0]

    def score(self, trajectory: Trajectory, token_ids: Ids, agent: str | None = None) -> np.ndarray:
        """Runs a recorded output as if the agent had generated it; the tokens join the trajectory.

        Returns f32 [T, V]: row i are the logits from which token i would have been sampled.
        """
        return self.score_output(trajectory, token_ids, agent).logits

    def score_output(self, trajectory: Trajectory, token_ids: Ids, agent: str | None = None) -> ScoreOutput:
        """`score`, with the counts and the time to the first row of logits."""
        self.caller.check_own(trajectory)
        ids = trajectory.checked_ids(token_ids)
        if not ids:
            raise InputError("there is nothing to score: token_ids is empty")
        return self._score(trajectory, ids, agent)

    def warmup(
        self,
        max_batch_size: int = 1,
        progress: Progress | None = None,
        *,
        batch_sizes: Sequence[int] | None = None,
        max_tokens: int | None = None,
        scoring: bool = True,
    ) -> WarmupTimes:
        """Compiles every program that calls of up to `max_batch_size` rows can need; nothing compiles afterwards.

        For less of them, where it is known what calls there will be: `batch_sizes` (those alone, each rounded up to a
        power of two), `max_tokens` of a context, and without `scoring` none of `score`, `score_output` and
        `next_token_logits`.
        """
        check_positive(max_batch_size, "max_batch_size")
        if max_tokens is not None:
            check_positive(max_tokens, "max_tokens")
        if batch_sizes is None:
            sizes = [1 << i for i in range(batch_size(max_batch_size).bit_length())]
        elif isinstance(batch_sizes, Iterable) and not isinstance(batch_sizes, str):
            sizes = [check_positive(size, "a size in batch_sizes") for size in batch_sizes]
        else:
            raise InputError(f"batch_sizes is a list of numbers of rows, not {batch_sizes!r}")
        with self.batcher.exclusive(), self._executor.said_of_implementation():
            return Warmup(self._executor, sizes, max_tokens, scoring)(progress)

    # Inside.

    def _num_low_rank_pages(self) -> int:
        """As the options say, or one for every base page and owner of low-rank pages."""
        loaded = self._registry.keys
        owners = {key for adapter in loaded if (key := self._sharing.low_rank_key(adapter)) is not None}
        return self.options.num_low_rank_pages or self.options.num_pages * len(owners)

    def _num_recomputed_pages(self) -> int:
        """As the options say, or one for every base page and whoever reads it: adapters, as many as there is room for,
        and the model without one. What several have written may have to be rebuilt under all of them at once."""
        owners = max(len(self._registry.keys), self.options.max_adapters) + 1
        return self.options.num_recomputed_pages or self.options.num_pages * owners

    def _keys_in_use(self) -> set[PageKey]:
        rules, adapters = self._sharing, [BASE_MODEL, *self._registry.keys]
        keys = [key for of in (rules.base_key, rules.recomputed_key, rules.low_rank_key) for key in map(of, adapters)]
        return {key for key in keys if key is not None}

    def _generate(
        self, prompts: list, agents: list, params: list[SamplingParams], progress: Progress | None
    ) -> list[GenerationOutput]:
        with self._call(prompts, agents, params) as call:
            while not call.is_over:
                if progress:
                    progress(call.num_done, len(prompts), "generating")
                num_done = call.num_done if progress else len(prompts)
                self.batcher.drive(functools.partial(call.is_beyond, num_done))
            if progress:
                progress(call.num_done, len(prompts), "generating")
            call.check()
        return [request.output() for request in call.requests]

    @contextlib.contextmanager
    def _call(
        self, prompts: Sequence[Prompt], agents: Sequence, params: Sequence[SamplingParams], *, streams: bool = False
    ) -> Iterator[Call]:
        call = self.caller.open(prompts, agents, params, streams=streams)
        try:
            yield call
        except BaseException as error:  # a stream that is left included, be it by Ctrl-C
            was_left = streams and isinstance(error, GeneratorExit | KeyboardInterrupt)
            self.batcher.finish(functools.partial(call.abandon, keep_taken=was_left))
            raise
        call.end()

    def _score(self, trajectory: Trajectory, token_ids: Ids, agent: str | None) -> ScoreOutput:
        started = time.perf_counter()
        self.caller.check_own(trajectory)
        with trajectory.extending(), self.batcher.exclusive():
            self.caller.room(trajectory)
            ids, adapter = trajectory.checked_ids(token_ids), self._registry.find(agent)
            while True:
                try:
                    return scoring.score(self._executor, trajectory, ids, adapter, started)
                except OutOfPagesError:  # before anything was run
                    self._cache.check_fits(len(trajectory) + len(ids), self._executor.pools_read(adapter))
                    if not self.batcher.make_room():
                        raise


def _encode(tokenizer: Tokenizer | None, text: str, first: bool) -> list[int]:
    if tokenizer is None:
        raise InputError("this model came without a tokenizer: give token ids instead of text")
    return tokenizer.encode(text, add_bos=first)


def _table_widths(widest: int) -> tuple[int, ...]:
    """A few widths up to the whole context, far apart: tables are small, programs are not."""
    return (*(width for width in (512, 4096) if 4 * width <= widest), widest)
