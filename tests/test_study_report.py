"""Statistics against their definitions, and the report from results that are written by hand."""

import importlib.util
import math
import random

import pytest

from lragent_jax.react import ROLES
from lragent_jax.study.grid import Grid
from lragent_jax.study.report import write_report
from lragent_jax.study.results import Results
from lragent_jax.study.statistics import Z, paired_difference, share
from lragent_jax.study.tables import markdown


@pytest.mark.parametrize(("right", "number"), [(0, 10), (3, 10), (10, 10), (431, 500)])
def test_wilsons_ends_are_where_the_observed_share_is_just_credible(right, number):
    found = share("1" * right + "0" * (number - right))
    assert found.value == right / number
    for end in (found.low, found.high):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(found.value - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / number))
    assert found.low <= found.value <= found.high


def test_paired_differences_count_only_what_changed():
    found = paired_difference("1101", "1011")
    assert found.value == 0
    assert found.low == -found.high
    assert paired_difference("1" * 60 + "0" * 40, "0" * 30 + "1" * 30 + "0" * 40).low > 0.15
    same = paired_difference("10" * 100, "10" * 100)
    assert same.value == 0
    assert 0 < same.high < 0.02, "no change seen is not no change"
    better, worse = paired_difference("111", "100"), paired_difference("100", "111")
    assert (better.value, better.low, better.high) == (-worse.value, -worse.high, -worse.low)
    with pytest.raises(ValueError, match="not of the same questions"):
        paired_difference("1", "11")


def test_intervals_of_paired_differences_hold_the_truth():
    """Among 2000 draws of 100 pairs some 95 % do; fewer than 93 would be a wrong formula."""
    rng, held = random.Random(0), 0
    for _ in range(2000):
        pairs = rng.choices(["11", "10", "01", "00"], [0.6, 0.06, 0.14, 0.2], k=100)
        found = paired_difference("".join(p[0] for p in pairs), "".join(p[1] for p in pairs))
        held += found.low <= -0.08 <= found.high
    assert held > 1860


def cell(kind, mode, right, hops: int | None = 1, tokens=1000, **changes):
    number = len(right)
    counts = {
        name: dict.fromkeys(ROLES, number) for name in ("outputs", "bad_outputs", "prefilled_tokens", "cached_tokens")
    }
    fixed = {"seed": 0, "verdict_right": right, "ends": {"finished": number}, "failures": [], "final_tokens": 0}
    place = {"kind": kind, "mode": mode, "tokens": tokens, "hops": hops, "number": number, "right": right}
    return place | fixed | counts | changes


def kind_of(positions, top1_agreement, kl):
    return {"positions": positions, "top1_agreement": top1_agreement, "kl": kl, "nll": 0.0}


@pytest.fixture
def results(tmp_path):
    results = Results(tmp_path / "r.json")
    results.use_settings({"model": "toy.gguf", "dtype": "float32", "scale": "full", "seed": 0})
    ranks = {role: {"v": 8} for role in ROLES}
    for name, reference in (("shared_a", "shared_a"), ("apart", "apart"), ("apart_stacked", "apart")):
        identity = {"adapters": dict.fromkeys(ROLES, name), "ranks": ranks, "num_groups": 1, "reference": reference}
        results.use_agents(name, identity)
    cells = [
        *(cell("shared_a", "none", right, hops) for hops, right in ((1, "1111"), (2, "1110"), (3, "1100"))),
        *(cell("shared_a", "full", right, hops) for hops, right in ((1, "1110"), (2, "1110"), (3, "0000"))),
        cell("shared_a", "none", "1", 1),  # fewer questions than another cell of its place
        *(cell("shared_a", "none", "1111", hops, tokens=2000) for hops in (1, 2, 3)),
        cell("shared_a", "none", "1111", 1, tokens=4000),
        cell("apart", "none", "110110", None),
        cell("apart_stacked", "base_lr", "100110", None),
        cell("apart_stacked", "rebase", "1001", None),
    ]
    results.add("episodes", {str(i): one for i, one in enumerate(cells)})
    block = {
        "kind": "shared_a",
        "tokens": 1000,
        "outputs": 1,
        "num_tokens": 1,
        "prefilled_tokens": 100,
        "cached_tokens": 0,
    }
    results.add("kl", {
        "a": block | {"mode": "none", "number": 3, "positions": 10, "kl": 0.0, "top1_agreement": 1.0, "nll": 1.0},
        "b": block | {"mode": "full", "number": 2, "positions": 10, "kl": 1.0, "top1_agreement": 0.5, "nll": 2.0}
        | {"by_kind": {"thought": kind_of(10, 0.5, 1.0)}},
        "c": block | {"mode": "full", "number": 1, "positions": 30, "kl": 3.0, "top1_agreement": 0.9, "nll": 4.0}
        | {"by_kind": {"thought": kind_of(20, 0.8, 4.0), "argument": kind_of(10, 0.25, 0.5)}},
    })  # fmt: skip
    layers = {"base": [1.0, 0.5], "low_rank": [0.9, 0.8], "adapter": [0.1, -0.1]}
    results.add("similarity", {"a": {"kind": "shared_a", "tokens": 1000, "number": 8, "mode": None} | layers})
    drift = {"kind": "shared_a", "tokens": 1000, "number": 8, "layers": [1], "drift": [1e-3, 2e-2]}
    results.add("sensitivity", {"shared_a": drift})
    return results


def test_groups_pair_the_same_questions(results):
    grid = Grid(results)
    none, full = grid.group("shared_a", "none", 1000), grid.group("shared_a", "full", 1000)
    assert none is not None
    assert full is not None
    assert none.number == 12
    accuracy = none.accuracy()
    assert accuracy is not None
    assert accuracy.value == 9 / 12
    difference = full.difference(none)
    assert difference is not None
    assert difference.value == -3 / 12
    stacked = grid.group("apart_stacked", "base_lr", 1000)
    assert stacked is not None
    reference = grid.reference("apart_stacked", 1000)
    assert reference is grid.group("apart", "none", 1000)
    assert reference is not None
    difference = stacked.difference(reference)
    assert difference is not None
    assert difference.value == -1 / 6
    fewer = grid.group("apart_stacked", "rebase", 1000)
    assert fewer is not None
    assert fewer.difference(reference) is None, "other questions"
    by_hops = [stacked.of_hops(hops) for hops in (1, 2, 3)]
    assert [estimate and estimate.value for estimate in by_hops] == [1.0, 0.5, 0.0]
    long = grid.group("shared_a", "none", 4000)
    assert long is not None
    assert long.of_hops(2) is None
    assert long.accuracy() is None, "of one hop alone"
    assert grid.lengths("shared_a") == [1000, 2000, 4000]
    assert grid.complete_lengths("shared_a") == [1000, 2000]


def test_the_page_has_every_table_and_its_means_are_weighted(results):
    page = markdown(results)
    assert "| `full` | 75.0 (30.1 to 95.4) | 75.0 (30.1 to 95.4) | 0.0 (0.0 to 49.0) | 50.0 " in page
    assert "-25.0 (" in page
    assert "| `full` | 3 | 40 | 2.50e+00 | 80.00 % | 3.5000 | 67 |" in page
    assert "| `full` | 70.0 %, 3.0e+00 |  | 25.0 %, 5.0e-01 |  |" in page
    assert "## By length: shared_a" in page
    assert "| sharing | 1,000 tokens | 2,000 tokens |" in page, "a length that nobody has finished has no column"
    assert "\n* apart: " in page
    assert "joint is the test" not in page
    assert "train --kind shared_a --out runs/shared_a" in page, "how to make them again"
    assert "| `full` | 50.0 (25.4 to 74.6) |  |" in page
    assert page.rstrip().splitlines()[-1] in page.split("## Limits")[1]
    assert "0.7500 (0.5000 to 1.0000)" in page
    assert "| shared_a | 8 | 1 | 2.00e-02 |" in page
    for line in page.splitlines():
        assert "None" not in line
        assert "nan" not in line


def test_results_without_cells_are_a_page_too(tmp_path):
    [page, *plots] = write_report(Results(tmp_path / "none.json"), tmp_path)
    assert plots == []
    assert page.read_text().startswith("# What sharing costs in accuracy\n")
    assert "lragent train" not in page.read_text()


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="draws with matplotlib")
def test_plots_are_written_and_shown(results, tmp_path):
    page, *plots = write_report(results, tmp_path / "docs")
    names = ["length-shared_a", "hops-shared_a", "hops-apart", "hops-apart_stacked", "similarity", "sensitivity"]
    assert [plot.name for plot in plots] == [f"accuracy-{name}.png" for name in names]
    for plot in plots:
        assert plot.stat().st_size > 5000
        assert f"({plot.name})" in page.read_text()


def test_a_training_that_was_repeated_stands_beside_the_first_and_is_not_drawn(results):
    identity = {"adapters": dict.fromkeys(ROLES, "other"), "ranks": {}, "num_groups": 1}
    assert "Trained twice" not in markdown(results)
    for kind, reference in (("apart_again", "apart_again"), ("apart_again_stacked", "apart_again")):
        results.use_agents(kind, identity | {"reference": reference})
    again = [
        cell("apart_again", "none", "111111", None),
        cell("apart_again", "full", "000000", None),
        cell("apart_again_stacked", "base_lr", "111110", None),
        cell("apart_again", "none", "111111", None, tokens=4000),
    ]
    results.add("episodes", {f"again {i}": one for i, one in enumerate(again)})
    page = markdown(results)
    compared = page.split("## Trained twice: ")[1:]
    assert [part.split("\n")[0] for part in compared] == ["apart", "apart_stacked"]
    header, _, *rows = [line for line in compared[0].split("## ")[0].splitlines() if line.startswith("|")]
    assert header == "| sharing | 1,000 tokens | 1,000 tokens, again |", "the first was not measured at 4,000"
    assert [row.split(" (")[0] for row in rows] == ["| `none` | 66.7"], "nor under full"
    assert "| 100.0 (61.0 to 100.0) |" in rows[0]
    assert "| `base_lr` | 50.0 (" in compared[1]
    assert "\n* apart_again: " in page
    assert "apart_again" not in Grid(results).first_kinds
    assert "## Free episodes: apart_again_stacked" in page
