"""Recorded ReAct trajectories: the file they come in, and who wrote which part of their text.

ReAct (arXiv 2210.03629) interleaves thoughts, actions and observations. Its division among three agents is that of
AutoAct (arXiv 2401.05268), which LRAgent (arXiv 2602.01053) took over: one plans, one fills in the arguments of
tools, one reflects on the answer.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from lragent_jax.models.errors import InputError
from lragent_jax.models.problems import listing

Role = Literal["plan", "action", "reflect"]
ROLES: tuple[Role, ...] = ("plan", "action", "reflect")


@dataclasses.dataclass(frozen=True)
class Segment:
    """A piece of a trajectory's text. `role` says which agent wrote it; None is context that no agent wrote."""

    text: str
    role: Role | None


@dataclasses.dataclass(frozen=True)
class Step:
    """One round. `action` is normally `Tool[argument]`; any of the three may be empty."""

    thought: str
    action: str
    observation: str


@dataclasses.dataclass(frozen=True)
class ReactTrajectory:
    """One recorded run: the instructions and the question that opened it, and its steps."""

    prefix: str
    question: str
    answer: str
    steps: tuple[Step, ...]

    def segments(self) -> list[Segment]:
        """The trajectory as text, cut where the writer changes.

        Thoughts and tool names are the plan agent's, arguments the action agent's, and every thought and action
        behind the first `Finish` the reflect agent's. Labels and observations are context. An action without
        brackets, or one that only repeats the thought, has no argument: all of it is the plan agent's. Each output
        ends with what a generating agent would stop at: a line's end, or the bracket behind the tool name.

        The last segment is an output: an observation behind it is left out, for nobody reads it.
        """
        text = _SegmentedText()
        text.add(f"{self.prefix.rstrip()}\n\n" if self.prefix.strip() else "")
        text.add(f"Question: {self.question.strip()}\n")
        finished = False
        for number, step in enumerate(self.steps, start=1):
            thought, action = step.thought.strip(), step.action.strip()
            tool, bracket, argument = action.partition("[")
            text.add(f"Thought {number}:")
            text.add_line(thought, "reflect" if finished else "plan")
            text.add(f"Action {number}:")
            if finished or not bracket or action == thought:
                text.add_line(action, "reflect" if finished else "plan")
            else:
                text.add(f" {tool}[", "plan")
                text.add(f"{argument}\n", "action")
            text.add(f"Observation {number}:")
            text.add_line(step.observation.strip(), None)
            finished = finished or (bool(bracket) and tool.strip().casefold() == "finish")
        return text.up_to_last_output()


def read_trajectories(path: str | Path) -> list[ReactTrajectory]:
    """Reads a file of recorded trajectories.

    The file is one JSON object: `prefixes` (texts that explain the task), and `trajectories` with `question`,
    `answer`, `prefix` (an index) and `steps` of `thought`, `action` and `observation`. Further fields are ignored.
    Raises one `InputError` that names the file and lists every field that is not what it should be.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"there is no trajectory file {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as a trajectory file in JSON: {error}") from error
    reader = _Reader()
    trajectories = reader.file(value)
    if reader.problems:
        raise InputError(listing(f"{path} is no trajectory file that can be replayed:", reader.problems))
    return trajectories


class _SegmentedText:
    """Collects segments; neighbours of one writer that belong to one output or one stretch of context are joined."""

    def __init__(self):
        self._segments: list[Segment] = []

    def add(self, text: str, role: Role | None = None) -> None:
        last = self._segments[-1] if self._segments else None
        if last and last.role is None and role is None:
            self._segments[-1] = Segment(last.text + text, None)
        elif text:
            self._segments.append(Segment(text, role))

    def add_line(self, text: str, role: Role | None) -> None:
        """The rest of a line behind its label; nobody wrote it where it is empty."""
        self.add(f" {text}\n", role) if text else self.add("\n")

    def up_to_last_output(self) -> list[Segment]:
        outputs = [i for i, segment in enumerate(self._segments) if segment.role is not None]
        return self._segments[: outputs[-1] + 1] if outputs else []


class _Reader:
    """Walks through the parsed JSON and notes every problem; what it returns is whole only if there is none."""

    def __init__(self):
        self.problems: list[str] = []
        self._prefixes: list[str] | None = None

    def file(self, value: Any) -> list[ReactTrajectory]:
        if not isinstance(value, dict):
            self.problems.append(f"the file must hold an object, not {_kind(value)}")
            return []
        prefixes = self._list(value, "prefixes", "")
        if prefixes is not None:
            self._prefixes = [self._text(prefix, f"prefixes[{i}]") for i, prefix in enumerate(prefixes)]
        items = self._list(value, "trajectories", "")
        if items == []:
            self.problems.append("trajectories is empty: there is nothing to replay")
        return [self._trajectory(item, f"trajectories[{i}]") for i, item in enumerate(items or [])]

    def _trajectory(self, value: Any, where: str) -> ReactTrajectory:
        if not isinstance(value, dict):
            self._wrong(where, "an object", value)
            return ReactTrajectory("", "", "", ())
        items = self._list(value, "steps", where)
        steps = tuple(self._step(step, f"{where}.steps[{i}]") for i, step in enumerate(items or []))
        if items is not None and not any(step.thought.strip() or step.action.strip() for step in steps):
            self.problems.append(f"{where}.steps holds no thought and no action: there is nothing to replay")
        return ReactTrajectory(
            prefix=self._prefix(value, where),
            question=self._text(value.get("question", _MISSING), f"{where}.question"),
            answer=self._text(value.get("answer", _MISSING), f"{where}.answer"),
            steps=steps,
        )

    def _step(self, value: Any, where: str) -> Step:
        if not isinstance(value, dict):
            self._wrong(where, "an object", value)
            return Step("", "", "")
        names = [field.name for field in dataclasses.fields(Step)]
        return Step(*(self._text(value.get(name, _MISSING), f"{where}.{name}") for name in names))

    def _prefix(self, value: dict, where: str) -> str:
        index = value.get("prefix", _MISSING)
        if not isinstance(index, int) or isinstance(index, bool):
            self._wrong(f"{where}.prefix", "an index into prefixes", index)
        elif self._prefixes is not None and not 0 <= index < len(self._prefixes):
            self.problems.append(f"{where}.prefix is {index}, but the number of prefixes is {len(self._prefixes)}")
        elif self._prefixes is not None:
            return self._prefixes[index]
        return ""

    def _text(self, value: Any, where: str) -> str:
        if not isinstance(value, str):
            self._wrong(where, "text", value)
            return ""
        if any("\ud800" <= character <= "\udfff" for character in value):
            self.problems.append(f"{where} holds half of a surrogate pair, which is no text")
            return ""
        return value

    def _list(self, owner: dict, name: str, where: str) -> list | None:
        value = owner.get(name, _MISSING)
        if isinstance(value, list):
            return value
        self._wrong(f"{where}.{name}".removeprefix("."), "a list", value)
        return None

    def _wrong(self, where: str, wanted: str, value: Any) -> None:
        self.problems.append(
            f"{where} is missing" if value is _MISSING else f"{where} must be {wanted}, not {_kind(value)}"
        )


_MISSING = object()


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a fraction"}
    return names[type(value)]
