"""Runs recorded trajectories through agents and sharing modes, and says what each mode costs and changes."""

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from lragent_jax.compile_watch import CompileWatch
from lragent_jax.drift import Drift
from lragent_jax.engine import Engine, Progress
from lragent_jax.models.errors import InputError
from lragent_jax.models.problems import listing
from lragent_jax.react import ROLES, ReactTrajectory
from lragent_jax.recording import OUTPUT_KINDS, OutputKind, Recording
from lragent_jax.replay_report import DECODED_TOKENS, KindReport, ModeReport, ReplayReport
from lragent_jax.sampling_params import SamplingParams
from lragent_jax.sharing import SHARING_MODES, Sharing, SharingMode


def replay(
    engine: Engine,
    trajectories: Sequence[ReactTrajectory | Recording],
    modes: Sequence[SharingMode] = SHARING_MODES,
    *,
    reference: SharingMode = "none",
    roles: Mapping[str, str | None] | None = None,
    max_tokens: int | None = None,
    num_pages: int | None = None,
    warmup: bool = False,
    timed: bool = True,
    progress: Progress | None = None,
) -> ReplayReport:
    """Replays `trajectories` under every mode, each recorded output under the agent that has its role.

    Outputs are teacher-forced, so all modes see the same tokens. `reference` is run whether `modes` name it or not.
    `roles` maps plan, action and reflect to agents of other names (None: the base model). `max_tokens` cuts longer
    trajectories behind an output. The engine lends weights, adapters and options; each mode gets caches of its own,
    one mode at a time, of `num_pages` base pages or as many as the longest trajectory needs.

    No time includes a compilation: a trajectory during which something was compiled is run once more, and only the
    second run counts. `warmup` compiles every program beforehand instead, which is cheaper where they are few. Where
    times do not matter, `timed=False` repeats nothing, decodes nothing, and compares a run with the reference while the
    next one is under way.

    Raises `InputError` before anything is run: no tokenizer, an unknown mode or role, a role without an agent, a
    trajectory that is too long. Host memory: the logits of one trajectory's outputs, twice;
    three times if not `timed`.
    """
    modes = _checked_modes(modes, reference)
    recordings = _recordings(engine, trajectories, max_tokens)
    agents = _agents(engine, recordings, roles or {})
    replayer = _Replayer(engine, agents, _pool_sizes(engine, recordings, agents, num_pages), timed, progress)
    if warmup:
        replayer.warmup(modes)
    tallies: dict[SharingMode, _Tally] = {mode: _Tally() for mode in modes}
    replayer.num_calls = len(modes) * sum(recording.num_outputs for recording in recordings)
    with ThreadPoolExecutor(max_workers=1) as thread:
        comparing: Future[None] | None = None
        for i, recording in enumerate(recordings):
            expected: list[np.ndarray] = []
            for mode in modes:
                what = f"{mode}, trajectory {i + 1} of {len(recordings)}"
                run = replayer.run(mode, recording, what, measure_decoding=timed and i == 0)
                expected = run.logits if mode == reference else expected
                if comparing is not None:
                    comparing.result()
                comparing = thread.submit(tallies[mode].add, run, expected, recording)
                if timed:  # nothing runs beside what is timed
                    comparing.result()
        if comparing is not None:
            comparing.result()
    return ReplayReport(
        modes={mode: tally.report() for mode, tally in tallies.items()},
        reference=reference,
        num_trajectories=len(recordings),
        num_outputs=sum(recording.num_outputs for recording in recordings),
        num_tokens=sum(recording.num_tokens for recording in recordings),
        num_output_tokens=sum(recording.num_output_tokens for recording in recordings),
        notes=tuple(f"trajectory {i}: {r.note}" for i, r in enumerate(recordings) if r.note),
    )


@dataclasses.dataclass
class _Run:
    """One trajectory under one mode."""

    logits: list[np.ndarray]  # of every recorded output
    prefilled_tokens: int = 0
    cached_tokens: int = 0
    cache_bytes: int = 0
    ttft_s: float = 0.0
    tokens_per_s: float | None = None


class _Tally:
    """One mode over all trajectories."""

    def __init__(self):
        self._runs: list[_Run] = []
        self._drifts: dict[OutputKind, Drift] = {kind: Drift() for kind in OUTPUT_KINDS}

    def add(self, run: _Run, expected: list[np.ndarray], recording: Recording) -> None:
        outputs = [part.ids for part in recording.parts if part.role is not None]
        kinds = recording.output_kinds()
        for reference, logits, ids, kind in zip(expected, run.logits, outputs, kinds, strict=True):
            self._drifts[kind].add(reference, logits, ids)
        self._runs.append(dataclasses.replace(run, logits=[]))

    def report(self) -> ModeReport:
        drift = Drift.total(self._drifts.values())
        tokens_per_s = next((run.tokens_per_s for run in self._runs if run.tokens_per_s is not None), None)
        return ModeReport(
            prefilled_tokens=sum(run.prefilled_tokens for run in self._runs),
            cached_tokens=sum(run.cached_tokens for run in self._runs),
            cache_bytes=max(run.cache_bytes for run in self._runs),
            ttft_s=sum(run.ttft_s for run in self._runs),
            tokens_per_s=tokens_per_s,
            top1_agreement=drift.top1_agreement,
            kl=drift.kl,
            nll=drift.nll,
            by_kind={
                kind: KindReport(of.num_positions, of.top1_agreement, of.kl, of.nll)
                for kind, of in self._drifts.items()
                if of.num_positions
            },
        )


class _Replayer:
    """Gives each mode an engine of its own, for as long as it runs; what one run leaves, no other finds."""

    def __init__(
        self,
        engine: Engine,
        agents: dict[str, str | None],
        pool_sizes: dict[str, int],
        timed: bool,
        progress: Progress | None,
    ):
        self._engine, self._agents, self._pool_sizes, self._timed = engine, agents, pool_sizes, timed
        self._progress = progress or (lambda done, total, what: None)
        self._num_done = 0
        self._num_shown = 0  # never goes back, though a run that compiled is repeated
        self.num_calls = 0

    def warmup(self, modes: Sequence[SharingMode]) -> None:
        """Compiles for all modes. Merged and split ones share no program: a thread each saves a fifth on two cores."""
        steps: dict[bool, tuple[int, int]] = {}

        def warm(merged: bool) -> None:
            for mode in modes:
                if Sharing(mode).merged == merged:
                    self._make(mode).warmup(progress=lambda done, total, what: show(merged, done, total))

        def show(merged: bool, done: int, total: int) -> None:
            steps[merged] = done, total
            done, total = map(sum, zip(*steps.values(), strict=True))
            self._progress(done, total, "compiling")

        with ThreadPoolExecutor(max_workers=2) as threads:
            list(threads.map(warm, (True, False)))

    def run(self, mode: SharingMode, recording: Recording, what: str, measure_decoding: bool) -> _Run:
        engine, num_done = self._make(mode), self._num_done
        with CompileWatch() as watch:
            run = self._run(engine, recording, what, measure_decoding)
        if watch.num_programs and self._timed:
            self._num_done = num_done
            run = self._run(engine, recording, f"{what}, compiled", measure_decoding)
        return run

    def _make(self, mode: SharingMode) -> Engine:
        return self._engine.with_sharing(mode, **self._pool_sizes, prefix_cache=False)

    def _run(self, engine: Engine, recording: Recording, what: str, measure_decoding: bool) -> _Run:
        run = _Run(logits=[])
        with engine.trajectory() as trajectory:
            for part in recording.parts:
                if part.role is None:
                    trajectory.append(part.ids)
                    continue
                self._show(what)
                out = engine.score_output(trajectory, part.ids, agent=self._agents[part.role])
                run.logits.append(out.logits)
                run.prefilled_tokens += out.num_prefilled_tokens
                run.cached_tokens += out.num_cached_tokens
                run.ttft_s += out.ttft_s
                self._num_done += 1
            run.cache_bytes = engine.cache_stats().bytes_used
            if measure_decoding:
                last = recording.parts[-1].role
                assert last is not None
                params = SamplingParams(max_new_tokens=DECODED_TOKENS, ignore_eos=True)
                generated = engine.generate(trajectory, self._agents[last], params)
                run.tokens_per_s = (DECODED_TOKENS - 1) / (generated.latency_s - generated.ttft_s)
        self._show(what)
        return run

    def _show(self, what: str) -> None:
        self._num_shown = max(self._num_shown, self._num_done)
        self._progress(self._num_shown, self.num_calls, what)


def _checked_modes(modes: Sequence[SharingMode], reference: SharingMode) -> list[SharingMode]:
    """The reference first, nothing twice."""
    return list(dict.fromkeys(Sharing(mode).mode for mode in (reference, *modes)))


def _recordings(
    engine: Engine, trajectories: Sequence[ReactTrajectory | Recording], max_tokens: int | None
) -> list[Recording]:
    """The trajectories as token ids, or one `InputError` about all that cannot be replayed."""
    if engine.tokenizer is None:
        raise InputError("replay needs a tokenizer, and this model came without one; put its tokenizer.json beside it")
    if not trajectories:
        raise InputError("there is nothing to replay: no trajectory was given")
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, not {max_tokens}")
    tokenizer = engine.tokenizer
    recordings = [
        trajectory if isinstance(trajectory, Recording) else Recording.tokenize(trajectory, tokenizer)
        for trajectory in trajectories
    ]
    room = engine.config.context_length - DECODED_TOKENS
    problems = []
    for i, recording in enumerate(recordings):
        if not recording.num_outputs:
            problems.append(f"trajectory {i} holds no recorded output")
            continue
        if max_tokens is not None:
            recordings[i] = recording = recording.cut(max_tokens)
        if not recording.num_outputs:
            problems.append(f"trajectory {i}: {recording.note}; raise max_tokens")
        elif recording.num_tokens > room:
            problems.append(
                f"trajectory {i} has {recording.num_tokens} tokens, {DECODED_TOKENS} more are decoded at its end, and "
                f"the model's context is {engine.config.context_length}: pass max_tokens of {room} or less"
            )
    if problems:
        raise InputError(listing("these trajectories cannot be replayed:", problems))
    return recordings


def _agents(engine: Engine, recordings: Sequence[Recording], roles: Mapping[str, str | None]) -> dict[str, str | None]:
    """The agent of every role that occurs."""
    known = ", ".join(map(repr, engine.agents)) or "none is loaded"
    needed = {part.role for recording in recordings for part in recording.parts if part.role is not None}
    problems = [f"unknown role {role!r}; there are: {', '.join(ROLES)}" for role in roles if role not in ROLES]
    agents: dict[str, str | None] = {}
    for role in ROLES:
        agent = roles.get(role, role)
        if (role in needed or role in roles) and agent is not None and agent not in engine.agents:
            problems.append(f"role {role} needs an agent {agent!r}; there are: {known}")
        elif role in needed:
            agents[role] = agent
    if problems:
        raise InputError(
            listing(
                "load an adapter for every role, or map the role to an agent there is (None: the base model):", problems
            )
        )
    return agents


def _pool_sizes(
    engine: Engine, recordings: Sequence[Recording], agents: dict[str, str | None], num_pages: int | None
) -> dict[str, int]:
    """Pools of one size for all modes, so that modes share compiled programs.

    By default every agent could have the longest trajectory to itself, which no mode exceeds; rounded up, so that
    programs in the persistent cache fit other trajectories too.
    """
    num_agents = len(set(agents.values()))
    if num_pages is None:
        longest = max(recording.num_tokens for recording in recordings) + DECODED_TOKENS
        num_pages = _round_up(-(-longest // engine.cache_stats().page_size) * num_agents)
    num_low_rank_pages = num_pages * max(len(engine.agents), 1)
    return {"num_pages": num_pages, "num_recomputed_pages": num_pages, "num_low_rank_pages": num_low_rank_pages}


def _round_up(num_pages: int) -> int:
    return -(-num_pages // 64) * 64
