"""TPU generations by their vendor's figures, per device as JAX counts them (a TPU7x chip is two), and slices."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """name: libtpu's. Memory in bytes, bandwidth in bytes and bf16 products in FLOP per second."""

    name: str
    hbm: int
    hbm_per_s: float
    flop_per_s: float


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 16 * GIB, 819e9, 197e12),
        Chip("v5p", 95 * GIB, 2765e9, 459e12),
        Chip("v6e", 32 * GIB, 1640e9, 918e12),
        Chip("tpu7x", 96 * GIB, 3690e9, 1153.5e12),
    )
}

# What the programs are compiled for: (chips of the slice, devices that share one model). The smallest model is that of
# notebooks/tpu.ipynb; Llama-3.1-70B has 8 kv heads, and a v5e too little memory for an eighth of it.
SLICES = {
    "llama-3.2-1b": {"v5e": ("1x1", 1)},
    "llama-3.1-8b": {"v5e": ("2x4", 8), "v5p": ("1x1x1", 1), "v6e": ("2x2", 4), "tpu7x": ("1x1x1", 2)},
    "llama-3.1-70b": {"v5p": ("2x2x1", 4), "v6e": ("2x4", 8), "tpu7x": ("2x2x1", 8)},
}
