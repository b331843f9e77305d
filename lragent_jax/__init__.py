"""Several LoRA agents over one Llama, one shared KV cache: LRAgent in JAX.

Names are imported when they are first used, so that `import lragent_jax` and the kernels below it stay light.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lragent_jax.async_engine import AsyncEngine
    from lragent_jax.embedded import embedded_engine
    from lragent_jax.engine import Engine
    from lragent_jax.episodes import run_episodes
    from lragent_jax.metrics import EngineMetrics
    from lragent_jax.models.config import LlamaConfig
    from lragent_jax.models.errors import (
        AdapterError,
        CheckpointError,
        ConfigError,
        EngineBusyError,
        InputError,
        LRAgentError,
        OutOfPagesError,
        TrajectoryBusyError,
        TrajectoryClosedError,
    )
    from lragent_jax.outputs import GenerationOutput, ScoreOutput, StreamPiece
    from lragent_jax.sampling_params import SamplingParams
    from lragent_jax.trajectory import Trajectory
    from lragent_jax.world.question import make_questions

_HOMES = {
    "AdapterError": "models.errors",
    "AsyncEngine": "async_engine",
    "CheckpointError": "models.errors",
    "ConfigError": "models.errors",
    "Engine": "engine",
    "EngineBusyError": "models.errors",
    "EngineMetrics": "metrics",
    "GenerationOutput": "outputs",
    "InputError": "models.errors",
    "LRAgentError": "models.errors",
    "LlamaConfig": "models.config",
    "OutOfPagesError": "models.errors",
    "SamplingParams": "sampling_params",
    "ScoreOutput": "outputs",
    "StreamPiece": "outputs",
    "Trajectory": "trajectory",
    "TrajectoryBusyError": "models.errors",
    "TrajectoryClosedError": "models.errors",
    "embedded_engine": "embedded",
    "make_questions": "world.question",
    "run_episodes": "episodes",
}

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "AsyncEngine",
    "CheckpointError",
    "ConfigError",
    "Engine",
    "EngineBusyError",
    "EngineMetrics",
    "GenerationOutput",
    "InputError",
    "LRAgentError",
    "LlamaConfig",
    "OutOfPagesError",
    "SamplingParams",
    "ScoreOutput",
    "StreamPiece",
    "Trajectory",
    "TrajectoryBusyError",
    "TrajectoryClosedError",
    "__version__",
    "embedded_engine",
    "make_questions",
    "run_episodes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
