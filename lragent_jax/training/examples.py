"""Training data: JSON lines of `input` and `output`, read, checked and joined into sequences of token ids."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
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
    """Token ids i32 [T], and which of them the agent shall write: bool [T], never the first."""

    ids: np.ndarray
    is_output: np.ndarray

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
    path = Path(path)
    try:
        lines = _content(path).decode("utf-8-sig").split("\n")  # JSON texts may hold other line ends
    except UnicodeDecodeError as error:
        raise InputError(f"{path} cannot be read as JSON lines: {error}") from error
    examples, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        value, problem = _parse(line)
        if problem is None:
            examples.append(Example(value["input"], value["output"], f"{path}:{number}"))
        else:
            problems.append(f"{path}:{number}: {problem}")
    if problems:
        raise InputError(listing(f"{path} cannot be trained on:", problems))
    if not examples:
        raise InputError(f'{path} is empty: it must hold lines like {{"input": …, "output": …}}')
    return examples


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
    contexts = _encode(texts, examples, tokenizer)
    outputs = _encode([example.output for example in examples], examples, tokenizer)
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
    """SHA-256 (hex) of ids and outputs: another tokenizer makes another one of the same file."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(np.stack([sequence.ids, sequence.is_output]).astype("<i4").tobytes())
    return digest.hexdigest()


def _new_texts(examples: Sequence[Example]) -> tuple[list[str], list[bool]]:
    """What each input has behind the example before it, and whether it starts a sequence instead of going on."""
    texts, starts, before = [], [], None
    for example in examples:
        starts.append(before is None or not example.input.startswith(before))
        texts.append(example.input if starts[-1] or before is None else example.input[len(before) :])
        before = example.input + example.output
    return texts, starts


def _encode(texts: Sequence[str], examples: Sequence[Example], tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of a text of every example; one `InputError` that lists the examples whose text has none."""
    try:
        return tokenizer.encode_batch(texts)
    except InputError as of_batch:
        problems = []
        for text, example in zip(texts, examples, strict=True):
            try:
                tokenizer.encode(text)
            except InputError as error:
                problems.append(f"{example.place}: {error}")
        raise InputError(listing("these examples cannot be run:", problems)) from of_batch


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


def _parse(line: str) -> tuple[Any, str | None]:
    """(the object, what is wrong with it)"""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return None, f"no JSON: {error}"
    if not isinstance(value, dict):
        return value, f"must be an object with input and output, not {json.dumps(value)[:40]}"
    for name in ("input", "output"):
        if name not in value:
            return value, f"the field {name} is missing"
        if not isinstance(value[name], str):
            return value, f"{name} must be text, not {json.dumps(value[name])[:40]}"
    if not value["output"]:
        return value, "the output is empty"
    return value, None
