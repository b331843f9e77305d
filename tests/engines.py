"""Tiny engines that share weights and compiled programs, so that a test costs what it tests."""

import functools

import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.pre_tokenizers
import tokenizers.processors
import transformers

from lragent_jax.engine import Engine
from lragent_jax.models.adapter import Adapter, random_adapter
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.llama import random_params
from lragent_jax.tokenizer import Tokenizer

CONFIG = LlamaConfig.preset("tiny")

# Buckets and pages small enough that a context of forty tokens meets every kind of border.
# Every context starts cold, so that counts are those of one trajectory: the prefix cache is tested by itself.
OPTIONS = {
    "num_pages": 48, "num_low_rank_pages": 144, "page_size": 8, "prefill_buckets": (8, 32), "decode_block": 4,
    "prefix_cache": False,
}  # fmt: skip


@functools.cache
def weights():
    return random_params(CONFIG, "float32", seed=1)


@functools.cache
def agents(targets: tuple[str, ...] = ("q", "k", "v"), scale: float = 0.3) -> dict[str, Adapter]:
    """Three agents in two A-groups: plan and action share their A, reflect has its own."""
    seeds = {"plan": (1, 100), "action": (2, 100), "reflect": (3, 200)}
    return {
        name: random_adapter(CONFIG, rank=4, targets=targets, seed=seed, shared_a_seed=a_seed, scale=scale)
        for name, (seed, a_seed) in seeds.items()
    }


def tiny_engine(sharing: str, adapters: dict[str, Adapter] | None = None, **options) -> Engine:
    graphdef, params = weights()
    adapters = agents() if adapters is None else adapters
    return Engine(CONFIG, graphdef, params, adapters, sharing=sharing, **{**OPTIONS, **options})


BOS = 1


@functools.cache
def ascii_tokenizer() -> Tokenizer:
    """One id per ASCII character, its code; BOS in front of a first piece."""
    vocab = {chr(i): i for i in range(128)} | {"<s>": BOS}
    del vocab[chr(BOS)]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(["<s>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    return Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))
