"""Eviction by worth beside plain LRU: a skewed load on the prefix tree and the page pools alone, on a simulated clock.

No model runs. Requests come at `--rate` per second. Each begins with one of `--prefixes` common beginnings, their
popularity Zipf's (exponent `--skew`), and goes on in a conversation of its own that comes back `--turns` times, after
`--think` seconds on average; agents are as unequal. `--running` requests hold their pages at any time. A page that is
not found is computed: its FLOP are those of `--preset`, its seconds those FLOP at `--tflops`. Pools are fractions of
what the whole load would fill. Rules: least recently used; the engine's worth, whose clock runs in seconds; the same
with clocks 10 and 100 times as slow, to see what the time constant does. The last line of standard output is JSON.

    python scripts/bench_eviction.py --sharing base_lr --skew 1.0
"""

import argparse
import collections
import dataclasses
import heapq
import json
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from lragent_jax.adapter_use import AdapterUse
from lragent_jax.eviction import choose_victims, evict, recompute_flop, worth
from lragent_jax.models.config import LlamaConfig
from lragent_jax.page_pool import PagePool
from lragent_jax.page_run import PageRun
from lragent_jax.prefix_tree import Path, PrefixTree
from lragent_jax.sharing import AdapterKeys, PageKey, PoolName, Sharing

Rule = Callable[[float, int, float, float], float]

RULES: dict[str, Rule] = {
    "lru": lambda cost, visits, seconds, use: -seconds,
    "worth": worth,
    "worth, 10 s": lambda cost, visits, seconds, use: worth(cost, visits, seconds / 10, use),
    "worth, 100 s": lambda cost, visits, seconds, use: worth(cost, visits, seconds / 100, use),
}


@dataclasses.dataclass(frozen=True)
class Request:
    """At `time` an agent reads a context; one id stands for a whole page of tokens."""

    time: float
    agent: int
    ids: tuple[int, ...]


def requests_of(args: argparse.Namespace) -> list[Request]:
    """The load: the same for every rule and pool."""
    rng = np.random.default_rng(args.seed)
    prefix_shares, agent_shares = zipf(args.prefixes, args.skew), zipf(args.agents, args.skew)
    lengths = rng.integers(args.prefix_pages // 2, args.prefix_pages * 3 // 2 + 1, args.prefixes)
    new_id = iter(range(10**9)).__next__
    prefixes = [tuple(new_id() for _ in range(length)) for length in lengths]
    arrivals = np.cumsum(rng.exponential(args.turns / args.rate, args.requests // args.turns))
    coming = [(float(start), i, args.turns, prefixes[rng.choice(args.prefixes, p=prefix_shares)])
              for i, start in enumerate(arrivals)]  # fmt: skip
    heapq.heapify(coming)
    requests = []
    while coming:
        now, conversation, turns, ids = heapq.heappop(coming)
        ids += tuple(new_id() for _ in range(args.turn_pages))
        requests.append(Request(now, int(rng.choice(args.agents, p=agent_shares)), ids))
        if turns > 1:
            heapq.heappush(coming, (now + rng.exponential(args.think), conversation, turns - 1, ids))
    return requests


def zipf(count: int, skew: float) -> np.ndarray:
    """Shares of `count` items, the i-th in proportion to 1 / i^skew."""
    weights = np.arange(1, count + 1) ** -skew
    return weights / weights.sum()


class Replay:
    """A tree and pools of a size, and what they save."""

    def __init__(self, sharing: Sharing, agents: Sequence[AdapterKeys], num_pages: dict[PoolName, int], rule: Rule,
                 flop: Callable[[int], float], running: int):  # fmt: skip
        self.sharing, self.agents, self.rule, self.flop = sharing, agents, rule, flop
        self.now, self.running = 0.0, running
        self.pools: dict[PoolName, PagePool] = {name: PagePool(count) for name, count in num_pages.items()}
        self.tree, self.use = PrefixTree(1, lambda: self.now), AdapterUse()
        self.open: collections.deque[dict[PageKey, PageRun]] = collections.deque()
        self.num_pages = self.num_reused = 0
        self.recomputed_flop = self.evicting_s = 0.0

    def read(self, request: Request) -> None:
        """Reuses, makes room, computes the rest, and lets the request that has run longest end."""
        self.now = request.time
        adapter = self.agents[request.agent]
        own = self.sharing.low_rank_key(adapter)
        keys = [self.sharing.base_key(adapter), *([] if own is None else [own])]
        runs, path = {key: PageRun(self.pools[key.pool], 1) for key in keys}, Path()
        self.use.note([keys], self.running)
        self.tree.reuse(path, request.ids, runs)
        length = len(request.ids)
        missing = {
            index for run in runs.values() for start, stop in run.missing(length) for index in range(start, stop)
        }
        self.num_pages, self.num_reused = self.num_pages + length, self.num_reused + length - len(missing)
        self.recomputed_flop += sum(map(self.flop, missing))
        for key, run in runs.items():
            self._make_room(key.pool, sum(stop - start for start, stop in run.missing(length)))
            for start, stop in run.missing(length):
                run.prepare(start, stop)
                run.commit(start, stop, adapter.content)
        self.tree.visit(path, runs)
        self.tree.insert(path, request.ids, runs)
        self.open.append(runs)
        if len(self.open) >= self.running:
            for run in self.open.popleft().values():
                run.truncate(0)

    def _make_room(self, name: PoolName, count: int) -> None:
        pool = self.pools[name]
        if count <= pool.num_free:
            return
        started = time.perf_counter()
        need: dict[PoolName, tuple[PagePool, int]] = {name: (pool, count - pool.num_free)}
        victims, _ = choose_victims(self.tree, need, {}, self.flop, use=self.use.expected, rule=self.rule)
        evict(self.tree, victims)
        self.evicting_s += time.perf_counter() - started


def replay(requests: Sequence[Request], args: argparse.Namespace, rule: Rule, share: float) -> Replay:
    """The load through pools that hold `share` of what it would fill."""
    sharing, flop = Sharing(args.sharing), page_flop(args)
    agents = [AdapterKeys(f"adapter {i}", f"group {i % args.a_groups}") for i in range(args.agents)]
    needed: dict[PoolName, set] = {"base": set(), "low_rank": set()}
    for request in requests:
        for key in (sharing.base_key(agents[request.agent]), sharing.low_rank_key(agents[request.agent])):
            if key is not None:
                needed[key.pool] |= {(key, page) for page in request.ids}
    least = args.running * max(len(request.ids) for request in requests)
    sizes: dict[PoolName, int] = {name: max(int(share * len(pages)), least) for name, pages in needed.items()}
    one = Replay(sharing, agents, sizes, rule, flop, args.running)
    for request in requests:
        one.read(request)
    return one


def page_flop(args: argparse.Namespace) -> Callable[[int], float]:
    """FLOP to compute page i of a context."""
    config = LlamaConfig.preset(args.preset)
    return lambda index: recompute_flop(config, args.page_size, index)


def compare(args: argparse.Namespace) -> list[dict]:
    """Every rule at every pool size."""
    requests = requests_of(args)
    rows = []
    for share in (*args.pools, 1.0):
        for name, rule in RULES.items() if share < 1 else [("everything fits", RULES["lru"])]:
            one = replay(requests, args, rule, share)
            rows.append({
                "pool": share,
                "base_pages": one.pools["base"].num_pages,
                "rule": name,
                "hit_rate": one.num_reused / one.num_pages,
                "recomputed_pflop": one.recomputed_flop / 1e15,
                "recomputed_s": one.recomputed_flop / (args.tflops * 1e12),
                "evicting_s": one.evicting_s,
            })  # fmt: skip
    return rows


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sharing", default="base_lr", choices=["none", "full", "base", "base_lr"])
    parser.add_argument("--preset", default="llama-3.1-8b", help="the model whose FLOP count")
    parser.add_argument("--tflops", type=float, default=400.0, help="sustained, to turn FLOP into seconds")
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--rate", type=float, default=4.0, help="requests per second")
    parser.add_argument("--turns", type=int, default=4, help="of each conversation")
    parser.add_argument("--think", type=float, default=20.0, help="seconds between two of them, on average")
    parser.add_argument("--prefixes", type=int, default=40)
    parser.add_argument("--prefix-pages", type=int, default=16, help="on average; from half to one and a half of it")
    parser.add_argument("--turn-pages", type=int, default=3, help="what a turn adds")
    parser.add_argument("--skew", type=float, default=1.0, help="Zipf's exponent, of beginnings and of agents")
    parser.add_argument("--agents", type=int, default=4)
    parser.add_argument("--a-groups", type=int, default=2)
    parser.add_argument("--running", type=int, default=4, help="requests that hold pages at a time")
    parser.add_argument(
        "--pools", type=float, nargs="+", default=[0.1, 0.2, 0.4], help="shares of what would be filled"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    rows = compare(args)
    table = Table(title=f"{args.sharing}, {args.requests} requests, {args.rate:g} per second, skew {args.skew:g}")
    for title in ("pool", "pages", "rule", "hits", "PFLOP", "seconds", "choosing"):
        table.add_column(title, justify="left" if title == "rule" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row['pool']:.0%}", str(row["base_pages"]), row["rule"], f"{row['hit_rate']:.3f}",
            f"{row['recomputed_pflop']:.2f}", f"{row['recomputed_s']:.2f}", f"{row['evicting_s']:.2f}",
        )  # fmt: skip
    Console(stderr=True).print(table)
    print(json.dumps({"benchmark": "eviction", "load": vars(args), "rows": rows}))


if __name__ == "__main__":
    sys.exit(main())
