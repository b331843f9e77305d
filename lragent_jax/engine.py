"""The engine: agents, trajectories and one shared cache behind a few calls."""

import collections
import contextlib
import copy
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import jax
import numpy as np

from lragent_jax.adapter_registry import AdapterRegistry
from lragent_jax.batch import Batch
from lragent_jax.call_arguments import Ids, Prompt, is_batch, one_params, per_row
from lragent_jax.devices import Devices
from lragent_jax.executor import Executor
from lragent_jax.generated_row import GeneratedRow
from lragent_jax.models.adapter import Adapter, random_adapter
from lragent_jax.models.adapter_checkpoint import read_adapter
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import InputError, LRAgentError, TrajectoryClosedError
from lragent_jax.models.folder import read_config, read_model
from lragent_jax.models.llama import random_params
from lragent_jax.options import EngineOptions, weight_dtype
from lragent_jax.outputs import GenerationOutput, ScoreOutput, StreamPiece
from lragent_jax.paged_cache import CacheStats, PagedCache
from lragent_jax.sampling import sampling_arrays
from lragent_jax.sampling_params import SamplingParams
from lragent_jax.sharing import BASE_MODEL, PageKey, Sharing, SharingMode, layers_to_recompute
from lragent_jax.tokenizer import Tokenizer, load_tokenizer
from lragent_jax.trajectory import LiveTrajectories, Trajectory

Progress = Callable[[int, int, str], None]
"""(steps done, steps in all, what is going on), called from long work."""


class Engine:
    """One Llama, its adapters, and the caches that they share.

    Made by `from_pretrained` or `from_preset`. All methods may be called from several threads; device work is done
    by one of them at a time.
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
        )
        self._executor = Executor(
            graphdef,
            self._devices.place(config, params),
            self._registry,
            self._cache,
            self._sharing,
            prefill_buckets=self.options.prefill_buckets or (),
            table_widths=_table_widths(-(-config.context_length // page_size)),
            decode_block=self.options.decode_block,
            implementation=self.options.implementation,
            prefix_cache=self.options.prefix_cache,
        )
        self._trajectories = LiveTrajectories()
        self._cache.holders = self._trajectories
        self._caller: int | None = None  # the thread that is in `_exclusive`
        self._unfinished: collections.deque[Callable[[], None]] = collections.deque()

    # Making one.

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        adapters: Mapping[str, str | Path | Adapter] | None = None,
        *,
        dtype: str = "bfloat16",
        progress: Progress | None = None,
        **options: Any,
    ) -> "Engine":
        """Loads a model and its agents.

        `model`: a Hugging Face folder (safetensors), a GGUF file, or an Orbax checkpoint of ours. `adapters`: agent
        name to a PEFT folder or an Orbax one. `options` are the fields of `EngineOptions`. Raises `CheckpointError`,
        `ConfigError`, `AdapterError` or `InputError`; whatever can be wrong is looked at before the weights are read.
        """
        wanted, checked = weight_dtype(dtype), EngineOptions.from_keywords(options)
        config, tokenizer = read_config(model), load_tokenizer(model)
        layers_to_recompute(checked.recompute_layers, config.num_layers)
        shardings = Devices.of(checked.tensor_parallel).weight_shardings(config, wanted)
        loaded = {
            name: source if isinstance(source, Adapter) else read_adapter(source, config)
            for name, source in (adapters or {}).items()
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
        dtype: str = "bfloat16",
        **options: Any,
    ) -> "Engine":
        """Random weights of a well-known shape (`LlamaConfig.preset`) and random adapters, for benchmarks and trials.

        With `shared_a` the agents form one A-group. There is no tokenizer: such an engine serves token ids.
        """
        wanted, checked = weight_dtype(dtype), EngineOptions.from_keywords(options)
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
        with self._exclusive():
            return self._cache.stats()

    # Adapters.

    def load_adapter(self, name: str, source: str | Path | Adapter) -> None:
        """Adds an agent. Trajectories stay as they are; a new A-group makes the low-rank pool grow, and only that."""
        adapter = source if isinstance(source, Adapter) else read_adapter(source, self.config)
        with self._exclusive():
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
        changes nothing, while one is being extended.
        """
        with self._exclusive(), contextlib.ExitStack() as held:
            for trajectory in self._trajectories:
                with contextlib.suppress(TrajectoryClosedError):  # by another thread, just now
                    held.enter_context(trajectory.extending())
            content = self._registry.find(name).keys.content
            self._registry.remove(name)
            in_use = self._keys_in_use()
            for holder in (*self._trajectories, self._cache.prefixes):
                holder.drop(lambda key: key in in_use)
                if content is not None and self._registry.find_content(content) is None:
                    holder.writer_unloaded(content)

    # Calls.

    def trajectory(self) -> Trajectory:
        """An empty context that every agent can read and extend."""
        return Trajectory(
            self._cache, self._encode, self.config.vocab_size, self.config.context_length, self._trajectories
        )

    @overload
    def generate(
        self, prompt: Prompt, agent: str | None = None, params: SamplingParams | None = None, **sampling: Any
    ) -> GenerationOutput: ...

    @overload
    def generate(
        self,
        prompt: Sequence[Prompt],
        agent: str | Sequence[str | None] | None = None,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **sampling: Any,
    ) -> list[GenerationOutput]: ...

    def generate(self, prompt, agent=None, params=None, **sampling):
        """Generates with one agent, or with several in one static batch.

        `prompt`: a trajectory, which the generated tokens join; text or token ids, for a context of their own that is
        gone afterwards; or a list of those. What anybody has read before from its first token on is not read again, as
        far as the sharing mode allows. `agent`: a name, None for the base model, or a list of them. `params`: a
        `SamplingParams` (or one per row), or its fields as keywords. A list returns a list. Raises `InputError`,
        `AdapterError`, `OutOfPagesError` or `TrajectoryBusyError` before anything is run or changed; whatever else
        goes wrong on the way, no token joins.
        """
        if not is_batch(prompt):
            return self._generate([prompt], [agent], [one_params(params, sampling)])[0]
        count = len(prompt)
        rows = params if isinstance(params, list | tuple) else one_params(params, sampling)
        return self._generate(list(prompt), per_row(agent, count, "agent"), per_row(rows, count, "params"))

    def stream(
        self, prompt: Prompt, agent: str | None = None, params: SamplingParams | None = None, **sampling: Any
    ) -> Iterator[StreamPiece]:
        """`generate` for one prompt, piece by piece; arguments are checked when the first piece is asked for.

        A caller that stops early keeps in the trajectory what it was given.
        """
        one = one_params(params, sampling)
        num_shown = 0
        piece = StreamPiece("", [])
        with self._batch([prompt], [agent], [one]) as batch:
            generated = batch.generated[0]
            for _ in self._steps(batch, max_steps=_STREAM_STEPS):
                piece = StreamPiece(generated.take_text(), generated.token_ids[num_shown:])
                num_shown += len(piece.token_ids)
                if generated.finish_reason:
                    piece = dataclasses.replace(piece, output=batch.outputs()[0])
                elif piece.text or piece.token_ids:
                    yield piece
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
        if len(token_ids) == 0:
            raise InputError("there is nothing to score: token_ids is empty")
        return self._score(trajectory, token_ids, agent)

    def warmup(self, max_batch_size: int = 1, progress: Progress | None = None) -> None:
        """Compiles every program that calls of up to `max_batch_size` rows can need; nothing compiles afterwards."""
        with self._exclusive():
            self._executor.warmup(max_batch_size, progress)

    # Inside.

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._cache.lock, self._devices.scope():
            outer, self._caller = self._caller, threading.get_ident()
            try:
                if outer is None:
                    self._clean_up()
                yield
            finally:
                self._caller = outer

    def _clean_up(self) -> None:
        """What earlier calls left behind."""
        while self._unfinished:
            self._unfinished.popleft()()
        self._trajectories.release_abandoned()
        for trajectory in self._trajectories if self._cache.recover() else ():
            trajectory.pages_lost()  # ids and writers survive: it is rebuilt as it was when it is read next

    def _encode(self, text: str, first: bool) -> list[int]:
        if self.tokenizer is None:
            raise InputError("this model came without a tokenizer: give token ids instead of text")
        return self.tokenizer.encode(text, add_bos=first)

    def _num_low_rank_pages(self) -> int:
        """As the options say, or one for every base page and owner of low-rank pages."""
        loaded = self._registry.keys
        owners = {key for adapter in loaded if (key := self._sharing.low_rank_key(adapter)) is not None}
        return self.options.num_low_rank_pages or self.options.num_pages * len(owners)

    def _num_recomputed_pages(self) -> int:
        """As the options say, or one for every base page and adapter that there is room for."""
        owners = max(len(self._registry.keys), self.options.max_adapters, 1)
        return self.options.num_recomputed_pages or self.options.num_pages * owners

    def _keys_in_use(self) -> set[PageKey]:
        rules, adapters = self._sharing, [BASE_MODEL, *self._registry.keys]
        keys = [key for of in (rules.base_key, rules.recomputed_key, rules.low_rank_key) for key in map(of, adapters)]
        return {key for key in keys if key is not None}

    def _generate(self, prompts: list, agents: list, params: list[SamplingParams]) -> list[GenerationOutput]:
        if not prompts:
            return []
        with self._batch(prompts, agents, params) as batch:
            for _ in self._steps(batch, max_steps=self._executor.decode_block):
                pass
            return batch.outputs()

    @contextlib.contextmanager
    def _batch(self, prompts: list, agents: list, params: list[SamplingParams]) -> Iterator[Batch]:
        """Checks everything, holds the trajectories for one call, and lets the generated tokens join at its end."""
        for agent in agents:
            self._registry.find(agent)
        with contextlib.ExitStack() as stack:
            trajectories = []
            for prompt in prompts:
                if not isinstance(prompt, Trajectory):
                    prompt = stack.enter_context(self.trajectory()).append(prompt)  # gone after the call
                trajectories.append(prompt)
            for trajectory in trajectories:
                self._check_own(trajectory)
                stack.enter_context(trajectory.extending())
            generated = [self._generated_row(*row) for row in zip(trajectories, params, strict=True)]
            batch = Batch(trajectories, agents, generated, params, started=time.perf_counter())
            try:
                yield batch
            except GeneratorExit:
                for row in batch.generated:
                    row.interrupt()
                raise
            except BaseException:
                batch.discard()
                raise
            finally:
                self._finish(batch, stack.pop_all())

    def _finish(self, batch: Batch, held: contextlib.ExitStack) -> None:
        """Lets the tokens join and the trajectories go.

        The collector may close a forgotten stream in the middle of another call of the same thread. Then that call
        goes on undisturbed and the next one finishes the stream.
        """

        def finish() -> None:
            batch.settle()
            if not batch.failed:
                self._executor.share(batch.rows)
            held.close()

        if self._caller == threading.get_ident():
            self._unfinished.append(finish)
            return
        with self._exclusive():
            finish()

    def _check_own(self, trajectory: Trajectory) -> None:
        if not trajectory.is_in(self._cache):
            raise InputError("this trajectory belongs to another engine; append its token_ids to one of this engine's")

    def _generated_row(self, trajectory: Trajectory, params: SamplingParams) -> GeneratedRow:
        room = self._room(trajectory)
        if not room:
            raise InputError(f"the trajectory fills the model's context of {self.config.context_length} tokens")
        if params.stop and self.tokenizer is None:
            raise InputError("stop strings need a tokenizer, which this model came without; use stop_token_ids")
        eos = () if params.ignore_eos else self.config.eos_token_ids
        return GeneratedRow(
            params,
            max_new_tokens=min(params.max_new_tokens, room),
            stop_ids=frozenset((*params.stop_token_ids, *eos)),
            decoder=self.tokenizer.stream_decoder(trajectory.token_ids) if self.tokenizer else None,
        )

    def _room(self, trajectory: Trajectory) -> int:
        if not len(trajectory):
            raise InputError("the trajectory is empty: append text or token ids before an agent reads it")
        return self.config.context_length - len(trajectory)

    def _steps(self, batch: Batch, max_steps: int) -> Iterator[None]:
        """Prefills, then decodes until every row has ended; yields after every look at new tokens."""
        executor = self._executor
        limits = [generated.max_new_tokens for generated in batch.generated]
        with self._exclusive():
            # Found again: another thread may have unloaded an agent since the arguments were checked.
            adapters = [self._registry.find(agent) for agent in batch.agents]
            batch.rows = rows = [executor.open_row(*row) for row in zip(batch.trajectories, adapters, strict=True)]
            sampling = sampling_arrays(batch.params, limits, self.config.eos_token_ids, executor.batch_size(len(rows)))
            # The token sampled last is not run, so it needs no slot.
            executor.reserve(rows, [limit - 1 for limit in limits])
            state = executor.first_token(executor.prefill(rows), sampling)
            table, num_losses = executor.decode_table(rows), self._cache.num_losses
            tokens = np.asarray(state.last_tokens)[:, None]
            executor.share(rows)
        batch.ttft_s = time.perf_counter() - batch.started
        while True:
            batch.push(tokens)
            yield
            if batch.finished:
                return
            with self._exclusive():
                if self._cache.num_losses != num_losses:
                    raise LRAgentError("another call was interrupted and the cache is gone: call again")
                # The host knows more than the device: stop strings.
                state = dataclasses.replace(state, finished=batch.finished_rows(len(tokens)))
                out, state, table = executor.decode(rows, state, sampling, table, max_steps)
                tokens = np.asarray(out)

    def _score(self, trajectory: Trajectory, token_ids: Ids, agent: str | None) -> ScoreOutput:
        executor, started = self._executor, time.perf_counter()
        self._check_own(trajectory)
        with trajectory.extending(), self._exclusive():
            self._room(trajectory)
            ids = trajectory.checked_ids(token_ids)
            row = executor.open_row(trajectory, self._registry.find(agent))
            length = len(trajectory)
            executor.reserve([row], [max(len(ids) - 1, 0)])
            try:
                logits = [np.asarray(executor.prefill([row]))[:1]]
                ttft_s = time.perf_counter() - started
                trajectory.join(ids)
                if len(ids) > 1:
                    for chunk in executor.chunks(row, length + len(ids) - 1):
                        hidden = executor.read_chunk(row, chunk)
                        logits.append(np.asarray(executor.unembed(hidden))[0, : chunk.num_tokens])
            except BaseException:
                trajectory.truncate(length)
                raise
            finally:
                row.release_unused()
            executor.share([row])
        return ScoreOutput(
            logits=np.concatenate(logits),
            num_prefilled_tokens=row.num_prefilled_tokens,
            num_cached_tokens=row.num_cached_tokens,
            ttft_s=ttft_s,
        )


_STREAM_STEPS = 4
"""Tokens between two pieces: enough to hide the host's work, few enough to look alive."""


def _table_widths(widest: int) -> tuple[int, ...]:
    """A few widths up to the whole context, far apart: tables are small, programs are not."""
    return (*(width for width in (512, 4096) if 4 * width <= widest), widest)
