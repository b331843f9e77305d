"""What `scripts/compile_tpu.py` says where nothing has to be compiled, and what it finds wrong with a program."""

import json

import pytest
from script_modules import load_script

from lragent_jax.kernels.lora_attention.pallas_mosaic_tpu.block_sizes import heuristic
from lragent_jax.measure.roofline import MODES, Roofline
from lragent_jax.measure.tpu_chips import CHIPS, SLICES
from lragent_jax.measure.tpu_report import faults
from lragent_jax.models.config import LlamaConfig


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, dict]:
    """Its exit status, and what its last line holds."""
    script = load_script("compile_tpu")
    monkeypatch.setattr("sys.argv", ["compile_tpu.py", *arguments])
    with pytest.raises(SystemExit) as exit:
        script.main()
    return int(exit.value.code or 0), json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_model_that_a_chip_cannot_hold_is_a_failure_with_its_reason(monkeypatch, capsys):
    status, printed = run(monkeypatch, capsys, "--chips", "v5e", "--presets", "llama-3.1-70b", "--what", "programs")
    assert status == 1
    (result,) = printed["programs"].values()
    assert result["error"] == (
        "8 kv heads, so 8 devices at most, 17,638,096,896 bytes of weights on each, and each has 17,179,869,184"
    )


def test_every_chip_has_a_roofline_of_every_mode(monkeypatch, capsys):
    status, printed = run(monkeypatch, capsys, "--what", "roofline")
    assert status == 0
    rooflines = printed["rooflines"]
    assert set(rooflines) == {f"{chip} {preset}" for preset, slices in SLICES.items() for chip in slices}
    for name, modes in rooflines.items():
        assert tuple(modes) == MODES == ("none", "base_lr", "full"), name
        assert modes["none"]["prefilled_tokens"] == 100_584
        assert modes["full"]["ttft_s"] <= modes["base_lr"]["ttft_s"] < modes["none"]["ttft_s"] / 2.5
        assert 0 < modes["full"]["decode_ms_per_token"] <= modes["base_lr"]["decode_ms_per_token"]


@pytest.mark.parametrize(("preset", "chip"), [(preset, chip) for preset in SLICES for chip in SLICES[preset]])
def test_the_roofline_reads_pages_for_the_tiles_that_the_kernel_has(preset, chip):
    config, devices = LlamaConfig.preset(preset), SLICES[preset][chip][1]
    K, G = config.num_kv_heads // devices, config.num_heads // config.num_kv_heads
    block_q = heuristic(1, 1024, K, G, config.head_dim, itemsize=2).block_q
    assert Roofline(CHIPS[chip], devices, config, rank=16).block_q == block_q


SOUND = {"hbm_share": 0.9, "cache_copies": 0, "temporaries": 10, "smallest_cache": 20, "padding": 0, "arguments": 2**30}


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("it needs 110% of HBM", {"hbm_share": 1.1}),
        ("2 operations copy a pool", {"cache_copies": 2}),
        ("20 bytes of temporaries, and a cache of 20", {"temporaries": 20}),
        ("4,194,304 bytes of padding in its arguments", {"padding": 2**22}),
    ],
)
def test_what_is_wrong_with_a_program(reason, changes):
    assert faults(SOUND) == []
    assert faults(SOUND | changes) == [reason]
