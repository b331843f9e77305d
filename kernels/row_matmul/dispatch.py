"""The one place that chooses an implementation of `row_matmul`: unasked, the first of the platform that fits."""

import importlib
from types import ModuleType

import jax
from jaxtyping import Array

from lragent_jax.kernels.lora_attention.dispatch import default_platform
from lragent_jax.kernels.row_matmul.arguments import Described, Norm, Shrink

# In order of preference, and where they are tried unasked.
IMPLEMENTATIONS = {"pallas_mosaic_gpu": ("gpu",), "xla": ("cpu", "gpu", "tpu")}

# For how many rows models take another implementation than XLA's; 0: for none. Measured on an H100 at the shapes of
# Llama-3.1-8B, a layer's four products of one row take 160.9 µs by the kernel and 171.5 µs by XLA; those of eight rows
# 167.2 and 168.3, of sixteen 169.1 and 176.7. What a step of several rows gains, adapters and all, was not measured;
# eight tokens' prefill gained nothing. `scripts/profile_step.py` times both: "products of a decode step".
MOST_ROWS_BY_DEFAULT = 1
# How many devices a model may be cut for. A block of the kernel makes 64 columns: those of an eighth of q, k and v fill
# a tenth of an H100. Two H200 took as long with XLA's products while all-reduces cut a step into pieces; since then the
# two were not compared, and nothing was measured beyond two.
MOST_SHARDS_BY_DEFAULT = 2
# Whether models may take it where a residual is added, too.
RESIDUAL_BY_DEFAULT = True


def load(name: str) -> ModuleType:
    """Imported when first tried."""
    return importlib.import_module(f"{__package__}.{name}")


def choose(
    name: str | None, x: Array, weights: tuple[Described, ...], norm: Norm | None, shrinks: tuple[Shrink, ...] = ()
) -> str:
    """The name of the implementation that runs. One that was asked for runs or raises, and never falls back.

    Shapes and dtypes are all that is looked at.

    Raises:
      ValueError: there is none of that name.
      NotImplementedError: the one that was asked for does not fit (its reason).
    """
    if name is not None:
        if name not in IMPLEMENTATIONS:
            raise ValueError(
                f"no implementation of row_matmul is called {name!r}; there are: {', '.join(IMPLEMENTATIONS)}"
            )
        load(name).refuse(x, weights, norm, shrinks)
        return name
    platform = default_platform()
    for candidate, platforms in IMPLEMENTATIONS.items():
        if platform in platforms:
            try:
                load(candidate).refuse(x, weights, norm, shrinks)
            except NotImplementedError:
                continue
            return candidate
    raise NotImplementedError(f"no implementation of row_matmul is registered for {platform}")


def run(name: str, *args, **kwargs) -> tuple[Array, ...]:
    with jax.named_scope(f"row_matmul_{name}"):
        return load(name).row_matmul(*args, **kwargs)
