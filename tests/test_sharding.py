"""Tensor parallelism on eight virtual devices: every reader puts every weight where it belongs."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec
from model_folders import TINY

from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.llama import abstract_params
from lragent_jax.models.sharding import param_shardings
from lragent_jax.models.weights import leaf_names

ON_EIGHT_DEVICES = """
import dataclasses, sys
from pathlib import Path

import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from model_folders import *
from lragent_jax.models.checkpoint import restore_checkpoint, save_checkpoint
from model_folders import TINY

from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.folder import read_config, read_model
from lragent_jax.models.huggingface import config_from_huggingface
from lragent_jax.models.llama import abstract_params
from lragent_jax.models.sharding import param_shardings

tmp = Path(sys.argv[1])
assert len(jax.devices()) == 8
fields = config_json("qwen2", num_attention_heads=8, num_key_value_heads=4, hidden_size=64, num_hidden_layers=1,
                     bos_token_id=None, eos_token_id=None)
config = config_from_huggingface(fields)
weights = random_weights(config)
write_huggingface(tmp / "hf", fields, huggingface_tensors(weights))
write_gguf(tmp / "m.gguf", gguf_fields(config, "qwen2"), gguf_tensors(weights, config, "qwen2"), "qwen2")

WHERE = {
    "embed": P("model", None), "unembed": P(None, "model"), "norm.scale": P(None),
    **{f"layers.0.{x}_norm.scale": P(None) for x in ("attention", "mlp")},
    **{f"layers.0.attention.{x}.kernel": P(None, "model") for x in "qkv"},
    **{f"layers.0.attention.{x}.bias": P("model") for x in "qkv"},
    "layers.0.attention.o.kernel": P("model", None),
    **{f"layers.0.mlp.{x}.kernel": P(None, "model") for x in ("gate", "up")},
    "layers.0.mlp.down.kernel": P("model", None),
}

def shardings(shape, axes):
    mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))
    return mesh, param_shardings(config, abstract_params(config, jnp.float32)[1], mesh)

def check(path, mesh, tree, parts):
    got_config, _, params = read_model(path, "float32", tree)
    assert got_config == config
    assert_same_weights(params, weights)
    leaves = dict(zip(flat(params), jax.tree.leaves(params)))
    assert leaves.keys() == WHERE.keys()
    for name, leaf in leaves.items():
        assert leaf.sharding == NamedSharding(mesh, WHERE[name]), (name, leaf.sharding)
        cut = "model" in WHERE[name]
        assert leaf.addressable_shards[0].data.size == leaf.size // (parts if cut else 1), name
    return params

mesh, tree = shardings((2, 4), ("data", "model"))
params = check(tmp / "hf", mesh, tree, 4)
check(tmp / "m.gguf", mesh, tree, 4)
save_checkpoint(tmp / "orbax", config, params)
check(tmp / "orbax", mesh, tree, 4)
mesh, tree = shardings((2,), ("model",))
check(tmp / "orbax", mesh, tree, 2)
params = restore_checkpoint(tmp / "orbax")[2]
assert_same_weights(params, weights)
assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(params))

mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
odd = dataclasses.replace(config, vocab_size=127, mlp_width=100)
try:
    param_shardings(odd, abstract_params(odd, jnp.float32)[1], mesh)
except ValueError as error:
    print(error)
"""


def test_on_eight_devices(tmp_path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]),
    }
    command = [sys.executable, "-W", "error", "-c", ON_EIGHT_DEVICES, str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.splitlines() == [
        "8 devices along 'model' do not divide these; use fewer devices:",
        "  - num_kv_heads = 4",
        "  - mlp_width = 100",
        "  - vocab_size = 127",
    ]


def test_meshes_that_do_not_fit():
    config = TINY
    _, abstract = abstract_params(config, "float32")
    auto = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match="axes model and none called 'tensor'"):
        param_shardings(config, abstract, auto, axis="tensor")
    explicit = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match="Auto"):
        param_shardings(config, abstract, explicit)


def test_every_weight_has_a_sharding_at_its_place():
    config = LlamaConfig.preset("llama-3.2-1b")
    _, abstract = abstract_params(config, "bfloat16")
    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))
    tree = param_shardings(config, abstract, mesh)
    assert jax.tree.structure(tree) == jax.tree.structure(abstract)
    specs = dict(zip(leaf_names(abstract), [s.spec for s in jax.tree.leaves(tree)], strict=True))
    assert specs["layers.10.attention.o.kernel"] == PartitionSpec("model", None)
    assert specs["layers.2.attention.q.kernel"] == PartitionSpec(None, "model")
