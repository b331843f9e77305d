"""One cell of free episodes: questions in, counts and strings of 0 and 1 out."""

import collections
from collections.abc import Sequence
from typing import Any

from lragent_jax.engine import Engine, Progress
from lragent_jax.episodes import Episode, run_episodes
from lragent_jax.react import ROLES
from lragent_jax.study.plan import EpisodeCell
from lragent_jax.world.question import make_questions

_FAILURES, _FAILURE_CHARACTERS = 2, 700


def run_cell(cell: EpisodeCell, engine: Engine, batch_size: int, progress: Progress) -> dict[str, Any]:
    """Runs a cell's questions, the first ones of the evaluation set with that many hops; its result as JSON."""
    questions = list(make_questions("evaluation", cell.num_questions, cell.seed, cell.hops))
    episodes = run_episodes(engine, questions, target_tokens=cell.tokens, batch_size=batch_size, progress=progress)
    return {
        "kind": cell.agents.name,
        "mode": cell.mode,
        "tokens": cell.tokens,
        "hops": cell.hops,
        "number": cell.num_questions,
        "seed": cell.seed,
        "right": _bits([episode.right for episode in episodes]),
        "verdict_right": _bits([episode.verdict_right for episode in episodes]),
        "ends": dict(collections.Counter(episode.end for episode in episodes)),
        "outputs": _by_role([episode.num_outputs for episode in episodes]),
        "bad_outputs": _by_role([episode.bad_outputs for episode in episodes]),
        "prefilled_tokens": _by_role([episode.num_prefilled_tokens for episode in episodes]),
        "cached_tokens": _by_role([episode.num_cached_tokens for episode in episodes]),
        "final_tokens": sum(len(episode.token_ids) for episode in episodes),
        "failures": [_failure(episode) for episode in episodes if not episode.right][:_FAILURES],
    }


def _bits(values: Sequence[bool]) -> str:
    return "".join("01"[value] for value in values)


def _by_role(counts: Sequence[dict]) -> dict[str, int]:
    return {role: sum(count[role] for count in counts) for role in ROLES}


def _failure(episode: Episode) -> dict[str, Any]:
    return {
        "question": episode.question.text,
        "wanted": episode.question.answer,
        "given": episode.answer,
        "end": episode.end,
        "text": episode.text[-_FAILURE_CHARACTERS:],
    }
