"""Runs agents freely on questions: they write, tools answer, and an episode ends with an answer or without one."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from lragent_jax.engine import Engine, Progress
from lragent_jax.models.errors import InputError
from lragent_jax.outputs import GenerationOutput
from lragent_jax.react import ROLES, Role
from lragent_jax.sampling_params import SamplingParams
from lragent_jax.trajectory import Trajectory
from lragent_jax.world import transcript
from lragent_jax.world.examples import padding_for
from lragent_jax.world.padding import DEFAULT_LAYOUT, Layout, TokenCounter
from lragent_jax.world.question import Question
from lragent_jax.world.tools import Tool, Tools, is_call
from lragent_jax.world.transcript import Verdict

End = Literal["finished", "steps", "tokens"]
"""How an episode ended: with Finish, out of steps, or out of room for another step."""

EXTRA_TOKENS = 640
"""What an episode may grow beyond its target length, by steps that a right one does not have."""

_MOST_TOKENS = {"thought": 40, "tool": 6, "argument": 16, "verdict": 24}
_STEP_TOKENS = sum(_MOST_TOKENS.values()) + 40  # and its labels, with reserve


@dataclasses.dataclass(frozen=True)
class Episode:
    """What became of one question.

    `answer` is what Finish was given, None without one; `right` is its exact match. `verdict` is reflect's, None where
    it gave none or was not asked, and `verdict_right` whether it judged `right` rightly. `num_outputs`, `bad_outputs`
    (outputs outside the role: plan names no tool, action closes no bracket or writes what its tool does not take,
    reflect gives no verdict) and the token counts are by role, summed over calls. `batch_cache_bytes` is what the
    engine's caches held in the end, for all episodes of the batch together.
    """

    question: Question
    answer: str | None
    right: bool
    verdict: Verdict | None
    end: End
    num_steps: int
    text: str
    token_ids: list[int]
    num_outputs: dict[Role, int]
    bad_outputs: dict[Role, int]
    num_prefilled_tokens: dict[Role, int]
    num_cached_tokens: dict[Role, int]
    batch_cache_bytes: int

    @property
    def verdict_right(self) -> bool:
        return self.verdict == ("right" if self.right else "wrong")


def run_episodes(
    engine: Engine,
    questions: Sequence[Question],
    *,
    target_tokens: int | None = None,
    roles: Mapping[Role, str | None] | None = None,
    max_steps: int = 8,
    batch_size: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    layout: Layout = DEFAULT_LAYOUT,
    progress: Progress | None = None,
) -> list[Episode]:
    """One episode for each question, in their order, at most `batch_size` at a time.

    `target_tokens`: the length that a right episode has in the end, brought about by paragraphs that nobody asked for,
    the same ones in every run; None adds none. `roles` maps plan, action and reflect to agents of other names (None:
    the base model). All rows of a batch write the same kind of output at a time. The pool has to hold
    `num_pages(engine, target_tokens, batch_size)` base pages for every adapter that writes its own.

    Raises `InputError` before anything is run: no tokenizer, an unknown role or agent, a target that does not fit the
    model's context. `temperature` and `seed` as in `SamplingParams`.
    """
    if engine.tokenizer is None:
        raise InputError("episodes are text, and this model came without a tokenizer")
    if not questions:
        return []
    for name, value in (("max_steps", max_steps), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    agents = _agents(engine, roles or {})
    limit = max_tokens(engine, target_tokens)
    count_tokens = TokenCounter(engine.tokenizer.encode)
    sampling = SamplingParams(temperature=temperature, seed=seed)
    batches = _even_batches(questions, batch_size)
    episodes: list[Episode] = []
    for batch in batches:
        with contextlib.ExitStack() as stack:
            rows = []
            for question in batch:
                padding = padding_for(question, target_tokens, count_tokens, layout)
                tools = Tools(question.world, padding.results)
                row = _Row(engine, stack.enter_context(engine.trajectory()), question, tools, limit)
                row.begin_step(transcript.opening(question.text, padding.notes))
                rows.append(row)
            runner = _Runner(engine, agents, sampling)
            for num_done in runner.run(rows, max_steps):
                if progress:
                    progress(len(episodes) + num_done, len(questions), f"episodes, step {runner.step} of {max_steps}")
            cache_bytes = engine.cache_stats().bytes_used
            episodes += [row.episode(cache_bytes) for row in rows]
    if progress:
        progress(len(questions), len(questions), "episodes")
    return episodes


def max_tokens(engine: Engine, target_tokens: int | None) -> int:
    """The most tokens that an episode can have; `InputError` for a target that the context cannot hold."""
    context = engine.config.context_length
    if target_tokens is None:
        return context
    if not 1 <= target_tokens <= context - _STEP_TOKENS:
        raise InputError(f"target_tokens must be between 1 and {context - _STEP_TOKENS}, not {target_tokens}")
    return min(context, target_tokens + EXTRA_TOKENS)


def num_pages(engine: Engine, target_tokens: int | None, batch_size: int = 64) -> int:
    """Pages that hold a batch of episodes under one key."""
    return batch_size * -(-max_tokens(engine, target_tokens) // engine.cache_stats().page_size)


class _Row:
    """One episode on its way."""

    def __init__(self, engine: Engine, trajectory: Trajectory, question: Question, tools: Tools, limit: int):
        assert engine.tokenizer is not None
        self.trajectory, self.question, self.tools = trajectory, question, tools
        self.tool: Tool | None = None
        self.answer: str | None = None
        self.verdict: Verdict | None = None
        self.end: End | None = None
        self.num_steps = 0
        self._tokenizer, self._limit = engine.tokenizer, limit
        self._counts: dict[str, dict[Role, int]] = {
            name: dict.fromkeys(ROLES, 0) for name in ("outputs", "bad", "prefilled", "cached")
        }

    def begin_step(self, text: str) -> None:
        """Adds the context in front of a thought if a step fits behind it; otherwise the episode ends."""
        ids = self._tokenizer.encode(text, add_bos=not len(self.trajectory))
        if len(self.trajectory) + len(ids) + _STEP_TOKENS > self._limit:
            self.end = "tokens"
        else:
            self.trajectory.append(ids)

    def take(self, role: Role, output: GenerationOutput, stop: str) -> str:
        """Counts an output; its text up to the stop string, with it if the agent wrote it."""
        self._counts["outputs"][role] += 1
        self._counts["prefilled"][role] += output.num_prefilled_tokens
        self._counts["cached"][role] += output.num_cached_tokens
        text = self._tokenizer.decode(output.token_ids)
        end = text.find(stop)
        return text if end < 0 else text[: end + len(stop)]

    def count_bad(self, role: Role) -> None:
        self._counts["bad"][role] += 1

    # What each phase makes of an output.

    def think(self, text: str) -> None:
        self.num_steps += 1
        ended = text.endswith(transcript.THOUGHT_STOP)
        if not ended or not text.strip():
            self.count_bad("plan")
        self.trajectory.append(("" if ended else transcript.THOUGHT_STOP) + transcript.action_label(self.num_steps))

    def name_tool(self, text: str) -> None:
        self.tool = transcript.read_tool(text)
        if self.tool is None:
            self.count_bad("plan")
            self._observe("\n", "That is no tool. There are Search, Lookup and Finish.")

    def fill_in(self, text: str) -> None:
        assert self.tool is not None
        argument = transcript.read_argument(text)
        if argument is None or not is_call(self.tool, argument):
            self.count_bad("action")
        line_end = "" if text.endswith(transcript.ARGUMENT_STOP) else transcript.ARGUMENT_STOP
        if argument is None:
            self._observe(line_end, "The argument must end with a bracket.")
        elif self.tool == "Finish":
            self.answer, self.end = argument, "finished"
            self.trajectory.append(line_end + transcript.REFLECT_LABEL)
        else:
            self._observe(line_end, self.tools.call(self.tool, argument))

    def judge(self, text: str) -> None:
        self.verdict = transcript.read_verdict(text)
        if self.verdict is None:
            self.count_bad("reflect")

    def _observe(self, line_end: str, text: str) -> None:
        self.tool = None
        self.begin_step(line_end + transcript.observation(self.num_steps, text))

    def episode(self, batch_cache_bytes: int) -> Episode:
        assert self.end is not None
        token_ids = self.trajectory.token_ids
        return Episode(
            question=self.question,
            answer=self.answer,
            right=transcript.is_answer(self.answer, self.question.answer),
            verdict=self.verdict,
            end=self.end,
            num_steps=self.num_steps,
            text=self._tokenizer.decode(token_ids),
            token_ids=token_ids,
            num_outputs=self._counts["outputs"],
            bad_outputs=self._counts["bad"],
            num_prefilled_tokens=self._counts["prefilled"],
            num_cached_tokens=self._counts["cached"],
            batch_cache_bytes=batch_cache_bytes,
        )


class _Runner:
    """Takes the rows of one batch through their steps, all of them in the same phase."""

    def __init__(self, engine: Engine, agents: Mapping[Role, str | None], sampling: SamplingParams):
        self.step = 0
        self._engine, self._agents, self._sampling = engine, agents, sampling

    def run(self, rows: Sequence[_Row], max_steps: int) -> Iterator[int]:
        """Runs the batch to its end; yields how many rows have ended after every step."""
        for self.step in range(1, max_steps + 1):
            self._phase("plan", "thought", transcript.THOUGHT_STOP, _running(rows), _Row.think)
            self._phase("plan", "tool", transcript.TOOL_STOP, _running(rows), _Row.name_tool)
            called = [row for row in _running(rows) if row.tool is not None]
            self._phase("action", "argument", transcript.ARGUMENT_STOP, called, _Row.fill_in)
            yield len(rows) - len(_running(rows))
            if not _running(rows):
                break
        for row in _running(rows):
            row.end = "steps"
        finished = [row for row in rows if row.end == "finished"]
        self._phase("reflect", "verdict", transcript.VERDICT_STOP, finished, _Row.judge)

    def _phase(self, role: Role, what: str, stop: str, rows: Sequence[_Row], then: Callable[[_Row, str], None]) -> None:
        if not rows:
            return
        params = dataclasses.replace(self._sampling, max_new_tokens=_MOST_TOKENS[what], stop=(stop,))
        outputs = self._engine.generate([row.trajectory for row in rows], self._agents[role], params)
        for row, output in zip(rows, outputs, strict=True):
            then(row, row.take(role, output, stop))


def _running(rows: Sequence[_Row]) -> list[_Row]:
    return [row for row in rows if row.end is None]


def _agents(engine: Engine, roles: Mapping[Role, str | None]) -> dict[Role, str | None]:
    """The agent of every role; `InputError` for a role or an agent that does not exist."""
    if unknown := sorted(set(roles) - set(ROLES)):
        raise InputError(f"unknown roles: {', '.join(unknown)}; there are: {', '.join(ROLES)}")
    agents: dict[Role, str | None] = {role: roles.get(role, role) for role in ROLES}
    if missing := sorted({agent for agent in agents.values() if agent is not None} - set(engine.agents)):
        raise InputError(f"no such agents: {', '.join(missing)}; loaded are: {', '.join(engine.agents) or 'none'}")
    return agents


def _even_batches(questions: Sequence[Question], batch_size: int) -> list[Sequence[Question]]:
    """As few batches as need be, of almost equal sizes."""
    number = -(-len(questions) // batch_size)
    edges = [len(questions) * i // number for i in range(number + 1)]
    return [questions[start:stop] for start, stop in itertools.pairwise(edges)]
