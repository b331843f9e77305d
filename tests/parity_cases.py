"""What is computed by both sides of the comparison: inputs, the rows of logits kept, and one trajectory.

Both sides give a flat dict of arrays, with these names:

    submodule/<name>                      outputs of layer 1's parts for `hidden`, of the embedding and of the rotation
    decode/<agent>/prompt                 logits behind the tokens `PROMPT_ROWS` of the prompt
    decode/<agent>/forced                 logits behind `FORCED_ROWS` tokens of a given continuation
    decode/<agent>/greedy_ids             the continuation that the agent prefers
    decode/<agent>/greedy                 logits behind `GREEDY_ROWS` tokens of it, as far as it goes
    trajectory/<set>/<event>/ids          what a "generate" generated
    trajectory/<set>/<event>/logits       see `Event`
"""

from typing import Literal, NamedTuple

import numpy as np
from parity_models import adapter_names, draw, draw_ids

# Greedy continuations are followed only as far as the best token leads by more than rounding could ever be.
MARGIN = 1e-3

PROMPT_LENGTH = 80
DECODED_LENGTH = 40
# Pages hold 8 tokens and chunks 16: rows on both sides of such borders, and the ends.
PROMPT_ROWS = (0, 1, 7, 8, 16, 17, 63, 79)
FORCED_ROWS = (1, 2, 7, 8, 16, 39, 40)
GREEDY_ROWS = (1, 8, 24, 40)

SUBMODULE_TOKENS = 12
ROTARY_POSITIONS = np.asarray([0, 1, 2, 7, 31, 32, 63, 64, 100, 255])


class Event(NamedTuple):
    """One step of a trajectory.

    append: `num_tokens` tokens from outside. score: that many given tokens of `role`; the logits of `score_rows`, from
    which such a token would have been sampled. generate: up to that many tokens that `role` prefers; the logits behind
    them. next: the logits of what `role` would say next.
    """

    kind: Literal["append", "score", "generate", "next"]
    role: str | None = None
    num_tokens: int = 0


TRAJECTORY = (
    Event("append", num_tokens=21),
    Event("score", "plan", 9),
    Event("generate", "action", 6),
    Event("append", num_tokens=17),
    Event("next", "reflect"),
    Event("score", "reflect", 5),
    Event("generate", "plan", 8),
    Event("append", num_tokens=10),
    Event("score", "action", 7),
    Event("next", None),
    Event("generate", "reflect", 8),
    Event("next", "plan"),
)


def score_rows(num_tokens: int) -> list[int]:
    """The rows kept of `num_tokens` scored ones: the first, one in the middle, the last."""
    return [0, num_tokens // 2, num_tokens - 1]


def agent_name(set_name: str, role: str | None) -> str | None:
    return None if role is None else f"{set_name}-{role}"


def adapter_sets(family: str) -> list[str]:
    """The sets of three agents that a family is tried with."""
    return list(dict.fromkeys(name.split("-")[0] for name in adapter_names(family)))


def decode_agents(family: str) -> list[str | None]:
    """Whose decoding is compared: the base model's, and one agent's of each set."""
    return [None, *(f"{set_name}-reflect" for set_name in adapter_sets(family))]


def prompt_ids(seed: int) -> list[int]:
    return draw_ids(seed, "prompt", PROMPT_LENGTH)


def forced_ids(seed: int) -> list[int]:
    return draw_ids(seed, "forced", DECODED_LENGTH)


def event_ids(seed: int, index: int) -> list[int]:
    """The given tokens of `TRAJECTORY[index]`."""
    return draw_ids(seed, f"event {index}", TRAJECTORY[index].num_tokens)


def submodule_ids(seed: int) -> list[int]:
    return draw_ids(seed, "submodule", SUBMODULE_TOKENS)


def hidden(seed: int, width: int, scale: float = 1.0) -> np.ndarray:
    """What submodules are given: f32 [1, T, D]. At a small scale the norm's epsilon shows."""
    return draw(seed, "hidden", (1, SUBMODULE_TOKENS, width), scale)
