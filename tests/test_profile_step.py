"""scripts/profile_step.py at toy sizes: the other ways compute what the layer computes, and every figure is there."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest
from script_modules import load_script
from tolerances import assert_close

from lragent_jax.measure.timing import DeviceSpeed
from lragent_jax.models.config import LlamaConfig

profile_step = load_script("profile_step")
TINY = LlamaConfig.preset("tiny")
SETTING = profile_step.Pass(TINY, B=3, T=2, S=24, r=4, p=8, dtype="float32", implementation=None, cycled_bytes=1e4)


def weights() -> tuple[tuple, tuple, tuple]:
    """One layer's q, k, v, A and B: apart, in one matrix, and which adapter each row runs."""
    random = profile_step.Random("float32")
    D, r = TINY.width, SETTING.r
    q, k, v = (random(*TINY.projection_shapes()[name]) for name in ("q", "k", "v"))
    a_q, a_v, b_q = random(1, D, r), random(1, D, r), random(4, r, q.shape[1])
    joined = jnp.concatenate([q, k, v, a_q[0], a_v[0]], axis=1)
    return (q, k, v, a_q, b_q, a_v), (joined, b_q), (jnp.zeros(4, jnp.int32), jnp.array([1, 3, 2], jnp.int32))


@pytest.mark.parametrize("expand", ["gathered_expand", "masked_expand"])
def test_one_matrix_is_the_same_projection(expand):
    apart, together, shared = weights()
    x = profile_step.Random("float32")(3, 2, TINY.width, scale=1.0)
    want = profile_step.separate_projections(x, apart, shared)
    got = profile_step.joined_projections(x, together, shared, getattr(profile_step, expand))
    # Beyond the corner, which holds different others.
    assert_close(got[..., SETTING.r :], want[..., SETTING.r :], "attention")


def test_what_nobody_reads_is_computed_all_the_same():
    """XLA would drop k and v, and a benchmark of them measure nothing."""
    apart, _, shared = weights()
    x = jax.ShapeDtypeStruct((3, 2, TINY.width), jnp.float32)
    compiled = jax.jit(profile_step.separate_projections).lower(x, apart, shared).compile()
    analysis = compiled.cost_analysis()
    assert analysis is not None
    shapes = [TINY.projection_shapes()[name] for name in ("q", "k", "v")]
    assert analysis["flops"] >= 2 * 6 * sum(i * o for i, o in shapes)


def test_floors_of_a_product():
    num_bytes, flop = profile_step.matmul_cost(SETTING, 6, (10, 20), (20, 5))
    assert num_bytes == 4 * (200 + 100 + 6 * (30 + 25))
    assert flop == 2 * 6 * 300


def test_the_first_row_writes_and_all_read_its_pages():
    table = profile_step.table_of(SETTING, 8)
    assert (table.base == table.base[0]).all()
    assert len(set(table.base[0].tolist())) == 3
    assert table.base_write_from[0] == 0
    assert (table.base_write_from[1:] > 2**20).all()


def test_the_last_line_is_json_with_every_operation(monkeypatch, capsys):
    monkeypatch.setattr(profile_step, "measure_device", lambda: DeviceSpeed(1e10, 1e11))
    monkeypatch.setattr(profile_step, "CALLS", 1)
    toy = "--preset tiny --layers 1 --batch 2 --context 16 --chunk 0 --page-size 8 --rank 4 --dtype float32"
    monkeypatch.setattr(sys, "argv", ["profile_step.py", *toy.split(), "--cycle", "1e3", "--chain", "1e-6"])
    profile_step.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    [decode] = report["passes"]
    assert [row["name"].split(":")[0] for row in decode["operations"]] == [
        "norms", "o projection", "MLP", "lm head", "q, k, v, adapters", "rope and page writes", "attention",
    ]  # fmt: skip
    assert len(decode["other_ways"]) == 5
    assert all(row["us"] > 0 and row["floor_us"] > 0 for row in (*decode["operations"], *decode["other_ways"]))
    assert decode["whole_ms"] > 0
