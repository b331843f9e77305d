"""Paged causal attention over a base cache and a low-rank cache."""

from lragent_jax.kernels.lora_attention.api import lora_attention
from lragent_jax.kernels.lora_attention.arguments import LoraB, LowRank, PageTable

__all__ = ["LoraB", "LowRank", "PageTable", "lora_attention"]
