"""Training data: JSON lines of `input` and `output`, read, checked and joined into sequences of token ids."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import InputError
from lragent_jax.models.problems import listing
from lragent_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Example:
    """What an agent reads, and what it shall write behind it. `place` is the file and line it comes from."""

    input: str
    output: str
    place: str


@dataclasses.dataclass(frozen=True)
class TokenSequence:
    """Token ids i32 [T], and which of them an agent shall write: bool [T], never the first.

    `agents` i16 [T] says who runs each token where several agents run one sequence; None where one runs all.
    """

    ids: np.ndarray
    is_output: np.ndarray
    agents: np.ndarray | None = None

    @property
    def num_inputs(self) -> int:
        """Tokens that are run: what the last one would predict is not known."""
        return len(self.ids) - 1

    @property
    def num_outputs(self) -> int:
        return int(self.is_output.sum())


def read_examples(path: str | Path) -> list[Example]:
    """Reads a file of JSON lines, each an object with `input` and `output`; other fields are ignored.

    Raises one `InputError` that names the file and lists every line that is not what it should be.
    """
    examples, problems = [], []
    for place, value, problem in read_json_lines(path):
        if problem := problem or _problem(value):
            problems.append(f"{place}: {problem}")
        else:
            examples.append(Example(value["input"], value["output"], place))
    if problems:
        raise InputError(listing(f"{path} cannot be trained on:", problems))
    if not examples:
        raise InputError(f'{path} is empty: it must hold lines like {{"input": …, "output": …}}')
    return examples


def read_json_lines(path: str | Path) -> Iterator[tuple[str, Any, str | None]]:
    """(file and line, what it holds, None or why it is no JSON) of every line that is not empty.

    Raises `InputError` for a file that cannot be read.
    """
    path = Path(path)
    try:
        lines = _content(path).decode("utf-8-sig").split("\n")  # JSON texts may hold other line ends
    except UnicodeDecodeError as error:
        raise InputError(f"{path} cannot be read as JSON lines: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        value, problem = None, None
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            problem = f"no JSON: {error}"
        yield f"{path}:{number}", value, problem


def json_kind(value: Any) -> str:
    """The beginning of a value, for messages."""
    return json.dumps(value)[:40]


def file_hash(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes; raises `InputError` for one that cannot be read."""
    return hashlib.sha256(_content(Path(path))).hexdigest()


def tokenize(examples: Sequence[Example], tokenizer: Tokenizer, config: LlamaConfig) -> list[TokenSequence]:
    """Examples as sequences of ids, those of one trajectory joined.

    An example whose input begins with the input and output of the one before it goes on where that one ended: its new
    text and its output are tokenised on their own, as an engine meets them, and the sequence has two outputs. Under
    causal attention that is the same loss for fewer tokens. Raises one `InputError` that lists every example that
    cannot be run.
    """
    texts, starts = _new_texts(examples)
    places = [example.place for example in examples]
    contexts = encode_texts(texts, places, tokenizer)
    outputs = encode_texts([example.output for example in examples], places, tokenizer)
    sequences: list[_Growing] = []
    problems = []
    for example, starts_one, context, output in zip(examples, starts, contexts, outputs, strict=True):
        if starts_one:
            sequences.append(_Growing())
        try:
            sequences[-1].add(tokenizer.with_bos(context) if starts_one else context, output, config)
        except InputError as error:
            problems.append(f"{example.place}: {error}")
    if problems:
        raise InputError(listing("these examples cannot be run:", problems))
    return [TokenSequence(np.asarray(one.ids, np.int32), np.asarray(one.is_output, bool)) for one in sequences]


def sequences_hash(sequences: Sequence[TokenSequence]) -> str:
    """SHA-256 (hex) of ids, outputs and agents: another tokenizer makes another one of the same file."""
    digest = hashlib.sha256()
    for sequence in sequences:
        agents = [] if sequence.agents is None else [sequence.agents]
        digest.update(np.stack([sequence.ids, sequence.is_output, *agents]).astype("<i4").tobytes())
    return digest.hexdigest()


def encode_texts(texts: Sequence[str], places: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of every text; one `InputError` that lists the places of those that have none."""
    try:
        return tokenizer.encode_batch(texts)
    except InputError as of_batch:
        problems = []
        for text, place in zip(texts, places, strict=True):
            try:
                tokenizer.encode(text)
            except InputError as error:
                problems.append(f"{place}: {error}")
        raise InputError(listing("these examples cannot be run:", problems)) from of_batch


def _new_texts(examples: Sequence[Example]) -> tuple[list[str], list[bool]]:
    """What each input has behind the example before it, and whether it starts a sequence instead of going on."""
    texts, starts, before = [], [], None
    for example in examples:
        starts.append(before is None or not example.input.startswith(before))
        texts.append(example.input if starts[-1] or before is None else example.input[len(before) :])
        before = example.input + example.output
    return texts, starts


class _Growing:
    """A sequence to which examples are added."""

    def __init__(self):
        self.ids: list[int] = []
        self.is_output: list[bool] = []

    def add(self, context: Sequence[int], output: Sequence[int], config: LlamaConfig) -> None:
        if not self.ids and not context:
            raise InputError("the input is empty, and this tokenizer puts nothing in front: there is nothing to read")
        if not output:
            raise InputError("the output has no tokens")
        self.ids += [*context, *output]
        self.is_output += [False] * len(context) + [True] * len(output)
        if len(self.ids) > config.context_length:
            raise InputError(
                f"input and output are {len(self.ids)} tokens, the model's context {config.context_length}"
            )
        if max(*context, *output, 0) >= config.vocab_size:
            raise InputError(f"the tokenizer makes ids beyond the model's vocabulary of {config.vocab_size}")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _problem(value: Any) -> str | None:
    """What is wrong with a line's object."""
    if not isinstance(value, dict):
        return f"must be an object with input and output, not {json_kind(value)}"
    for name in ("input", "output"):
        if name not in value:
            return f"the field {name} is missing"
        if not isinstance(value[name], str):
            return f"{name} must be text, not {json_kind(value[name])}"
    return None if value["output"] else "the output is empty"
