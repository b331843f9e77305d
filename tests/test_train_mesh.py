"""Training over a mesh of eight virtual devices: the losses of one device."""

import os
import subprocess
import sys
from pathlib import Path

ON_EIGHT_DEVICES = """
import dataclasses, sys
from pathlib import Path

import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.llama import random_params
from lragent_jax.training.agent_run import AgentPlan, AgentRun
from lragent_jax.training.checkpoints import TrainingCheckpoints
from lragent_jax.training.examples import TokenSequence
from lragent_jax.training.joint_run import JointPlan, JointRun
from lragent_jax.training.lora import initial_lora, together, with_shared
from lragent_jax.training.loss_curve import read_losses
from lragent_jax.training.mesh import current_mesh, num_data_parts, weight_shardings
from lragent_jax.training.options import TrainingOptions
from lragent_jax.training.packing import batch_shapes
from lragent_jax.training.programs import Programs

tmp = Path(sys.argv[1])
config = LlamaConfig(num_layers=1, width=32, mlp_width=64, num_heads=8, num_kv_heads=4, head_dim=8, vocab_size=64,
                     context_length=128)
graphdef, params = random_params(config, jnp.float32)
options = TrainingOptions(rank=4, targets=("q", "v", "o", "gate"), steps=5, tokens_per_step=256, sequence_length=64,
                          dtype="float32", learning_rate=1e-2, warmup=0)
rng = np.random.default_rng(0)
sequences = [TokenSequence(rng.integers(0, 64, 20).astype(np.int32), np.arange(20) > 7) for _ in range(30)]

def train(name):
    mesh = current_mesh()
    # The rows of a step as on eight devices, everywhere.
    plan = AgentPlan.make("plan", sequences, [], options, 8)
    placed = params if mesh is None else jax.device_put(params, weight_shardings(config, jnp.float32, mesh))
    assert mesh is None or 8 % num_data_parts(mesh) == 0
    programs = Programs(config, graphdef, placed, options)
    run = AgentRun(programs, plan, batch_shapes(plan.packed), options, losses=tmp / name,
                   checkpoints=TrainingCheckpoints(tmp / f"{name}.states"), progress=lambda *_: None)
    trained, _ = run.run(*with_shared(initial_lora(config, options, "plan"), {}))
    losses = [line["loss"] for line in read_losses(tmp / name)]
    return np.array(losses), jax.tree.map(np.asarray, trained), programs

def train_jointly(name):
    both = dataclasses.replace(options, kind="joint", separate_share=0.25)
    agents = np.arange(20, dtype=np.int16) // 4 % 2
    whole = [dataclasses.replace(sequence, agents=agents) for sequence in sequences]
    plan, mesh = JointPlan.of_trajectories(["plan", "action"], whole, whole[:8], both, 8), current_mesh()
    placed = params if mesh is None else jax.device_put(params, weight_shardings(config, jnp.float32, mesh))
    run = JointRun(Programs(config, graphdef, placed, both), plan, batch_shapes(plan.packed), both, losses=tmp / name,
                   checkpoints=TrainingCheckpoints(tmp / f"{name}.states"), progress=lambda *_: None)
    _, results = run.run_jointly(together([initial_lora(config, both, agent) for agent in plan.agents]))
    of_agents = [results[agent].validation_loss for agent in plan.agents]
    return np.array([line["loss"] for line in read_losses(tmp / name) if "loss" in line] + of_agents)

def mesh_of(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))

assert len(jax.devices()) == 8
want, want_lora, _ = train("one")
assert len(want) == 5 and want[-1] < want[0], want
for axes in ({"data": 8}, {"data": 2, "model": 4}):
    with jax.set_mesh(mesh_of(**axes)):
        losses, lora, programs = train("".join(axes))
    np.testing.assert_allclose(losses, want, atol=2e-5, err_msg=str(axes))
    jax.tree.map(lambda got, one: np.testing.assert_allclose(got, one, atol=2e-4), lora, want_lora)
    if axes == {"data": 8}:  # no device holds the rows of another
        [compiled] = [compiled for key, compiled in programs._compiled.items() if key[0] == "step"]
        text = compiled.result().as_text()
        assert "all-reduce" in text and "all-gather" not in text and "all-to-all" not in text
want = train_jointly("joint, one")
with jax.set_mesh(mesh_of(data=2, model=4)):
    np.testing.assert_allclose(train_jointly("joint"), want, atol=2e-5)
print("passed")
"""


def test_on_eight_devices(tmp_path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
    }
    command = [sys.executable, "-W", "error", "-c", ON_EIGHT_DEVICES, str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.splitlines()[-1] == "passed"
