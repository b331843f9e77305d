"""An engine over a mesh: the same tokens as on one device, and adapters that add no collective."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import mesh_calls
import numpy as np
import pytest
from tolerances import assert_close

from lragent_jax.engine import Engine
from lragent_jax.models.errors import InputError

ON_EIGHT_DEVICES = """
import sys, threading

import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from mesh_calls import ADAPTERS, CONFIG, TARGETS, engine_of, generated, scored, weights

from lragent_jax.compile_watch import CompileWatch
from lragent_jax.engine import Engine
from lragent_jax.measure.tpu_programs import Workload, model_mesh
from lragent_jax.measure.tpu_report import collectives
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import ConfigError, InputError
from lragent_jax.models.llama import random_params
from lragent_jax.models.sharding import bank_shardings, param_shardings

assert len(jax.devices()) == 8

def check_places(engine, devices):
    assert jax.sharding.get_mesh().empty  # the caller's own affair
    executor, pools = engine._executor, engine._cache.arrays
    mesh = executor.params["norm"]["scale"][...].sharding.mesh
    assert mesh.size == devices
    for tree, shardings in ((executor.params, param_shardings(CONFIG, executor.params, mesh)),
                            (executor.registry.bank, bank_shardings(executor.registry.bank, mesh))):
        jax.tree.map(lambda leaf, sharding: check_equal(leaf.sharding, sharding), tree, shardings)
    assert len(pools.base.kv) == CONFIG.num_layers
    for pool in pools.base.kv:
        assert pool.sharding.spec == P(None, "model")
        assert {shard.data.shape[1] for shard in pool.addressable_shards} == {CONFIG.num_kv_heads // devices}
    low_rank = jax.tree.leaves(pools.low_rank)
    assert len(low_rank) == (0 if engine.sharing == "none" else 2 * CONFIG.num_layers)
    for pool in low_rank:
        assert pool.sharding.is_fully_replicated and len(pool.sharding.device_set) == devices

def check_equal(got, want):
    assert got == want, (got, want)

def run(sharing, devices):
    engine = engine_of(sharing, tensor_parallel=devices, max_adapters=4)
    results[f"{sharing} {devices}"] = scored(engine)
    check_places(engine, devices)
    return engine

results = {}
two = run("base_lr", 2)
assert len(jax.tree.leaves(weights()[1])[0].devices()) == 1
run("none", 4)
run("pre_lr", 4)
results["ids"] = want = generated(two)
check_places(two, 2)
np.savez(sys.argv[1], **results)

# Another mode's engine takes the weights as they lie, and the mesh. Threads, each of which has a current mesh of its
# own, and adapters that come later compile nothing more.
again = two.with_sharing("base_lr")
assert all(a is b for a, b in zip(jax.tree.leaves(again._executor.params), jax.tree.leaves(two._executor.params)))
want_late = two.generate([3, 4, 5], "plan", max_new_tokens=2).token_ids
done = []
def in_a_thread():
    for engine in (two, again):
        assert generated(engine) == want
        engine.load_adapter("late", ADAPTERS["plan"])
        assert engine.generate([3, 4, 5], "late", max_new_tokens=2).token_ids == want_late
        check_places(engine, 2)
        done.append(engine)
with CompileWatch() as watch:
    thread = threading.Thread(target=in_a_thread)
    thread.start(); thread.join()
assert done == [two, again] and watch.num_programs == 0, watch.num_programs

# What warming up compiles for a mesh is what runs there, scoring included.
fresh = two.with_sharing("base_lr", num_pages=61, prefill_buckets=(8,))
fresh.warmup()
with CompileWatch() as watch:
    fresh.generate([3, 4, 5], "plan", max_new_tokens=2)
    fresh.score(fresh.trajectory().append([3, 4, 5]), [6, 7], "action")
assert watch.num_programs == 0, watch.num_programs

# Random weights are drawn where they lie, and are the same everywhere.
mesh = model_mesh(jax.devices()[:4])
small = LlamaConfig(num_layers=1, width=8, mlp_width=8, num_heads=4, num_kv_heads=4, head_dim=2, vocab_size=8,
                    context_length=8)
everywhere = random_params(small, jnp.float32)[1]
shardings = param_shardings(small, everywhere, mesh)
drawn = random_params(small, jnp.float32, shardings=shardings)[1]
jax.tree.map(lambda leaf, sharding: check_equal(leaf.sharding, sharding), drawn, shardings)
jax.tree.map(np.testing.assert_array_equal, drawn, everywhere)

for devices, error, message in ((8, ConfigError, "num_kv_heads = 2"), (16, InputError, "JAX sees 8 cpu devices")):
    try:
        Engine.from_preset("tiny", tensor_parallel=devices)
    except error as raised:
        assert message in str(raised), raised
    else:
        raise AssertionError(devices)

# Two all-reduces a layer, adapters or not, and one for the embeddings; beside them only what sampling takes.
for program, tokens, sampling in (("prefill", 32, 0), ("decode", 1, 0)):
    workload = Workload(CONFIG, mesh, targets=TARGETS, tokens=32, page_size=16, pages=999, width=8, dtype="float32",
                        implementation="xla")
    found = collectives(workload.lower(program).compile())
    reduces = 2 * CONFIG.num_layers + 1
    assert found.keys() <= {"all-reduce", "all-gather"}, found
    assert found["all-reduce"]["count"] == reduces + sampling, (program, found)
    moved = sum(kind["bytes"] for kind in found.values())
    assert moved <= 4 * (reduces * tokens * CONFIG.width + 3 * CONFIG.vocab_size), (program, found)
print("passed")
"""

WITH_ROW_PRODUCTS = """
import sys, types

import jax
from mesh_calls import ADAPTERS, CONFIG, TARGETS, weights

from lragent_jax.engine import Engine
from lragent_jax.kernels.row_matmul import dispatch, xla
from lragent_jax.measure.tpu_programs import Workload, model_mesh
from lragent_jax.measure.tpu_report import collectives
from lragent_jax.models.adapter import Adapter

# A kernel like Hopper's, which takes what lies on one device. It does what XLA's operations do, and takes notes.
calls = set()
def row_matmul(x, weights, **options):
    shrinks, kept = options["shrinks"], options["keep_normed"]
    assert all(shrink.lora_a.shape[1] == CONFIG.width for shrink in shrinks)
    calls.add((x.shape, tuple(weight.shape for weight in weights), options["residual"] is None, len(shrinks), kept))
    return xla.row_matmul(x, weights, **options)

kernel = types.ModuleType("kernel")
kernel.row_matmul, kernel.refuse = row_matmul, xla.refuse
sys.modules[dispatch.__package__ + ".kernel"] = kernel
WITH_KERNEL, WITHOUT = {"kernel": ("cpu",), **dispatch.IMPLEMENTATIONS}, dispatch.IMPLEMENTATIONS

D, N, K, F, H = CONFIG.width, CONFIG.num_heads // 2, CONFIG.num_kv_heads // 2, CONFIG.mlp_width // 2, CONFIG.head_dim
qkv = ((1, D), ((D, N * H), (D, K * H), (D, K * H)), True)
rows = {((1, width), ((width, D),), True, 0, False) for width in (N * H, F)}  # of o and down, summed over shards
gate_up = ((1, D), ((D, F), (D, F)), True, 0, False)

for sharing, targets, others, read in (
    ("base_lr", ("q", "v"), {gate_up} | rows, (2, False)),
    ("base_lr", TARGETS, rows, (3, False)),
    ("none", ("q", "k", "v"), {gate_up} | rows, (1, True)),  # what adapters of k and v read is kept
):
    expected = {(*qkv, *read)} | others
    of_last_layer = ((1, D), ((D, N * H),), True, *read)  # of a chunk, whose last token is asked for alone
    adapters = {agent: Adapter({key: pair for key, pair in adapter.weights.items() if key[1] in targets})
                for agent, adapter in ADAPTERS.items()}
    def run(devices):
        engine = Engine(CONFIG, *weights(), adapters, sharing=sharing, page_size=8, num_pages=24,
                        prefill_buckets=(16,), decode_block=4, tensor_parallel=devices)
        with engine.trajectory().append(range(5, 20)) as trajectory:
            for agent in ("plan", "reflect"):
                engine.generate(trajectory, agent, max_new_tokens=4, ignore_eos=True)
            return trajectory.token_ids

    dispatch.IMPLEMENTATIONS = WITHOUT
    want = run(1)
    assert not calls
    dispatch.IMPLEMENTATIONS = WITH_KERNEL
    jax.clear_caches()
    assert run(2) == want
    assert calls == expected | {of_last_layer}, calls ^ expected
    calls.clear()

    def lowered(devices):
        return Workload(CONFIG, model_mesh(jax.devices()[:devices]), targets=targets, split=sharing != "none", rank=4,
                        tokens=1, page_size=16, pages=99, width=8, dtype="float32", implementation=None).lower("decode")
    found = collectives(lowered(2).compile())
    assert calls == expected, calls ^ expected
    assert found.keys() <= {"all-reduce", "all-gather"}, found
    assert found["all-reduce"]["count"] == 2 * CONFIG.num_layers + 1, found
    moved = sum(kind["bytes"] for kind in found.values())
    assert moved <= 4 * (found["all-reduce"]["count"] * D + 3 * CONFIG.vocab_size), found
    calls.clear()
    lowered(4)
    assert not calls  # too few columns are left to a device
print("passed")
"""

IN_TWO_PROCESSES = """
import sys

import numpy as np

from lragent_jax.options import EngineOptions

file, address, number = sys.argv[1:]
processes = dict(distributed=True, coordinator_address=address, num_processes=2, process_id=int(number))
EngineOptions(**processes)  # before anything of JAX runs

import jax
from mesh_calls import engine_of, scored

assert jax.process_count() == 2 and len(jax.devices()) == 2 and len(jax.local_devices()) == 1
engine = engine_of("base_lr", tensor_parallel=2, **processes)
np.save(file, scored(engine))
"""


def start(program: str, devices: int, *arguments: object) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]),
    }
    command = [sys.executable, "-W", "error", "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait(process: subprocess.Popen) -> str:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-4000:]
    return out


def test_on_eight_devices(tmp_path):
    process = start(ON_EIGHT_DEVICES, 8, tmp_path / "got.npz")
    engines = {f"{sharing} {devices}": mesh_calls.engine_of(sharing, max_adapters=4)
               for sharing, devices in (("base_lr", 2), ("none", 4), ("pre_lr", 4))}  # fmt: skip
    want = {name: mesh_calls.scored(engine) for name, engine in engines.items()}
    ids = mesh_calls.generated(engines["base_lr 2"])
    assert wait(process).splitlines()[-1] == "passed"
    got = np.load(tmp_path / "got.npz")
    assert got["ids"].tolist() == ids
    for name, logits in want.items():
        assert_close(got[name], logits, "equal")


def test_products_of_a_row_by_a_kernel():
    """Every device multiplies its own columns or rows, and no all-reduce is added."""
    assert wait(start(WITH_ROW_PRODUCTS, 4)).splitlines()[-1] == "passed"


def test_in_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    files = [tmp_path / f"{number}.npy" for number in range(2)]
    processes = [start(IN_TWO_PROCESSES, 1, file, address, number) for number, file in enumerate(files)]
    want = mesh_calls.scored(mesh_calls.engine_of("base_lr"))
    for process, file in zip(processes, files, strict=True):
        wait(process)
        assert_close(np.load(file), want, "equal")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel": 0}, "tensor_parallel must be an integer of at least 1"),
        ({"tensor_parallel": 2.0}, "tensor_parallel must be an integer"),
        ({"tensor_parallel": 2}, "JAX sees 1 cpu devices.*xla_force_host_platform_device_count"),
        ({"distributed": 1}, "distributed must be True or False"),
        ({"process_id": 0, "num_processes": 2}, "num_processes, process_id without distributed=True"),
        ({"distributed": True}, "cannot join others"),  # JAX runs already
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(InputError, match=message):
        Engine.from_preset("tiny", **options)
