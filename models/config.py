"""The shape of a Llama, and the well-known ones by name."""

import dataclasses

from lragent_jax.models.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's stretching of the rotary frequencies; the original context length is in tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_length: int


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Everything that decides the mathematics of one decoder-only model of the Llama family.

    Letters as in the project's legend: D width, F mlp_width, N num_heads, K num_kv_heads, H head_dim, V vocab_size,
    L num_layers. Llama 2 to 3.2, Mistral and Qwen2 differ in these numbers alone.
    """

    num_layers: int
    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    rope_theta: float = 10_000.0
    rope_scaling: Llama3RopeScaling | None = None
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    tied_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        sizes = ("num_layers", "width", "mlp_width", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
        for name in (*sizes, "context_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, not {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; rotary embeddings turn pairs of numbers")
        for name in ("rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)!r}")

    @classmethod
    def preset(cls, name: str) -> "LlamaConfig":
        """The configuration published under `name` (see `PRESETS`); raises `ConfigError` for an unknown one."""
        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}; there are: {', '.join(sorted(PRESETS))}")
        return PRESETS[name]

    def projection_shapes(self) -> dict[str, tuple[int, int]]:
        """(input, output) width of the seven linear maps of one layer, which are also what LoRA can adapt."""
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q": (self.width, q_width),
            "k": (self.width, kv_width),
            "v": (self.width, kv_width),
            "o": (q_width, self.width),
            "gate": (self.width, self.mlp_width),
            "up": (self.width, self.mlp_width),
            "down": (self.mlp_width, self.width),
        }

    def base_cache_bytes_per_token(self, itemsize: int) -> int:
        """2 L K H numbers per token, whoever reads it."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize

    def low_rank_cache_bytes_per_token(self, rank: int, itemsize: int) -> int:
        """L r numbers per token, per A-group and per cached target (v, and k where adapted)."""
        return self.num_layers * rank * itemsize


_LLAMA_31_ROPE = Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=8192)
_LLAMA_32_ROPE = dataclasses.replace(_LLAMA_31_ROPE, factor=32.0)

PRESETS = {
    # Small enough for a test, large enough to have every part: GQA, more than one layer, odd group size.
    "tiny": LlamaConfig(
        num_layers=2, width=48, mlp_width=96, num_heads=6, num_kv_heads=2, head_dim=8, vocab_size=128,
        context_length=2048,
    ),
    "smollm2-135m": LlamaConfig(
        num_layers=30, width=576, mlp_width=1536, num_heads=9, num_kv_heads=3, head_dim=64, vocab_size=49_152,
        context_length=8192, rope_theta=100_000.0, tied_embeddings=True,
    ),
    "llama-2-7b": LlamaConfig(
        num_layers=32, width=4096, mlp_width=11_008, num_heads=32, num_kv_heads=32, head_dim=128, vocab_size=32_000,
        context_length=4096,
    ),
    "llama-3-8b": LlamaConfig(
        num_layers=32, width=4096, mlp_width=14_336, num_heads=32, num_kv_heads=8, head_dim=128, vocab_size=128_256,
        context_length=8192, rope_theta=500_000.0,
    ),
    "llama-3.1-8b": LlamaConfig(
        num_layers=32, width=4096, mlp_width=14_336, num_heads=32, num_kv_heads=8, head_dim=128, vocab_size=128_256,
        context_length=131_072, rope_theta=500_000.0, rope_scaling=_LLAMA_31_ROPE,
    ),
    "llama-3.1-70b": LlamaConfig(
        num_layers=80, width=8192, mlp_width=28_672, num_heads=64, num_kv_heads=8, head_dim=128, vocab_size=128_256,
        context_length=131_072, rope_theta=500_000.0, rope_scaling=_LLAMA_31_ROPE,
    ),
    "llama-3.2-1b": LlamaConfig(
        num_layers=16, width=2048, mlp_width=8192, num_heads=32, num_kv_heads=8, head_dim=64, vocab_size=128_256,
        context_length=131_072, rope_theta=500_000.0, rope_scaling=_LLAMA_32_ROPE, tied_embeddings=True,
    ),
    "llama-3.2-3b": LlamaConfig(
        num_layers=28, width=3072, mlp_width=8192, num_heads=24, num_kv_heads=8, head_dim=128, vocab_size=128_256,
        context_length=131_072, rope_theta=500_000.0, rope_scaling=_LLAMA_32_ROPE, tied_embeddings=True,
    ),
    "mistral-7b-v0.3": LlamaConfig(
        num_layers=32, width=4096, mlp_width=14_336, num_heads=32, num_kv_heads=8, head_dim=128, vocab_size=32_768,
        context_length=32_768, rope_theta=1_000_000.0,
    ),
    "qwen2.5-7b": LlamaConfig(
        num_layers=28, width=3584, mlp_width=18_944, num_heads=28, num_kv_heads=4, head_dim=128, vocab_size=152_064,
        context_length=32_768, rope_theta=1_000_000.0, norm_eps=1e-6, qkv_bias=True,
    ),
}  # fmt: skip
