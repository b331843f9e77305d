"""Runs a study: cell by cell, the most important first, each on disk as soon as it is finished."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lragent_jax.compile_watch import CompileWatch
from lragent_jax.engine import Progress
from lragent_jax.react import ReactTrajectory
from lragent_jax.recording import Recording
from lragent_jax.replay_report import DECODED_TOKENS
from lragent_jax.sensitivity import layer_drift, most_drifting
from lragent_jax.sharing import SHARING_MODES, SharingMode
from lragent_jax.study import recorded
from lragent_jax.study.agent_set import AgentSet, with_stacked
from lragent_jax.study.deadline import Deadline, expected_seconds
from lragent_jax.study.episode_run import run_cell
from lragent_jax.study.oracle_recordings import oracle_recordings
from lragent_jax.study.plan import STUDY_PARTS, EpisodeCell, Scale, StudyPart, episode_cells, modes_of
from lragent_jax.study.results import Results
from lragent_jax.study.similarity import value_similarity
from lragent_jax.study.teacher_forcing import run_block
from lragent_jax.study.workbench import Workbench


@dataclasses.dataclass(frozen=True)
class RecordedStudy:
    """Agents trained on recorded text, and all of that text."""

    agents: AgentSet
    trajectories: Sequence[ReactTrajectory]


class Study:
    """All there is to measure with one model.

    Raises `InputError` where `results` hold other agents, another model or other settings.
    """

    def __init__(
        self,
        bench: Workbench,
        sets: Sequence[AgentSet],
        results: Results,
        scale: Scale,
        *,
        modes: Sequence[SharingMode] = SHARING_MODES,
        seed: int = 0,
        recorded: RecordedStudy | None = None,
        deadline: Deadline | None = None,
        progress: Progress | None = None,
    ):
        self._bench, self._sets, self._results, self._scale = bench, with_stacked(sets), results, scale
        self._modes, self._seed, self._recorded = list(modes), seed, recorded
        self._deadline, self._progress = deadline or Deadline(None), progress or (lambda done, total, what: None)
        self._compiled: set[tuple[str, SharingMode]] = set()
        results.use_settings(bench.settings() | {"scale": scale.name, "seed": seed})
        for agents in [*self._sets, *([recorded.agents] if recorded else [])]:
            results.use_agents(agents.name, agents.identity())
        surroundings = results.data.setdefault("runs", [])
        if bench.surroundings() not in surroundings:
            surroundings.append(bench.surroundings())

    def run(self, parts: Sequence[StudyPart] = STUDY_PARTS) -> bool:
        """Measures what is not in the results yet; False where the deadline came first."""
        run = {
            "episodes": self._episodes,
            "kl": self._kl,
            "similarity": self._similarity,
            "recorded": self._recorded_text,
        }
        finished = [run[part]() for part in parts]  # what is short may still fit where a longer part did not
        self._bench.release()
        return all(finished)

    # The parts.

    def _episodes(self) -> bool:
        cells = list(episode_cells(self._sets, self._modes, self._scale, self._seed))
        missing = [cell for cell in cells if not self._results.has("episodes", cell.key)]
        done, total = 0, sum(cell.num_questions for cell in missing)
        for cell in missing:
            like = {"mode": cell.mode, "tokens": cell.tokens, "number": cell.num_questions}
            if not self._allows("episodes", [like]):
                return False
            self._results.add("episodes", {cell.key: self._episode_cell(cell, self._labelled(cell.key, done, total))})
            done += cell.num_questions
        return True

    def _episode_cell(self, cell: EpisodeCell, progress: Progress) -> dict[str, Any]:
        """A cell's result. No engine outlives this call but the workbench's: beside it, the next would not fit."""
        layers = self._layers(cell.agents, cell.mode)
        with self._timed("episodes", [cell.mode]) as spent:
            engine = self._bench.engine(cell.agents, cell.mode, layers, self._labelled("compiling", 0, 0))
            result = run_cell(cell, engine, self._bench.batch_size(cell.tokens), progress)
        return result | spent

    def _kl(self) -> bool:
        for sample in self._scale.kl:
            for agents in self._sets:
                key = f"{agents.name} {{mode}} {sample.tokens} tokens {sample.number} trajectories {self._seed}"
                facts = {"kind": agents.name, "tokens": sample.tokens}

                def make(number=sample.number, tokens=sample.tokens) -> list[Recording]:
                    return oracle_recordings(self._bench.tokenizer, "evaluation", number, self._seed, tokens)

                if not self._teacher_forced("kl", agents, make, sample.number, key, facts):
                    return False
        return True

    def _recorded_text(self) -> bool:
        if self._recorded is None:
            return True
        agents = self._recorded.agents
        room = self._bench.config.context_length - DECODED_TOKENS
        _, held_out = recorded.split(self._recorded.trajectories)
        found = recorded.recordings(held_out, self._bench.tokenizer, room)
        key = f"{agents.name} {{mode}} {len(found)} trajectories"
        facts = {"kind": agents.name, "tokens": max(recording.num_tokens for recording in found)}
        return self._teacher_forced("recorded", agents, lambda: found, len(found), key, facts)

    def _teacher_forced(self, part: str, agents: AgentSet, make, number: int, key: str, facts: dict[str, Any]) -> bool:
        """Blocks of trajectories, each under all modes that are missing for it. `key` has a place for the mode."""
        recordings = None
        for start in range(0, number, self._scale.block):
            size = min(self._scale.block, number - start)

            def name(mode: SharingMode, span: str = f"{start}:{start + size}") -> str:
                return f"{key.format(mode=mode)} {span}"

            modes: list[SharingMode] = [
                mode for mode in modes_of(agents, self._modes) if not self._results.has(part, name(mode))
            ]
            if not modes:
                continue
            like = [{"mode": mode, "number": size} | facts for mode in modes]
            if not self._allows(part, like):
                return False
            layers = self._layers(agents, "droidspeak") if "droidspeak" in modes else None
            recordings = make() if recordings is None else recordings
            block = recordings[start : start + size]
            with self._timed(part, modes) as spent:
                found = run_block(self._bench, agents, modes, block, layers, self._labelled(key, 0, 0))
            shares = {of: seconds / len(modes) for of, seconds in spent.items()}
            cells = {name(mode): {"mode": mode, "number": size} | facts | found[mode] | shares for mode in modes}
            self._results.add(part, cells)
        return True

    def _similarity(self) -> bool:
        sample = self._scale.similarity
        for agents in self._sets:
            key = f"{agents.name} {sample.tokens} tokens {sample.number} trajectories {self._seed}"
            if agents.stacked_from is not None or self._results.has("similarity", key):
                continue
            if not self._allows("similarity", [{"mode": None, "tokens": sample.tokens, "number": sample.number}]):
                return False
            found = oracle_recordings(self._bench.tokenizer, "evaluation", sample.number, self._seed, sample.tokens)
            self._bench.release()
            with self._timed("similarity", []) as spent:
                layers = value_similarity(
                    *self._bench.parts, dict(agents.adapters), found, progress=self._labelled(agents.name, 0, 0)
                )
            facts = {"kind": agents.name, "mode": None, **dataclasses.asdict(sample)}
            values = {name: _rounded(value) for name, value in layers.items()}
            self._results.add("similarity", {key: facts | values | spent})
        return True

    # What they share.

    def _layers(self, agents: AgentSet, mode: SharingMode) -> tuple[int, ...] | None:
        """The layers that `droidspeak` recomputes for these agents, measured on training data."""
        if mode != "droidspeak":
            return None
        known = self._results.cells("sensitivity").get(agents.name)
        if known is None:
            known = self._measure_sensitivity(agents)
            self._results.add("sensitivity", {agents.name: known})
        return tuple(known["layers"])

    def _measure_sensitivity(self, agents: AgentSet) -> dict[str, Any]:
        sample, tokenizer = self._scale.sensitivity, self._bench.tokenizer
        if self._recorded is not None and agents is self._recorded.agents:
            training, _ = recorded.split(self._recorded.trajectories)
            found = recorded.recordings(training, tokenizer, self._bench.config.context_length)[: sample.number]
        else:
            found = oracle_recordings(tokenizer, "train", sample.number, self._seed, sample.tokens)
        self._bench.release()
        with self._timed("sensitivity", []) as spent:
            drift = layer_drift(
                *self._bench.parts, dict(agents.adapters), found,
                implementation=self._bench.options.implementation,
                progress=self._labelled(f"{agents.name}: sensitivity", 0, 0),
            )  # fmt: skip
        facts = {"kind": agents.name, "tokens": sample.tokens, "number": len(found)}
        return facts | {"layers": list(most_drifting(drift)), "drift": _rounded(drift)} | spent

    def _allows(self, part: str, cells: Sequence[Mapping[str, Any]]) -> bool:
        finished = self._results.cells(part).values()
        expected = [
            expected_seconds(cell, finished, compiles=(part, cell["mode"]) not in self._compiled) for cell in cells
        ]
        return self._deadline.allows(sum(expected))

    @contextlib.contextmanager
    def _timed(self, part: str, modes: Sequence[SharingMode]) -> Iterator[dict[str, float]]:
        """A dictionary that has `seconds`, and `compile_seconds` of them, behind the block."""
        spent: dict[str, float] = {}
        started = time.perf_counter()
        with CompileWatch() as watch:
            yield spent
        spent["seconds"] = round(time.perf_counter() - started, 3)
        spent["compile_seconds"] = round(min(watch.seconds, spent["seconds"]), 3)
        self._compiled |= {(part, mode) for mode in modes}

    def _labelled(self, label: str, done: int, total: int) -> Progress:
        """Progress of a cell as a part of the whole, which `total` is; or alone, for 0."""
        label = label.replace("{mode} ", "")

        def show(cell_done: int, cell_total: int, what: str) -> None:
            if total:
                self._progress(done + cell_done, total, label)
            else:
                self._progress(cell_done, cell_total, f"{label}: {what}")

        return show


def _rounded(values) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
