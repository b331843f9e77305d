"""The demo: agents answer questions freely, once in every sharing mode, and what that takes is counted."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from lragent_jax.engine import Engine, Progress
from lragent_jax.episodes import Episode, num_pages, run_episodes
from lragent_jax.react import ROLES
from lragent_jax.sampling_params import SamplingParams
from lragent_jax.sharing import Sharing, SharingMode
from lragent_jax.world.question import Question

# What fits some two minutes on two cores. With one A-group `pre_lr` has the figures of `base_lr`; `rebase` and
# `droidspeak` need programs of their own, which take as long again to compile as they run: `scripts/study.py` has them.
DEMO_MODES: tuple[SharingMode, ...] = ("none", "full", "base", "base_lr")

_FILLER_ID = 0  # any token will do


@dataclasses.dataclass(frozen=True)
class ModeOutcome:
    """One mode over all questions. `prefilled_tokens` and `cached_tokens` are sums over all calls, `cache_bytes` what
    the caches hold in the end, all episodes together; `seconds` is without compiling."""

    right: int
    prefilled_tokens: int
    cached_tokens: int
    cache_bytes: int
    seconds: float
    episodes: Sequence[Episode] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class DemoReport:
    """What came of a demo, its modes in the order in which they ran; `compile_seconds` is the time before the first."""

    modes: dict[SharingMode, ModeOutcome]
    num_questions: int
    compile_seconds: float

    def to_json(self) -> str:
        """One line: the numbers, and every answer."""
        described = {}
        for mode, outcome in self.modes.items():
            numbers = {field.name: getattr(outcome, field.name) for field in dataclasses.fields(outcome)}
            described[mode] = numbers | {"episodes": [_described(episode) for episode in outcome.episodes]}
        return json.dumps(
            {"questions": self.num_questions, "compile_seconds": self.compile_seconds, "modes": described}
        )


def _described(episode: Episode) -> dict[str, object]:
    return {
        "question": episode.question.text,
        "answer": episode.answer,
        "right": episode.right,
        "verdict": episode.verdict,
        "tokens": len(episode.token_ids),
    }


def run_demo(
    engine: Engine,
    questions: Sequence[Question],
    modes: Sequence[SharingMode] = DEMO_MODES,
    *,
    target_tokens: int | None = None,
    max_steps: int = 8,
    progress: Progress | None = None,
) -> DemoReport:
    """Lets the engine's agents answer `questions`, all of them in one batch, once in every mode.

    The engine lends weights, agents and options; each mode gets caches of its own. `target_tokens` and `max_steps` as
    in `run_episodes`, which says what is raised.
    """
    show = progress or (lambda done, total, what: None)
    pages = num_pages(engine, target_tokens, len(questions))
    # Pools are a part of the compiled programs: all modes get those of the mode that needs most.
    sizes = {"num_pages": pages * len(ROLES), "num_low_rank_pages": pages * len(ROLES), "prefix_cache": False}

    def make(mode: SharingMode) -> Engine:
        return engine.with_sharing(mode, **sizes)

    start = time.monotonic()
    _compile([make(mode) for mode in modes], len(questions), show)
    compile_seconds = time.monotonic() - start
    outcomes: dict[SharingMode, ModeOutcome] = {}
    for mode in modes:
        own, start = make(mode), time.monotonic()
        episodes = run_episodes(
            own, questions, target_tokens=target_tokens, max_steps=max_steps, batch_size=len(questions),
            progress=lambda done, total, what, mode=mode: show(done, total, f"{mode}: {what}"),
        )  # fmt: skip
        outcomes[mode] = ModeOutcome(
            right=sum(episode.right for episode in episodes),
            prefilled_tokens=sum(sum(episode.num_prefilled_tokens.values()) for episode in episodes),
            cached_tokens=sum(sum(episode.num_cached_tokens.values()) for episode in episodes),
            cache_bytes=episodes[0].batch_cache_bytes,
            seconds=time.monotonic() - start,
            episodes=episodes,
        )
    return DemoReport(outcomes, len(questions), compile_seconds)


def _compile(engines: Sequence[Engine], num_rows: int, show: Progress) -> None:
    """Runs every program that episodes need once. Merged and split modes share none: a thread each saves a third."""
    show(0, 0, "compiling")

    def run(merged: bool) -> None:
        for engine in engines:
            if Sharing(engine.sharing).merged == merged:
                _run_once(engine, num_rows)

    with ThreadPoolExecutor(max_workers=2) as threads:
        list(threads.map(run, (True, False)))


def _run_once(engine: Engine, num_rows: int) -> None:
    """Two agents, one behind the other, over contexts of more than one chunk: in some modes what the second one reads
    of the first takes a program of its own."""
    size = 1 << (num_rows - 1).bit_length()
    params = SamplingParams(max_new_tokens=2, ignore_eos=True)  # the first comes from prefill, the second from decode
    buckets = engine.options.prefill_buckets
    assert buckets is not None
    with contextlib.ExitStack() as stack:
        contexts = [stack.enter_context(engine.trajectory()) for _ in range(size)]
        for context in contexts:
            context.append([_FILLER_ID] * (buckets[-1] + 1))
        for agent in engine.agents[:2]:
            engine.generate(contexts, agent, params)
