"""An episode as text: what is written between the agents' outputs, how those look, and how they are read.

The form is that of `lragent_jax.react`: append-only, and cut into pieces where the writer changes. Pieces end in a
line's end, a bracket or a colon, where tokenizers split anyway, so that tokenising them one by one gives the ids of the
whole text.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

from lragent_jax.react import Role
from lragent_jax.world.entity import normalised
from lragent_jax.world.tools import TOOLS, Tool

INSTRUCTION = (
    "Answer the question in steps of Thought, Action and Observation. Three agents share this text: plan writes the "
    "thoughts and names tools, action writes their arguments, reflect judges the answer. "
    "Tools: Search[entity], Lookup[relation], Finish[answer]."
)

Verdict = Literal["right", "wrong"]
THOUGHT_STOP, TOOL_STOP, ARGUMENT_STOP, VERDICT_STOP = "\n", "[", "\n", "\n"


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of an episode. `role` wrote it (None: context); `taught` is False for outputs nobody should learn."""

    text: str
    role: Role | None = None
    taught: bool = True


class Transcript:
    """Collects pieces; neighbouring context is one piece, as it is one when agents run."""

    def __init__(self):
        self.pieces: list[Piece] = []

    def add(self, text: str, role: Role | None = None, *, taught: bool = True) -> None:
        last = self.pieces[-1] if self.pieces else None
        if last and last.role is None and role is None:
            self.pieces[-1] = Piece(last.text + text)
        else:
            self.pieces.append(Piece(text, role, taught))


def text_of(pieces: Iterable[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


# What is written between outputs.


def opening(question: str, notes: Sequence[str] = ()) -> str:
    """Everything in front of the first thought."""
    block = "".join(f"{note}\n" for note in notes)
    return f"{INSTRUCTION}\n\n{f'Notes:{chr(10)}{block}' if notes else ''}Question: {question}\nThought 1:"


def action_label(number: int) -> str:
    return f"Action {number}:"


def observation(number: int, text: str) -> str:
    """What a tool said, and the label of the next thought."""
    return f"Observation {number}: {text}\nThought {number + 1}:"


REFLECT_LABEL = "Reflect:"


# What agents learn to write.


def need(relation: str, of: str) -> str:
    """The thought in front of a Search: what is missing, and of what, by kind or relation, never by name."""
    return f" I need the {relation} of the {of}.\n"


def look_up(relation: str) -> str:
    """The thought in front of a Lookup."""
    return f" I look up the {relation}.\n"


def know(relation: str, name: str) -> str:
    """The last thought."""
    return f" I know: the {relation} is {name}.\n"


def tool_name(tool: Tool) -> str:
    return f" {tool}{TOOL_STOP}"


def argument(text: str) -> str:
    return f"{text}]\n"


def verdict_right(relation: str, name: str) -> str:
    return f" right: the {relation} is {name}.\n"


def verdict_wrong(reason: str) -> str:
    return f" wrong: {reason}.\n"


# How outputs are read.


def read_tool(output: str) -> Tool | None:
    """The tool that an output names, None for an output that is not a tool's name and a bracket."""
    name, bracket, _ = output.partition(TOOL_STOP)
    return next((tool for tool in TOOLS if bracket and name.strip(" ") == tool), None)


def read_argument(output: str) -> str | None:
    """What an output has in front of the bracket that ends its line; None without one, or with nothing in it."""
    line, _, _ = output.partition(ARGUMENT_STOP)
    line = line.strip()
    return line[:-1].strip() or None if line.endswith("]") else None


def read_verdict(output: str) -> Verdict | None:
    word = output.strip().split(":", 1)[0].strip().rstrip(".").casefold()
    return "right" if word == "right" else "wrong" if word == "wrong" else None


def is_answer(given: str | None, answer: str) -> bool:
    """Exact match, but for case and spaces."""
    return given is not None and normalised(given) == normalised(answer)
