"""What every sharing mode means, token by token in float64 NumPy: no pages, no chunks, no batches.

Written from the design's table alone, to be compared with the engine. A token is run by an agent, sees what is cached
under the agent's keys, and writes what is missing.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from lragent_jax.models.adapter import Adapter
from lragent_jax.models.config import LlamaConfig


def host_params(params) -> dict:
    """The model's weights as nested dictionaries of float64."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(params))


@dataclasses.dataclass
class Context:
    """A trajectory: its ids, and per cache key what is stored at which position."""

    ids: list[int] = dataclasses.field(default_factory=list)
    store: dict[Any, dict[int, list]] = dataclasses.field(default_factory=dict)

    def fork(self) -> "Context":
        return Context(list(self.ids), {key: dict(slots) for key, slots in self.store.items()})

    def rollback(self, length: int) -> None:
        del self.ids[length:]
        for slots in self.store.values():
            for position in [p for p in slots if p >= length]:
                del slots[position]


class DenseOracle:
    """One model and its agents under one sharing mode. Agents of one `group` have equal A for k and v.

    `own_layers`: those whose K and V `droidspeak` keeps per agent.
    """

    def __init__(
        self, config: LlamaConfig, params: dict, agents: dict[str, Adapter], groups: dict[str, str], mode: str,
        own_layers: tuple[int, ...] = (0,),
    ):  # fmt: skip
        self.config, self.params, self.agents, self.groups, self.mode = config, params, agents, groups, mode
        self.own_layers = own_layers if mode == "droidspeak" else ()
        self.group_members = {group: name for name, group in groups.items()}

    def logits(self, context: Context, agent: str | None) -> tuple[np.ndarray, int]:
        """What comes next, and how many tokens had to be run for it."""
        required = {self._base_key(agent, i) for i in range(self.config.num_layers)} | {self._own_key(agent)} - {None}
        last = len(context.ids) - 1
        missing = [p for p in range(last + 1) if any(p not in context.store.setdefault(key, {}) for key in required)]
        if self.mode == "rebase":  # the base model reads what is new, and the agent reads the last token
            for position in missing:
                self._run(context, position, None)
            counted_twice = agent is None and missing[-1:] == [last]
            return self._run(context, last, agent, writes=agent is None), len(missing) + (not counted_twice)
        to_run = missing if missing[-1:] == [last] else [*missing, last]
        results = [self._run(context, position, agent) for position in to_run]
        return results[-1], len(to_run)

    def output(self, context: Context, ids: list[int], agent: str | None) -> tuple[np.ndarray, int]:
        """Logits in front of every token of an output that joins; its last token is not run."""
        rows, prefilled = [], None
        for token in ids:
            row, count = self.logits(context, agent)
            prefilled = count if prefilled is None else prefilled
            rows.append(row)
            context.ids.append(token)
        return np.stack(rows), prefilled or 0

    def forget(self, context: Context, agent: str) -> None:
        """Drops what nobody can read once `agent` is unloaded."""
        kept = {self._own_key(other) for other in self.agents if other != agent}
        for key in {self._own_key(agent), ("own", agent), *([("base", agent)] if self.mode == "none" else [])} - kept:
            context.store.pop(key, None)

    # The modes.

    def _base_key(self, agent, layer):
        if self.mode == "droidspeak":
            return ("own", agent) if layer in self.own_layers else ("base", "all")
        return ("base", agent if self.mode == "none" else "all")

    def _own_key(self, agent):
        if self.mode in ("none", "full", "droidspeak") or agent is None:
            return None
        return ("low_rank", agent if self.mode == "base" else self.groups[agent])

    def _written_keys(self, agent):
        every_group = [("low_rank", group) for group in self.group_members]
        if self.mode in ("pre_lr", "rebase") or (self.mode == "base_lr" and agent is None):
            return every_group
        own = self._own_key(agent)
        return [] if own is None else [own]

    # The model.

    def _run(self, context: Context, position: int, agent: str | None, writes: bool = True) -> np.ndarray:
        p, config = self.params, self.config
        x = p["embed"][context.ids[position]]
        own_key = self._own_key(agent)
        merged = self.mode in ("none", "full", "droidspeak")
        base_keys = [self._base_key(agent, i) for i in range(config.num_layers)]
        writes_base = {key for key in base_keys if writes and position not in context.store.setdefault(key, {})}
        for key in writes_base:
            context.store[key][position] = [None] * config.num_layers
        new_low_rank = [
            k for k in self._written_keys(agent) if writes and position not in context.store.setdefault(k, {})
        ]
        for key in new_low_rank:
            context.store[key][position] = [None] * config.num_layers
        for i in range(config.num_layers):
            layer = p["layers"][i]
            h = self._norm(x, layer["attention_norm"])
            q = self._rope(self._heads(self._linear(layer, i, agent, "q", h)), position)
            if base_keys[i] in writes_base:
                writer = agent if merged else None
                k = self._rope(self._heads(self._linear(layer, i, writer, "k", h)), position)
                v = self._heads(self._linear(layer, i, writer, "v", h))
                context.store[base_keys[i]][position][i] = (k, v)
            for key in new_low_rank:
                member = key[1] if self.mode == "base" else self.group_members[key[1]]
                context.store[key][position][i] = {t: self._shrink(member, i, t, h) for t in ("k", "v")}
            x = x + self._attend(context, position, i, layer, agent, q, base_keys[i], own_key)
            h = self._norm(x, layer["mlp_norm"])
            gate, up = (self._linear(layer, i, agent, name, h) for name in ("gate", "up"))
            x = x + self._linear(layer, i, agent, "down", gate / (1 + np.exp(-gate)) * up)
        return self._norm(x, p["norm"]) @ (p["unembed"] if "unembed" in p else p["embed"].T)

    def _attend(self, context, position, i, layer, agent, q, base_key, own_key):
        config = self.config
        keys, values = [], []
        for s in range(position + 1):
            k, v = context.store[base_key][s][i]
            if own_key:
                low_rank = context.store[own_key][s][i]
                k = k + self._rope(self._heads(self._expand(agent, i, "k", low_rank["k"])), s)
                v = v + self._heads(self._expand(agent, i, "v", low_rank["v"]))
            keys.append(k)
            values.append(v)
        keys, values = np.stack(keys), np.stack(values)  # S K H
        group = config.num_heads // config.num_kv_heads
        heads = []
        for n in range(config.num_heads):
            scores = keys[:, n // group] @ q[n] / np.sqrt(config.head_dim)
            probs = np.exp(scores - scores.max())
            heads.append(probs / probs.sum() @ values[:, n // group])
        return self._linear(layer, i, agent, "o", np.concatenate(heads))

    def _linear(self, layer, i, agent, target, x):
        weights = layer["attention" if target in "qkvo" else "mlp"][target]
        y = x @ weights["kernel"] + weights.get("bias", 0)
        return y + self._expand(agent, i, target, self._shrink(agent, i, target, x))

    def _shrink(self, agent, i, target, x):
        pair = self.agents[agent].weights.get((i, target)) if agent else None
        return None if pair is None else x @ pair.lora_a.astype(np.float64)

    def _expand(self, agent, i, target, low_rank):
        return 0.0 if low_rank is None else low_rank @ self.agents[agent].weights[i, target].lora_b.astype(np.float64)

    def _norm(self, x, norm):
        return x / np.sqrt(np.mean(x * x) + self.config.norm_eps) * norm["scale"]

    def _heads(self, x):
        return x if np.isscalar(x) else x.reshape(-1, self.config.head_dim)

    def _rope(self, x, position):
        if np.isscalar(x):
            return x
        half = self.config.head_dim // 2
        angles = position * self.config.rope_theta ** (-np.arange(half) / half)
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([x[:, :half] * cos - x[:, half:] * sin, x[:, half:] * cos + x[:, :half] * sin], axis=1)
