"""How far modes move the agents' distributions on text that is given."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lragent_jax.engine import Progress
from lragent_jax.react import ROLES
from lragent_jax.recording import Recording
from lragent_jax.replay import replay
from lragent_jax.sharing import SharingMode
from lragent_jax.study.agent_set import AgentSet
from lragent_jax.study.workbench import Workbench


def run_block(
    bench: Workbench,
    agents: AgentSet,
    modes: Sequence[SharingMode],
    recordings: Sequence[Recording],
    recompute_layers: Sequence[int] | None,
    progress: Progress,
) -> dict[SharingMode, dict[str, Any]]:
    """Each mode's figures over all positions of the recorded outputs, as JSON; `none` is run in any case."""
    engine = bench.small_engine(agents, recompute_layers)
    # One size for all blocks and lengths: pools are a part of the compiled programs.
    longest = -(-engine.config.context_length // engine.cache_stats().page_size)
    report = replay(
        engine, recordings, modes,
        num_pages=longest * len(ROLES), timed=False, progress=progress,
    )  # fmt: skip
    return {
        mode: {
            "positions": report.num_output_tokens,
            "outputs": report.num_outputs,
            "num_tokens": report.num_tokens,
            "kl": figures.kl,
            "top1_agreement": figures.top1_agreement,
            "nll": figures.nll,
            "by_kind": {kind: dataclasses.asdict(of) for kind, of in figures.by_kind.items()},
            "prefilled_tokens": figures.prefilled_tokens,
            "cached_tokens": figures.cached_tokens,
        }
        for mode, figures in report.modes.items()
        if mode in modes
    }
