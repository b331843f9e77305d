"""Orbax checkpoints of a model: bit for bit, whole or not at all. Every kind of model is recognised."""

import dataclasses
import gc
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_folders import (
    BFLOAT16,
    TINY,
    as_params,
    assert_same_weights,
    config_json,
    gguf_fields,
    gguf_tensors,
    huggingface_tensors,
    random_weights,
    write_gguf,
    write_huggingface,
)

from lragent_jax.models.checkpoint import MANIFEST_FILE, restore_checkpoint, save_checkpoint
from lragent_jax.models.config import Llama3RopeScaling
from lragent_jax.models.errors import CheckpointError
from lragent_jax.models.folder import ModelKind, find_model, read_config, read_model
from lragent_jax.models.huggingface import config_from_huggingface
from lragent_jax.models.llama import abstract_params

CONFIG = dataclasses.replace(TINY, num_layers=1)
WEIGHTS = random_weights(CONFIG)


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(tmp_path / "model", CONFIG, as_params(CONFIG, WEIGHTS))
    return tmp_path / "model"


def edit_manifest(folder, **changes):
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_saved_and_restored_bit_for_bit(tmp_path, dtype):
    config = dataclasses.replace(
        CONFIG, num_layers=11, width=8, mlp_width=8, num_heads=2, head_dim=4, vocab_size=16, qkv_bias=True,
        tied_embeddings=True, rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 8192), bos_token_id=1, eos_token_ids=(2, 3),
    )  # fmt: skip
    weights = random_weights(config, jnp.dtype(dtype))
    params = as_params(config, weights)
    save_checkpoint(tmp_path / "deep" / "model", config, params)
    got_config, got_graphdef, got = restore_checkpoint(tmp_path / "deep" / "model")
    assert got_config == config
    assert got_graphdef == abstract_params(config, jnp.dtype(dtype))[0]
    assert jax.tree.structure(got) == jax.tree.structure(params)
    assert_same_weights(got, weights)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"], "nothing is left beside it"


def test_restored_as_another_dtype(folder):
    _, _, params = restore_checkpoint(folder, "bfloat16")
    assert_same_weights(params, {name: weight.astype(BFLOAT16) for name, weight in WEIGHTS.items()})


def test_progress_begins_and_ends(folder):
    calls = []
    restore_checkpoint(folder, progress=lambda done, total, _: calls.append((done, total)))
    total = sum(weight.nbytes for weight in WEIGHTS.values())
    assert calls == [(0, total), (total, total)]


def test_another_folder_is_never_replaced_and_ours_only_by_force(tmp_path, folder):
    other = random_weights(CONFIG, seed=1)
    params = as_params(CONFIG, other)
    with pytest.raises(CheckpointError, match=r"exists; .*force"):
        save_checkpoint(folder, CONFIG, params)
    save_checkpoint(folder, CONFIG, params, force=True)
    assert_same_weights(restore_checkpoint(folder)[2], other)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    with pytest.raises(CheckpointError, match="holds other things"):
        save_checkpoint(tmp_path / "thesis", CONFIG, params, force=True)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_a_failure_leaves_nothing_and_what_was_there(tmp_path, folder):
    def fail(draft):
        (draft / "tokenizer.json").touch()
        raise OSError("disk full")

    params = as_params(CONFIG, random_weights(CONFIG, seed=1))
    for target in (tmp_path / "new", folder):
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(target, CONFIG, params, force=True, write_beside=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert_same_weights(restore_checkpoint(folder)[2], WEIGHTS)


def test_files_beside_the_weights_come_with_them(tmp_path):
    params = as_params(CONFIG, WEIGHTS)
    save_checkpoint(tmp_path / "m", CONFIG, params, write_beside=lambda draft: (draft / "tokenizer.json").touch())
    assert (tmp_path / "m" / "tokenizer.json").is_file()
    restore_checkpoint(tmp_path / "m")


def test_parameters_of_another_configuration_are_not_saved(tmp_path):
    params = as_params(CONFIG, WEIGHTS)
    other = dataclasses.replace(CONFIG, mlp_width=32, tied_embeddings=True, qkv_bias=True)
    with pytest.raises(ValueError, match=r"(?s)missing: layers\.0.*bias.*unused: unembed.*mis-shaped: .*gate"):
        save_checkpoint(tmp_path / "m", other, params)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_no_checkpoint(tmp_path, folder):
    with pytest.raises(CheckpointError, match=r"no folder .*nowhere"):
        restore_checkpoint(tmp_path / "nowhere")
    good = (folder / MANIFEST_FILE).read_text()
    for changes, reason in (
        ({"format": "lragent-adapter"}, "not of the format lragent-model"),
        ({"version": 2}, "version 2; this program reads version 1"),
        ({"config": {}}, "damaged"),
        ({"config": [1]}, "damaged"),
        ({"config": None}, "damaged"),
        ({"config": json.loads(good)["config"] | {"color": "red"}}, "damaged"),
        ({"config": json.loads(good)["config"] | {"num_layers": 0}}, "damaged: num_layers"),
        ({"config": json.loads(good)["config"] | {"rope_scaling": {"factor": 8.0}}}, "damaged"),
        ({"dtype": "int8"}, "damaged"),
    ):
        edit_manifest(folder, **changes)
        with pytest.raises(CheckpointError, match=reason):
            restore_checkpoint(folder)
        (folder / MANIFEST_FILE).write_text(good)
    (folder / MANIFEST_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="JSON"):
        restore_checkpoint(folder)
    (folder / MANIFEST_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"no {MANIFEST_FILE}"):
        restore_checkpoint(folder)


def test_weights_that_are_not_those_of_the_manifest(folder):
    config = json.loads((folder / MANIFEST_FILE).read_text())["config"]
    edit_manifest(folder, config=config | {"mlp_width": 32, "tied_embeddings": True, "num_layers": 2})
    with pytest.raises(CheckpointError) as caught:
        restore_checkpoint(folder)
    for problem in (
        "missing: layers.1.attention.q.kernel",
        "unused: unembed",
        "mis-shaped: layers.0.mlp.down.kernel is [96, 48], expected [32, 48]",
    ):
        assert problem in str(caught.value)


# Orbax leaves coroutines unawaited behind an array that it cannot read.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_weights_that_are_gone_or_damaged(tmp_path, folder):
    copy = tmp_path / "copy"
    files = sorted(path.relative_to(folder) for path in (folder / "params").rglob("*") if path.stat().st_size > 64)
    data = max(files, key=lambda file: (folder / file).stat().st_size)
    for breaks in (
        lambda: shutil.rmtree(copy / "params"),
        lambda: (copy / data).unlink(),
        lambda: (copy / data).write_bytes((copy / data).read_bytes()[:100]),
        lambda: (copy / "params" / "_METADATA").write_text("{"),
        lambda: (copy / "params" / "manifest.ocdbt").unlink(),
    ):
        shutil.copytree(folder, copy)
        breaks()
        with pytest.raises(CheckpointError, match=r"missing or damaged|is damaged"):
            restore_checkpoint(copy)
        shutil.rmtree(copy)
    gc.collect()


def test_numbers_that_are_not_finite_are_named(tmp_path):
    weights = WEIGHTS | {"norm.scale": np.full(48, 1e6, np.float32)}
    save_checkpoint(tmp_path / "m", CONFIG, as_params(CONFIG, weights))
    restore_checkpoint(tmp_path / "m", "bfloat16")
    with pytest.raises(CheckpointError, match=r"(?s)too large for its dtype:\n  - norm\.scale$"):
        restore_checkpoint(tmp_path / "m", "float16")


# --- the one door


def test_every_kind_of_model_is_recognised(tmp_path, folder):
    config = dataclasses.replace(CONFIG, bos_token_id=1, eos_token_ids=(2,))
    fields = config_json(num_hidden_layers=1)
    assert config_from_huggingface(fields) == config
    weights = random_weights(config)
    write_huggingface(tmp_path / "hf", fields, huggingface_tensors(weights))
    (tmp_path / "gguf").mkdir()
    special = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    file = write_gguf(tmp_path / "gguf" / "m.GGUF", gguf_fields(config) | special, gguf_tensors(weights, config))
    save_checkpoint(tmp_path / "orbax", config, as_params(config, weights))
    for path, kind, found in (
        (tmp_path / "hf", ModelKind.HUGGINGFACE, tmp_path / "hf"),
        (file, ModelKind.GGUF, file),
        (tmp_path / "gguf", ModelKind.GGUF, file),
        (str(tmp_path / "orbax"), ModelKind.CHECKPOINT, tmp_path / "orbax"),
    ):
        assert find_model(path) == (kind, found)
        assert read_config(path) == config
        got_config, graphdef, params = read_model(path, "float32")
        assert got_config == config
        assert graphdef == abstract_params(config, jnp.float32)[0]
        assert_same_weights(params, weights)


def test_paths_that_are_no_model(tmp_path):
    def error(path):
        with pytest.raises(CheckpointError) as caught:
            read_model(path, "float32")
        return str(caught.value)

    assert "there is no model at" in error(tmp_path / "nowhere")
    assert "neither config.json (Hugging Face)" in error(tmp_path)
    (tmp_path / "adapter_config.json").touch()
    assert "it is an adapter" in error(tmp_path)
    assert "a file that is no .gguf" in error(tmp_path / "adapter_config.json")
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).write_bytes(np.zeros(4).tobytes())
    assert "2 GGUF files; name one: a.gguf, b.gguf" in error(tmp_path)
    assert "is no GGUF file" in error(tmp_path / "a.gguf")
