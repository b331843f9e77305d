"""An engine over a mesh: the same tokens as on one device, and adapters that add no collective."""

import os
import subprocess
import sys
from pathlib import Path

ON_EIGHT_DEVICES = """
import dataclasses

import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P

from lragent_jax.engine import Engine
from lragent_jax.measure.tpu_programs import Workload, model_mesh
from lragent_jax.measure.tpu_report import collectives
from lragent_jax.models.adapter import random_adapter
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.llama import random_params
from lragent_jax.models.sharding import param_shardings

config = LlamaConfig(num_layers=1, width=64, mlp_width=128, num_heads=16, num_kv_heads=8, head_dim=8, vocab_size=128,
                     context_length=512)
graphdef, params = random_params(config, jnp.float32)
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
adapters = {agent: random_adapter(config, rank=8, targets=TARGETS, seed=i, shared_a_seed=9)
            for i, agent in enumerate(("plan", "action"))}

def run(params):
    engine = Engine(config, graphdef, params, adapters, sharing="base_lr", page_size=16, num_pages=32, decode_block=4)
    trajectory = engine.trajectory().append(list(range(5, 45)))
    for agent in ("plan", "action"):
        engine.generate(trajectory, agent, max_new_tokens=5, ignore_eos=True)
    ids = trajectory.token_ids
    return engine, ids, np.asarray(engine.next_token_logits(trajectory, "action"))

assert len(jax.devices()) == 8
mesh = model_mesh(jax.devices())
_, want_ids, want = run(params)
with jax.set_mesh(mesh):
    engine, ids, logits = run(jax.device_put(params, param_shardings(config, params, mesh)))
assert ids == want_ids
np.testing.assert_allclose(logits, want, atol=1e-5)
pools = engine._cache.arrays
assert all(pool.sharding.spec == P(None, "model") for pool in pools.base.kv)
assert len(jax.tree.leaves(pools.low_rank)) == 2 * config.num_layers
assert all(pool.sharding.spec == P() for pool in jax.tree.leaves(pools.low_rank))

base = Workload(config, mesh, targets=(), tokens=32, page_size=16, pages=999, width=8, dtype="float32",
                implementation="xla")
for program in ("prefill", "decode"):
    without = collectives(base.lower(program).compile())
    assert without["all-reduce"]["count"] >= 2 * config.num_layers + 1, without
    adapted = collectives(dataclasses.replace(base, targets=TARGETS).lower(program).compile())
    assert adapted == without, (program, adapted, without)
print("passed")
"""


def test_on_eight_devices():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
    }
    command = [sys.executable, "-W", "error", "-c", ON_EIGHT_DEVICES]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.splitlines()[-1] == "passed"
