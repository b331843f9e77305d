"""Recorded trajectories of real agents: four fifths to train on, one to measure on."""

import contextlib
import json
import random
from collections.abc import Sequence
from pathlib import Path

from lragent_jax.models.errors import InputError
from lragent_jax.react import ROLES, ReactTrajectory
from lragent_jax.recording import Recording
from lragent_jax.tokenizer import Tokenizer

TRAINING_SHARE = 0.8


def split(trajectories: Sequence[ReactTrajectory]) -> tuple[list[ReactTrajectory], list[ReactTrajectory]]:
    """(those to train on, those to measure on), always the same ones; each in the order of the file."""
    numbers = list(range(len(trajectories)))
    random.Random("recorded trajectories").shuffle(numbers)
    chosen = set(numbers[: round(TRAINING_SHARE * len(trajectories))])
    if not 0 < len(chosen) < len(trajectories):
        raise InputError(f"{len(trajectories)} trajectories are too few to train on some and measure on others")
    training = [trajectory for i, trajectory in enumerate(trajectories) if i in chosen]
    return training, [trajectory for i, trajectory in enumerate(trajectories) if i not in chosen]


def recordings(trajectories: Sequence[ReactTrajectory], tokenizer: Tokenizer, max_tokens: int) -> list[Recording]:
    """As token ids, longer ones cut behind an output; those that no output is left of are left out."""
    cut = [Recording.tokenize(trajectory, tokenizer).cut(max_tokens) for trajectory in trajectories]
    return [recording for recording in cut if recording.num_outputs]


def write_examples(
    trajectories: Sequence[ReactTrajectory], folder: Path, tokenizer: Tokenizer, max_tokens: int
) -> dict[str, int]:
    """Writes plan.jsonl, action.jsonl and reflect.jsonl for `lragent train`; returns the number of lines of each.

    Every output is a line, and lines of one trajectory follow one another. What lies beyond `max_tokens` is left out.
    """
    numbers: dict[str, int] = dict.fromkeys(ROLES, 0)
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files = {role: stack.enter_context((folder / f"{role}.jsonl").open("w")) for role in ROLES}
        except OSError as error:
            raise InputError(f"{folder} cannot be written to: {error}") from error
        for trajectory in trajectories:
            text, num_tokens = "", 0
            for segment in trajectory.segments():
                num_tokens += len(tokenizer.encode(segment.text, add_bos=not text))
                if num_tokens > max_tokens:
                    break
                if segment.role is not None:
                    files[segment.role].write(json.dumps({"input": text, "output": segment.text}) + "\n")
                    numbers[segment.role] += 1
                text += segment.text
    return numbers
