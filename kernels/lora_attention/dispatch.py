"""The one place that chooses an implementation.

Unasked, the first implementation of the platform that does not raise `NotImplementedError(reason)` runs. One that was
asked for by name runs or raises, and never falls back: what a test or a benchmark names is what it measures.
"""

import dataclasses
import importlib
from collections.abc import Callable

import jax


@dataclasses.dataclass(frozen=True)
class Implementation:
    """name: also that of its module in this folder, imported when first tried. platforms: tried there unasked."""

    name: str
    platforms: tuple[str, ...]

    def load(self) -> Callable:
        return importlib.import_module(f"{__package__}.{self.name}").lora_attention


# In order of preference.
IMPLEMENTATIONS = (
    Implementation("pallas_mosaic_gpu", platforms=("gpu",)),
    Implementation("pallas_triton", platforms=("gpu",)),
    Implementation("pallas_mosaic_tpu", platforms=("tpu",)),
    Implementation("xla", platforms=("cpu", "gpu", "tpu")),
    Implementation("reference", platforms=()),
)


def platforms_of(name: str | None) -> tuple[str, ...]:
    """Where implementation `name` is tried unasked; nowhere for None."""
    return next((known.platforms for known in IMPLEMENTATIONS if known.name == name), ())


def default_platform() -> str:
    """Where JAX puts work of which nobody said where it goes: "cpu", "gpu" or "tpu"."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue] (made at run time)
    return jax.default_backend() if device is None else getattr(device, "platform", device)


def dispatch(name: str | None, *args, implementations: tuple[Implementation, ...] = IMPLEMENTATIONS, **kwargs):
    """Runs implementation `name`, or, for None, the first that can; see `api.lora_attention` for the arguments.

    What ran can be read off the operations' names in jaxprs and compiled programs: they lie in the scope
    `lora_attention_<name>`.
    """
    if name is not None:
        known = {implementation.name: implementation for implementation in implementations}
        if name not in known:
            raise ValueError(f"no implementation of lora_attention is called {name!r}; there are: {', '.join(known)}")
        return run(known[name], args, kwargs)
    platform = default_platform()
    reasons = []
    for implementation in implementations:
        if platform in implementation.platforms:
            try:
                return run(implementation, args, kwargs)
            except NotImplementedError as reason:
                reasons.append(f"{implementation.name}: {reason}")
    raise NotImplementedError(
        f"no implementation of lora_attention fits on {platform}: {'; '.join(reasons) or 'none is registered for it'}"
    )


def run(implementation: Implementation, args: tuple, kwargs: dict):
    with jax.named_scope(f"lora_attention_{implementation.name}"):
        return implementation.load()(*args, **kwargs)
