"""Adapters survive being saved bit for bit, folders appear whole or not at all, any adapter folder is recognised."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lragent_jax.models.adapter import Adapter, LoraWeights, random_adapter
from lragent_jax.models.adapter_bank import TARGETS
from lragent_jax.models.adapter_checkpoint import MANIFEST_FILE, read_adapter, restore_adapter, save_adapter
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import AdapterError, CheckpointError
from lragent_jax.models.new_folder import new_folder
from lragent_jax.models.peft import write_peft

CONFIG = LlamaConfig.preset("tiny")


@pytest.fixture
def adapter() -> Adapter:
    return random_adapter(CONFIG, rank=3, seed=0)


def test_saved_and_restored_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    weights = {
        (layer, target): LoraWeights(rng.standard_normal((a, layer + 1)), rng.standard_normal((layer + 1, b)))
        for layer in range(2)
        for target, (a, b) in CONFIG.projection_shapes().items()
    }
    uneven = Adapter(weights)
    save_adapter(tmp_path / "deep" / "plan", uneven)
    back = restore_adapter(tmp_path / "deep" / "plan")
    assert (back.content_hash, back.a_group_hash) == (uneven.content_hash, uneven.a_group_hash)
    assert back.source == str(tmp_path / "deep" / "plan")
    for place, pair in uneven.weights.items():
        np.testing.assert_array_equal(back.weights[place].lora_a, pair.lora_a, strict=True)
        np.testing.assert_array_equal(back.weights[place].lora_b, pair.lora_b, strict=True)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["plan"], "nothing is left beside it"
    manifest = json.loads((tmp_path / "deep" / "plan" / MANIFEST_FILE).read_text())
    assert (manifest["format"], manifest["version"]) == ("lragent-adapter", 1)
    assert manifest["ranks"] == dict.fromkeys(TARGETS, 2)


def test_either_kind_of_folder_is_recognised(tmp_path, adapter):
    save_adapter(tmp_path / "ours", adapter)
    write_peft(tmp_path / "peft", adapter, CONFIG)
    for name in ("ours", "peft"):
        assert read_adapter(str(tmp_path / name), CONFIG).content_hash == adapter.content_hash


def test_an_adapter_of_another_base_is_refused(tmp_path, adapter):
    save_adapter(tmp_path / "plan", adapter)
    with pytest.raises(AdapterError, match=r"plan cannot run on this model \(an adapter of another base\?\)"):
        read_adapter(tmp_path / "plan", LlamaConfig.preset("smollm2-135m"))


def test_other_folders_are_named(tmp_path, adapter):
    with pytest.raises(CheckpointError, match=r"there is no adapter folder .*nowhere"):
        read_adapter(tmp_path / "nowhere", CONFIG)
    with pytest.raises(CheckpointError, match=r"holds neither adapter_config\.json nor lragent_adapter\.json$"):
        read_adapter(tmp_path, CONFIG)
    save_adapter(tmp_path / "plan", adapter)
    write_peft(tmp_path / "action", adapter, CONFIG)
    with pytest.raises(CheckpointError, match="its subfolders are: action, plan"):
        read_adapter(tmp_path, CONFIG)


def test_an_existing_folder_is_replaced_only_with_force(tmp_path, adapter):
    other = random_adapter(CONFIG, rank=2, seed=1)
    (tmp_path / "plan").mkdir()  # an empty one may be filled
    save_adapter(tmp_path / "plan", adapter)
    with pytest.raises(CheckpointError, match="plan exists; name another folder, or pass force"):
        save_adapter(tmp_path / "plan", other)
    assert restore_adapter(tmp_path / "plan").content_hash == adapter.content_hash
    save_adapter(tmp_path / "plan", other, force=True)
    assert restore_adapter(tmp_path / "plan").content_hash == other.content_hash
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_other_peoples_folders_are_never_replaced(tmp_path, adapter):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    for write in (save_adapter, lambda folder, it, force: write_peft(folder, it, CONFIG, force=force)):
        with pytest.raises(CheckpointError, match="home holds other things"):
            write(tmp_path / "home", adapter, force=True)
        with pytest.raises(CheckpointError, match="is a file"):
            write(tmp_path / "home" / "thesis.tex", adapter, force=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"


def test_a_folder_that_fails_halfway_leaves_what_was_there(tmp_path):
    def fail(force):
        with new_folder(tmp_path / "plan", marker="marker", force=force) as draft:
            (draft / "marker").write_text("new")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail(force=False)
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "plan", marker="marker") as draft:
        (draft / "marker").write_text("old")
    with pytest.raises(RuntimeError, match="disk full"):
        fail(force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]
    assert (tmp_path / "plan" / "marker").read_text() == "old"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "plan"
    message = f"{target} cannot be made: .+; name another folder"
    with pytest.raises(CheckpointError, match=message), new_folder(target, marker="marker"):
        raise AssertionError("it was made")


def write_marker(folder, text, **options):
    with new_folder(folder, marker="marker", **options) as draft:
        (draft / "marker").write_text(text)


def test_what_a_link_leads_to_is_replaced_and_the_link_stays(tmp_path):
    write_marker(tmp_path / "disk" / "plan", "old")
    link = tmp_path / "plan"
    link.symlink_to(tmp_path / "disk" / "plan")
    with pytest.raises(CheckpointError, match="disk/plan exists"):
        write_marker(link, "new")
    write_marker(link, "new", force=True)
    assert link.is_symlink()
    assert (tmp_path / "disk" / "plan" / "marker").read_text() == "new"
    (tmp_path / "later").symlink_to(tmp_path / "disk" / "later")
    write_marker(tmp_path / "later", "first")
    assert (tmp_path / "disk" / "later" / "marker").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "later", "plan"]
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["later", "plan"]


def test_a_folder_that_cannot_take_its_place_leaves_what_was_there(tmp_path, monkeypatch):
    write_marker(tmp_path / "plan", "old")
    rename = Path.rename

    def rename_no_draft(path, target):
        if Path(target).name == "plan" and not path.name.endswith(".old"):
            raise OSError("the disk is gone")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_no_draft)
    with pytest.raises(OSError, match="the disk is gone"):
        write_marker(tmp_path / "plan", "new", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]
    assert (tmp_path / "plan" / "marker").read_text() == "old"


def edit_manifest(folder, **fields):
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "lragent-model"}, "is not of the format lragent-adapter"),
        ({"version": 2}, "has version 2; this program reads version 1"),
        ({"content_hash": "0" * 64}, "its weights are not those that were saved"),
        ({"places": None}, "places=None are no pairs"),
        ({"places": [[0, "router"]]}, r"places=\[\[0, 'router'\]\] are no pairs"),
        ({"places": [[0, "q"], [0, "v"], [1, "q"], [1, "v"], [2, "v"]]}, "weights is damaged"),
        ({"places": [[0, "q"]]}, "damaged"),
        ({"files": 3}, "files=3 are no sizes by name"),
    ],
)
def test_a_manifest_that_does_not_fit_is_named(tmp_path, adapter, fields, message):
    save_adapter(tmp_path / "plan", adapter)
    edit_manifest(tmp_path / "plan", **fields)
    with pytest.raises(CheckpointError, match=message):
        restore_adapter(tmp_path / "plan")


def test_lost_and_truncated_files_are_named(tmp_path, adapter):
    save_adapter(tmp_path / "plan", adapter)
    files = [path for path in (tmp_path / "plan" / "weights").rglob("*") if path.is_file()]
    for path in files:
        whole = path.read_bytes()
        name = path.relative_to(tmp_path / "plan")
        for size in (0, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(
                CheckpointError, match=rf"plan is truncated.*\n  - {name}: {size} of {len(whole)} bytes$"
            ):
                restore_adapter(tmp_path / "plan")
        path.unlink()
        with pytest.raises(CheckpointError, match=rf"plan is truncated.*\n  - {name}: 0 of"):
            restore_adapter(tmp_path / "plan")
        path.write_bytes(whole)
    assert restore_adapter(tmp_path / "plan").content_hash == adapter.content_hash
    (tmp_path / "plan" / "weights").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="plan is truncated"):
        restore_adapter(tmp_path / "plan")


def test_weights_that_were_exchanged_are_found(tmp_path, adapter):
    save_adapter(tmp_path / "plan", adapter)
    doubled = {place: pair._replace(lora_b=pair.lora_b * 2) for place, pair in adapter.weights.items()}
    save_adapter(tmp_path / "doubled", Adapter(doubled))
    files = json.loads((tmp_path / "doubled" / MANIFEST_FILE).read_text())["files"]
    shutil.rmtree(tmp_path / "plan" / "weights")
    (tmp_path / "doubled" / "weights").rename(tmp_path / "plan" / "weights")
    edit_manifest(tmp_path / "plan", files=files)
    with pytest.raises(CheckpointError, match="its weights are not those that were saved"):
        restore_adapter(tmp_path / "plan")
