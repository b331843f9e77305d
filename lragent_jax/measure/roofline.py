"""The least time that a ReAct trace can take: bytes and FLOP of its calls over what a chip can do, or was seen to do.

Counted: weights once per chunk and per decode step; base and low-rank pages once per query tile and per decode step;
products of the linear maps, of attention, and of probabilities with low-rank values, in all layers for all tokens: what
the engine leaves out of a long chunk's last layer counts as if it were done. Not counted: collectives, B, and
whatever does not overlap. Under tensor parallelism everything is divided by the devices, low-rank pages apart.
"""

import dataclasses

from lragent_jax.measure.react_trace import Call, react_trace
from lragent_jax.measure.tpu_chips import Chip
from lragent_jax.models.config import LlamaConfig

MODES = ("none", "base_lr", "full")


def prefilled(calls: list[Call], mode: str) -> list[tuple[int, int]]:
    """(tokens, context) that each call prefills and ends prefill with. Under `none` an agent reads what it has not."""
    length, read, spans = 0, {}, []
    for agent, new, decoded in calls:
        start = read.get(agent, 0) if mode == "none" else length
        length += new
        spans.append((length - start, length))
        length += decoded
        read[agent] = length
    return spans


@dataclasses.dataclass(frozen=True)
class Roofline:
    """One model on `devices` devices, with low-rank values of rank r (0 in the merged modes)."""

    chip: Chip
    devices: int
    config: LlamaConfig
    rank: int
    block_q: int = 256
    chunk: int = 1024
    itemsize: int = 2

    def weight_bytes(self) -> float:
        """What one device reads of the weights in a step: of the embedding, rows only."""
        c = self.config
        linear = c.num_layers * sum(a * b for a, b in c.projection_shapes().values())
        return (linear + c.vocab_size * c.width) * self.itemsize / self.devices

    def page_bytes(self, context: float) -> float:
        """What one device reads of the caches, once through `context` tokens."""
        base = self.config.base_cache_bytes_per_token(self.itemsize) / self.devices
        return context * (base + self.config.low_rank_cache_bytes_per_token(self.rank, self.itemsize))

    def flop(self, tokens: float, mean_context: float) -> float:
        """Of one device."""
        c = self.config
        linear = 2 * c.num_layers * sum(a * b for a, b in c.projection_shapes().values())
        attention = 2 * c.num_layers * c.num_heads * mean_context * (2 * c.head_dim + self.rank)
        return tokens * (linear + attention) / self.devices

    def seconds(self, num_bytes: float, flop: float) -> float:
        return max(num_bytes / self.chip.hbm_per_s, flop / self.chip.flop_per_s)

    def prefill_s(self, tokens: int, context: int) -> float:
        """Chunk by chunk, `tokens` up to `context`."""
        total, done = 0.0, context - tokens
        while done < context:
            now = min(self.chunk, context - done)
            mean = done + now / 2
            tiles = -(-now // self.block_q)
            total += self.seconds(self.weight_bytes() + tiles * self.page_bytes(mean), self.flop(now, mean))
            done += now
        return total

    def decode_s(self, context: float) -> float:
        return self.seconds(self.weight_bytes() + self.page_bytes(context), self.flop(1, context))


def predict(roofline: Roofline, mode: str, chunk: int) -> dict[str, float]:
    """Time to first token summed over the trace's calls, milliseconds per decoded token, and tokens per second."""
    calls = react_trace(chunk)
    if mode not in ("base_lr", "pre_lr"):
        roofline = dataclasses.replace(roofline, rank=0)
    spans = prefilled(calls, mode)
    ttft = sum(roofline.prefill_s(tokens, context) for tokens, context in spans)
    decoded = sum(count for _, _, count in calls)
    decoding = sum(
        count * roofline.decode_s(context + count / 2) for (_, context), (_, _, count) in zip(spans, calls, strict=True)
    )
    total = sum(new + count for _, new, count in calls)
    return {
        "prefilled_tokens": sum(tokens for tokens, _ in spans),
        "ttft_s": ttft,
        "decode_ms_per_token": 1e3 * decoding / decoded,
        "tokens_per_s": total / (ttft + decoding),
    }
