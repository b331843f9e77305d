"""scripts/bench_eviction.py at toy sizes: hits are those of a dictionary, and the rules differ where they should."""

import json

import pytest
from script_modules import load_script

from lragent_jax.sharing import AdapterKeys, Sharing

bench = load_script("bench_eviction")
TOY = [
    "--preset",
    "tiny",
    "--requests",
    "24",
    "--prefixes",
    "4",
    "--prefix-pages",
    "4",
    "--running",
    "2",
    "--pools",
    "0.3",
]


@pytest.mark.parametrize("sharing", ["none", "base_lr"])
def test_where_everything_fits_every_page_is_computed_once(sharing):
    args = bench.parse([*TOY, "--sharing", sharing])
    requests, rules = bench.requests_of(args), Sharing(sharing)
    one = bench.replay(requests, args, bench.RULES["worth"], share=1.0)
    seen, num_reused = set(), 0
    for request in requests:
        adapter = AdapterKeys(f"adapter {request.agent}", f"group {request.agent % 2}")
        keys = [key for key in (rules.base_key(adapter), rules.low_rank_key(adapter)) if key is not None]
        num_reused += sum(all((key, page) in seen for key in keys) for page in request.ids)
        seen |= {(key, page) for key in keys for page in request.ids}
    assert one.num_reused == num_reused > 0


def test_smaller_pools_hit_less_and_the_last_line_is_json(capsys):
    bench.main(TOY)
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["rule"] for row in rows] == [*bench.RULES, "everything fits"]
    for row in rows[:-1]:
        assert 0 < row["hit_rate"] < rows[-1]["hit_rate"]
        assert row["recomputed_pflop"] > rows[-1]["recomputed_pflop"]


def test_worth_keeps_what_many_come_back_to_and_lru_what_came_last():
    again, number = (1, 2), iter(range(10, 1000))
    requests = []
    for i in range(80):
        ids = again if i < 3 or i % 8 == 0 else (next(number), next(number))
        requests.append(bench.Request(time=0.01 * i, agent=0, ids=ids))
    hits = {}
    for rule in ("lru", "worth"):
        one = bench.Replay(Sharing("full"), [AdapterKeys("a", "a")], {"base": 10}, bench.RULES[rule], lambda i: 1.0, 2)
        for request in requests:
            one.read(request)
        hits[rule] = one.num_reused
    assert hits == {"lru": 4, "worth": 22}
