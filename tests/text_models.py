"""A tiny model that reads text, its three agents, and trajectories for them, as files and in memory."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from model_folders import SIZES, config_json, huggingface_tensors, random_weights, write_huggingface
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lragent_jax.engine import Engine
from lragent_jax.models.adapter import Adapter, random_adapter
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.huggingface import config_from_huggingface
from lragent_jax.models.llama import random_params
from lragent_jax.models.peft import write_peft
from lragent_jax.react import ROLES, ReactTrajectory, Step
from lragent_jax.tokenizer import Tokenizer

FIELDS = config_json(vocab_size=400, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1)
CONFIG: LlamaConfig = config_from_huggingface(FIELDS)
SPECIAL = ["<s>", "</s>"]

TRAJECTORIES = [
    ReactTrajectory(
        prefix="Answer with Thought, Action and Observation.\n",
        question="Which river flows through the city?",
        answer="the Vistula",
        steps=(
            Step("I need the city.", "Search[Warsaw]", "Warsaw stands on the Vistula, far from the sea."),
            Step("It is the Vistula.", "Finish[the Vistula]", "Please reflect."),
            Step("The article says so.", "Reflect[right]", "Correct."),
        ),
    ),
    ReactTrajectory(
        prefix="Answer with Thought, Action and Observation.\n",
        question="Which came first?",
        answer="the canal",
        steps=(
            Step("", "Search[canal].", ""),
            Step("Search[patent]", "Search[patent]", "Granted in 1876, seven years after the canal was opened."),
            Step("The canal came first.", "Finish[the canal]", ""),
            Step("Both dates are there.", "Reflect[right]", ""),
        ),
    ),
]


def file_of(trajectories: list[ReactTrajectory]) -> dict[str, Any]:
    """The same in the form of a trajectory file."""
    prefixes = list(dict.fromkeys(t.prefix for t in trajectories))
    items = [dataclasses.asdict(t) | {"prefix": prefixes.index(t.prefix)} for t in trajectories]
    return {"source": "tests", "prefixes": prefixes, "trajectories": json.loads(json.dumps(items))}


@functools.cache
def tokenizer_backend() -> Backend:
    """Bytes, and the pieces of the texts above; it puts <s> in front."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([json.dumps(file_of(TRAJECTORIES))], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer_backend(), bos_token="<s>", eos_token="</s>"))


def adapters(groups: tuple[int, int, int] = (100, 100, 100), scale: float = 0.3) -> dict[str, Adapter]:
    """Plan, action and reflect; those of one number share their A."""
    return {
        role: random_adapter(CONFIG, rank=4, targets=("q", "v"), seed=seed, shared_a_seed=groups[seed], scale=scale)
        for seed, role in enumerate(ROLES)
    }


@functools.cache
def params():
    return random_params(CONFIG, "float32", seed=3)


def text_engine(agents: dict[str, Adapter] | None = None, **options: Any) -> Engine:
    """An engine whose own caches are as small as they can be: `replay` makes larger ones."""
    defaults = {"tokenizer": tokenizer(), "sharing": "full", "num_pages": 1, "page_size": 16}
    graphdef, weights = params()
    agents = adapters() if agents is None else agents
    return Engine(CONFIG, graphdef, weights, agents, **{**defaults, "prefill_buckets": (32,), **options})


def write_text_model(folder: Path) -> Path:
    """A Hugging Face folder with a tokenizer. Weights are scaled so that logits stay ordinary numbers."""
    weights = {
        name: np.ones_like(weight) if name.endswith("scale") else weight * (len(weight) ** -0.5)
        for name, weight in random_weights(CONFIG).items()
    }
    weights["embed"] = weights["embed"] * SIZES["hidden_size"] ** 0.5
    write_huggingface(folder, FIELDS, huggingface_tensors(weights))
    tokenizer_backend().save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_adapters(folder: Path, agents: dict[str, Adapter]) -> dict[str, Path]:
    """A PEFT folder per agent."""
    for name, adapter in agents.items():
        write_peft(folder / name, adapter, CONFIG)
    return {name: folder / name for name in agents}
