"""Training examples: for each agent, what it reads and what it should write."""

import bisect
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from lragent_jax.models.errors import InputError
from lragent_jax.models.new_folder import new_folder
from lragent_jax.react import ROLES
from lragent_jax.world.names import Split
from lragent_jax.world.oracle import MISTAKES, Mistake, play
from lragent_jax.world.padding import DEFAULT_LAYOUT, NO_PADDING, CountTokens, Layout, Padding, pad
from lragent_jax.world.question import Question, make_questions
from lragent_jax.world.transcript import Piece, text_of, tool_name


@dataclasses.dataclass(frozen=True)
class LengthBand:
    """`share` of trajectories has a length drawn evenly from [low, high] tokens; longer episodes stay as they are."""

    share: float
    low: int
    high: int


@dataclasses.dataclass(frozen=True)
class Mix:
    """What a training set is made of: lengths in tokens, and how often the oracle makes a mistake.

    By default three of four trajectories are padded (bare they have 160 to 400 tokens), since an agent that never
    meets paragraphs about others in its results takes a name from any of them; one in ten has over 2 000 tokens, so
    that long contexts are met, too. 1, 2 and 3 hops come in turn; 40 % of episodes hold a mistake, of five kinds in
    equal parts.
    """

    lengths: tuple[LengthBand, ...] = (
        LengthBand(0.25, 150, 450),
        LengthBand(0.45, 450, 1200),
        LengthBand(0.20, 1200, 2000),
        LengthBand(0.06, 2000, 4000),
        LengthBand(0.04, 4000, 7500),
    )
    mistakes_share: float = 0.4
    layout: Layout = DEFAULT_LAYOUT

    @classmethod
    def of_length(cls, num_tokens: int) -> "Mix":
        """One length for all."""
        return cls(lengths=(LengthBand(1.0, num_tokens, num_tokens),))

    def draw(self, question: Question) -> tuple[int, Mistake | None]:
        """The length and the mistake of one trajectory."""
        rng = question.rng("mix")
        edges = list(itertools.accumulate(band.share for band in self.lengths))
        band = self.lengths[bisect.bisect(edges[:-1], rng.random() * edges[-1])]
        mistake = rng.choice(MISTAKES) if rng.random() < self.mistakes_share else None
        return rng.randint(band.low, band.high), mistake


DEFAULT_MIX = Mix()


@dataclasses.dataclass(frozen=True)
class SetSize:
    """Lines of each file of a set, and the mean number of tokens of its trajectories."""

    lines: Mapping[str, int]
    mean_tokens: float


def padding_for(
    question: Question,
    num_tokens: int | None,
    count_tokens: CountTokens,
    layout: Layout = DEFAULT_LAYOUT,
    mistake: Mistake | None = None,
) -> Padding:
    """What brings the question's episode, as the oracle plays it, to `num_tokens` tokens; None adds nothing."""
    if num_tokens is None:
        return NO_PADDING
    pieces = play(question, mistake=mistake)
    num_searches = sum(piece.text == tool_name("Search") for piece in pieces)
    num_finds = min(num_searches, question.num_hops)  # one of more misses
    return pad(question, num_tokens - count_tokens(text_of(pieces)), count_tokens, layout, num_finds)


def trajectory(question: Question, count_tokens: CountTokens, mix: Mix = DEFAULT_MIX) -> list[Piece]:
    """The question's episode as training sees it."""
    num_tokens, mistake = mix.draw(question)
    return play(question, padding_for(question, num_tokens, count_tokens, mix.layout, mistake), mistake)


def write_examples(
    folder: Path,
    split: Split,
    num_questions: int,
    seed: int,
    count_tokens: CountTokens,
    mix: Mix = DEFAULT_MIX,
    progress: Callable[[int, int, str], None] | None = None,
    *,
    force: bool = False,
) -> SetSize:
    """Writes plan.jsonl, action.jsonl and reflect.jsonl, trajectories.jsonl, and questions.jsonl.

    The first three hold lines of `input` and `output`, for agents that are trained one by one; trajectories.jsonl the
    same episodes as lines of `pieces`, for agents that are trained at once. In the first three, lines of one trajectory
    follow one another, and where an agent speaks again its line's input begins with the one before, input and output.
    The folder appears whole or not at all. Raises `InputError` for arguments that make no set, `CheckpointError` for a
    folder that cannot be made, and for one that is there, unless it holds such a set and `force` replaces it.
    """
    if num_questions < 1:
        raise InputError(f"a set needs at least one question, not {num_questions}")
    lines: dict[str, int] = dict.fromkeys((*ROLES, "trajectories", "questions"), 0)
    num_tokens = 0
    with new_folder(folder, marker="questions.jsonl", force=force) as draft, ExitStack() as stack:
        files = {name: stack.enter_context((draft / f"{name}.jsonl").open("w")) for name in lines}
        for question in make_questions(split, num_questions, seed):
            if progress and question.number % _QUESTIONS_PER_REPORT == 0:
                progress(question.number, num_questions, f"trajectories of {split}")
            pieces = trajectory(question, count_tokens, mix)
            num_tokens += count_tokens(text_of(pieces))
            whole = [{"text": piece.text, "agent": piece.role, "taught": piece.taught} for piece in pieces]
            others = {"trajectories": {"pieces": whole}, "questions": dataclasses.asdict(question)}
            for name, line in (*_lines(pieces), *((name, f"{json.dumps(one)}\n") for name, one in others.items())):
                files[name].write(line)
                lines[name] += 1
    if progress:
        progress(num_questions, num_questions, f"trajectories of {split}")
    return SetSize(lines, num_tokens / num_questions)


_QUESTIONS_PER_REPORT = 100


def _lines(pieces: Sequence[Piece]) -> Iterator[tuple[str, str]]:
    """Role and JSON line of every output that is to be learnt."""
    inside = ""  # the text so far, as it stands inside JSON's quotes: escaped piece by piece, for it only grows
    for piece in pieces:
        escaped = json.dumps(piece.text)[1:-1]
        if piece.role is not None and piece.taught:
            yield piece.role, f'{{"input": "{inside}", "output": "{escaped}"}}\n'
        inside += escaped
