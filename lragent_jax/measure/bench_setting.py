"""What every regime of a benchmark needs to know."""

import dataclasses
import sys

from lragent_jax.measure.page_budget import PageBudget, step_weight_bytes
from lragent_jax.measure.timing import DeviceSpeed
from lragent_jax.models.config import LlamaConfig


def say(text: str) -> None:
    """What goes on, on standard error: the results have standard output to themselves."""
    print(text, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class BenchSetting:
    """`steps`: tokens of a decode block, decoded without a look of the host at them. `repeats`: runs that count.

    `device_bytes`: what the device may hold; None where nobody knows.
    """

    config: LlamaConfig
    rank: int
    dtype: str
    itemsize: int
    page_size: int
    repeats: int
    steps: int
    speed: DeviceSpeed
    device_bytes: int | None
    profile: bool = False
    implementation: str | None = None

    @property
    def budget(self) -> PageBudget:
        return PageBudget(self.config, self.rank, self.itemsize, self.page_size)

    def step_floor_ms(self, weight_bytes: int, num_tokens: float) -> float:
        """Of a decode step that reads all weights and so many different tokens of the caches."""
        num_bytes = step_weight_bytes(self.config, weight_bytes, self.itemsize) + self.budget.step_bytes(num_tokens)
        return 1e3 * num_bytes / self.speed.bytes_per_s

    def engine_options(self) -> dict:
        return {"page_size": self.page_size, "decode_block": self.steps, "implementation": self.implementation}
