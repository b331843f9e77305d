"""Whole trajectories to train on: JSON lines of pieces, read, checked, and run by the agents that share a cache."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import InputError
from lragent_jax.models.problems import listing
from lragent_jax.tokenizer import Tokenizer
from lragent_jax.training.examples import TokenSequence, encode_texts, json_kind, read_json_lines


@dataclasses.dataclass(frozen=True)
class Piece:
    """Text that `agent` wrote, or context that no agent wrote (None). What is not `taught` has no loss."""

    text: str
    agent: str | None
    taught: bool


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One context, from its first piece to its last. `place` is the file and line it comes from."""

    pieces: tuple[Piece, ...]
    place: str


def read_trajectories(path: str | Path) -> list[Trajectory]:
    """Reads a file of JSON lines, each an object with `pieces`: a list of {"text": …, "agent": …, "taught": …}.

    `text` is not empty; `agent` is who wrote it, null or missing for context; `taught` (true by default) is false for
    what an agent wrote and should not have written: it is read like everything else, and nobody learns to write it.
    Other fields are ignored. Raises one `InputError` that names the file and lists every line that is not what it
    should be.
    """
    trajectories, problems = [], []
    for place, value, problem in read_json_lines(path):
        pieces, found = ([], [problem]) if problem else _pieces(value)
        trajectories.append(Trajectory(tuple(pieces), place))
        problems += [f"{place}: {one}" for one in found]
    if problems:
        raise InputError(listing(f"{path} cannot be trained on:", problems))
    if not trajectories:
        raise InputError(f'{path} is empty: it must hold lines like {{"pieces": [{{"text": …, "agent": …}}, …]}}')
    return trajectories


def agents_of(trajectories: Iterable[Trajectory]) -> list[str]:
    """Everybody who wrote something, in the order of their first outputs.

    Raises `InputError` for agents that are taught nothing.
    """
    pieces = [piece for trajectory in trajectories for piece in trajectory.pieces if piece.agent is not None]
    agents = list(dict.fromkeys(piece.agent for piece in pieces if piece.agent is not None))
    taught = {piece.agent for piece in pieces if piece.taught}
    if untaught := [agent for agent in agents if agent not in taught]:
        raise InputError(f"there is no output that {', '.join(untaught)} should learn to write")
    return agents


def tokenize_trajectories(
    trajectories: Sequence[Trajectory], agents: Sequence[str], tokenizer: Tokenizer, config: LlamaConfig
) -> list[TokenSequence]:
    """Trajectories as sequences of ids, every token with the agent that runs it, an index into `agents`.

    Every piece is tokenised on its own, as an engine meets it. What follows the last output that is taught is left
    out. Raises one `InputError` that lists every trajectory that cannot be run.
    """
    cut = [_up_to_last_taught(trajectory.pieces) for trajectory in trajectories]
    texts = [piece.text for pieces in cut for piece in pieces]
    places = [one.place for one, pieces in zip(trajectories, cut, strict=True) for _ in pieces]
    encoded = iter(encode_texts(texts, places, tokenizer))
    sequences, problems = [], []
    for trajectory, pieces in zip(trajectories, cut, strict=True):
        ids = [next(encoded) for _ in pieces]
        ids[0] = tokenizer.with_bos(ids[0])
        if found := _problem(pieces, ids, config):
            problems.append(f"{trajectory.place}: {found}")
        else:
            sequences.append(_sequence(pieces, ids, agents))
    if problems:
        raise InputError(listing("these trajectories cannot be run:", problems))
    return sequences


def readers(writers: Sequence[int | None]) -> np.ndarray:
    """i16 [T]: who runs each token, from who wrote it (None: nobody did).

    Agents that share a cache run what nobody has run before them: an agent about to write first runs all that is new,
    and then its own output but for the last token, which it only draws. So a token is run by who writes the next one
    that anybody writes. Behind the last of those nobody runs anything; the entries there repeat the last reader.
    """
    writer_of_next, agents = next((writer for writer in reversed(writers) if writer is not None), 0), []
    for writer in reversed(writers):
        agents.append(writer_of_next)
        writer_of_next = writer_of_next if writer is None else writer
    return np.asarray(agents[::-1], np.int16)


def alone(sequence: TokenSequence, agent: int) -> TokenSequence | None:
    """The same trajectory with all tokens run by one agent, as when nothing is shared, and its outputs alone taught.

    It ends with the last of them; None where there is none.
    """
    assert sequence.agents is not None
    is_own = sequence.is_output.copy()
    is_own[1:] &= sequence.agents[:-1] == agent
    if not is_own.any():
        return None
    length = int(np.flatnonzero(is_own)[-1]) + 1
    return TokenSequence(sequence.ids[:length], is_own[:length], np.broadcast_to(np.int16(agent), length))


def _sequence(pieces: Sequence[Piece], ids: Sequence[Sequence[int]], agents: Sequence[str]) -> TokenSequence:
    writers: list[int | None] = []
    is_output: list[bool] = []
    for piece, of_piece in zip(pieces, ids, strict=True):
        writers += [None if piece.agent is None else agents.index(piece.agent)] * len(of_piece)
        is_output += [piece.agent is not None and piece.taught] * len(of_piece)
    all_ids = np.concatenate([np.asarray(of_piece, np.int32) for of_piece in ids])
    return TokenSequence(all_ids, np.asarray(is_output, bool), readers(writers))


def _problem(pieces: Sequence[Piece], ids: Sequence[Sequence[int]], config: LlamaConfig) -> str | None:
    num_tokens = sum(map(len, ids))
    if pieces[0].agent is not None or not ids[0]:
        return "it must begin with context: there is nothing to read before the first output"
    if empty := [piece.text for piece, of_piece in zip(pieces, ids, strict=True) if piece.agent and not of_piece]:
        return f"the output {empty[0]!r} has no tokens"
    if num_tokens > config.context_length:
        return f"it has {num_tokens} tokens, the model's context {config.context_length}"
    if max(max(of_piece, default=0) for of_piece in ids) >= config.vocab_size:
        return f"the tokenizer makes ids beyond the model's vocabulary of {config.vocab_size}"
    return None


def _up_to_last_taught(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    return pieces[: 1 + max(i for i, piece in enumerate(pieces) if piece.agent is not None and piece.taught)]


def _pieces(value: Any) -> tuple[list[Piece], list[str]]:
    """(the pieces, what is wrong with them)"""
    if not isinstance(value, dict) or not isinstance(value.get("pieces"), list):
        return [], ['must be an object with "pieces", a list of objects with text and agent']
    pieces, problems = [], []
    for number, item in enumerate(value["pieces"]):
        if problem := _piece_problem(item):
            problems.append(f"pieces[{number}]{problem}")
        else:
            pieces.append(Piece(item["text"], item.get("agent"), item.get("taught", True)))
    if not problems and not any(piece.agent is not None and piece.taught for piece in pieces):
        problems.append("no piece is an output to learn: every one is context, or taught is false")
    return pieces, problems


def _piece_problem(item: Any) -> str | None:
    if not isinstance(item, dict):
        return f" must be an object with text and agent, not {json_kind(item)}"
    text, agent, taught = item.get("text"), item.get("agent"), item.get("taught", True)
    if not isinstance(text, str) or not text:
        return ".text must be text that is not empty" + ("" if text == "" else f", not {json_kind(text)}")
    if agent is not None and (not isinstance(agent, str) or not agent):
        return f".agent must be a name, or null for context, not {json_kind(agent)}"
    if not isinstance(taught, bool):
        return f".taught must be true or false, not {json_kind(taught)}"
    return None
