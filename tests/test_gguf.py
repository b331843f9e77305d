"""GGUF files: every quantisation becomes the numbers it stands for, every file that cannot be run says why."""

import dataclasses
import struct
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from model_folders import (
    BFLOAT16,
    TINY,
    add_field,
    assert_same_weights,
    gguf_fields,
    gguf_tensors,
    random_weights,
    write_gguf,
)

from lragent_jax.models import gguf_file
from lragent_jax.models.config import Llama3RopeScaling
from lragent_jax.models.errors import CheckpointError, ConfigError
from lragent_jax.models.gguf import config_from_gguf, read_gguf
from lragent_jax.models.gguf_file import GGUFFile
from lragent_jax.models.rope import inverse_frequencies

CONFIG = TINY
F32 = gguf.GGMLQuantizationType.F32
WRITABLE = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


def model(tmp_path, fields=None, config=CONFIG, tensors: dict[str, Any] | None = None):
    """A file in f32 with tensors replaced, added, or (None) taken out."""
    all_tensors = gguf_tensors(random_weights(config), config) | (tensors or {})
    return write_gguf(
        tmp_path / "model.gguf",
        gguf_fields(config) if fields is None else fields,
        {name: tensor for name, tensor in all_tensors.items() if tensor is not None},
    )


# --- numbers


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_bit_for_bit(tmp_path, tied):
    config = dataclasses.replace(CONFIG, tied_embeddings=tied, norm_eps=1e-6, rope_theta=12_345.0)
    got_config, _, params = read_gguf(model(tmp_path, config=config), "float32")
    assert got_config == config
    assert_same_weights(params, random_weights(config))


def test_qwen2_has_biases_and_keeps_its_rows(tmp_path):
    config = dataclasses.replace(CONFIG, qkv_bias=True)
    weights = random_weights(config)
    path = write_gguf(
        tmp_path / "q.gguf", gguf_fields(config, "qwen2"), gguf_tensors(weights, config, "qwen2"), "qwen2"
    )
    got_config, _, params = read_gguf(path, "float32")
    assert got_config == config
    assert_same_weights(params, weights)


@pytest.mark.parametrize("name", WRITABLE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_weights_are_what_the_package_dequantises(tmp_path, name, dtype):
    quantisation = gguf.GGMLQuantizationType[name]
    config = dataclasses.replace(CONFIG, num_layers=1, width=64, mlp_width=96, num_heads=8)
    weights = random_weights(config)
    path = write_gguf(
        tmp_path / "q.gguf", gguf_fields(config), gguf_tensors(weights, config), quantisation=quantisation
    )
    _, _, params = read_gguf(path, dtype)

    def rounded(weight):
        if weight.ndim == 1:
            return weight
        # Blocks run along the input, so along our columns; the embedding is stored as it is.
        is_embedding = weight.shape == (config.vocab_size, config.width)
        rows = np.ascontiguousarray(weight if is_embedding else weight.T)
        numbers = dequantize(gguf.quants.quantize(rows, quantisation), quantisation)
        return numbers if is_embedding else numbers.T

    want = {key: rounded(w).astype(BFLOAT16 if dtype == "bfloat16" else np.float32) for key, w in weights.items()}
    assert_same_weights(params, want)


READABLE = [
    t for t in gguf.GGMLQuantizationType if t not in (F32, gguf.GGMLQuantizationType.F16)
    and gguf_file._is_readable(t.name)
]  # fmt: skip


def test_common_quantisations_are_readable():
    names = {quantisation.name for quantisation in READABLE}
    assert {*WRITABLE, "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ2_XS"} - names == {"F16"}


@pytest.mark.parametrize("quantisation", READABLE, ids=lambda t: t.name)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # random bytes are no sensible scales
def test_every_format_in_pieces_equals_the_package_at_once(tmp_path, monkeypatch, quantisation):
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[quantisation]
    blocks = np.random.default_rng(0).integers(0, 256, (7, 2 * block_bytes), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("a", np.ones(3, np.float32))
    writer.add_tensor("x", blocks, raw_dtype=quantisation)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    file = GGUFFile(tmp_path / "x.gguf")
    assert file.tensors["x"].shape == (7, 2 * block_size)
    assert file.unreadable("x") is None
    want = dequantize(blocks, quantisation)
    for numbers_at_once in (1 << 22, 3 * 2 * block_size):
        monkeypatch.setattr(gguf_file, "NUMBERS_AT_ONCE", numbers_at_once)
        np.testing.assert_array_equal(file.read("x", np.dtype(np.float32)), want, strict=True)


# --- configurations


def test_fields_by_their_f32_values_are_the_decimals_people_wrote(tmp_path):
    config = config_from_gguf(GGUFFile(model(tmp_path, gguf_fields(CONFIG, rope__freq_base=1e5))))
    assert (config.norm_eps, config.rope_theta) == (1e-5, 1e5)


def test_defaults_and_special_tokens(tmp_path):
    fields = gguf_fields(CONFIG, vocab_size=..., rope__freq_base=..., rope__dimension_count=...)
    fields |= {"tokenizer.ggml.bos_token_id": 3, "tokenizer.ggml.eos_token_id": 4, "tokenizer.ggml.eot_token_id": 5}
    config = config_from_gguf(GGUFFile(model(tmp_path, fields | {"tokenizer.ggml.eom_token_id": 4})))
    assert config == dataclasses.replace(CONFIG, bos_token_id=3, eos_token_ids=(4, 5))


def test_explicit_head_width_and_heads_given_per_layer(tmp_path):
    config = dataclasses.replace(CONFIG, head_dim=16)
    fields = gguf_fields(
        config, attention__key_length=16, attention__value_length=16, attention__head_count_kv=[2, 2],
        feed_forward_length=[96, 96],
    )  # fmt: skip
    got, _, params = read_gguf(model(tmp_path, fields, config), "float32")
    assert got == config
    assert_same_weights(params, random_weights(config))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_factors_become_its_scaling(tmp_path, factor):
    config = dataclasses.replace(CONFIG, width=384, head_dim=64, rope_theta=5e5, context_length=131_072, num_layers=1)
    scaling = Llama3RopeScaling(factor, 1.0, 4.0, 8192)
    scaled = dataclasses.replace(config, rope_scaling=scaling)
    # The converter's own formula, over wavelengths.
    wavelengths = 2 * np.pi * 5e5 ** (np.arange(0, 64, 2) / 64)
    smooth = (8192 / wavelengths - 1.0) / (4.0 - 1.0)
    factors = np.where(
        wavelengths < 8192 / 4.0, 1.0, np.where(wavelengths > 8192, factor, 1 / ((1 - smooth) / factor + smooth))
    )
    assert 0 < (factors == factor).sum() < (factors > 1).sum() < 32, "the factors have all three parts"
    np.testing.assert_allclose(inverse_frequencies(config) / factors, inverse_frequencies(scaled), rtol=1e-5)
    got, _, params = read_gguf(model(tmp_path, config=config, tensors={"rope_freqs.weight": factors}), "float32")
    assert got == scaled
    assert_same_weights(params, random_weights(config))
    factors[20] *= 1.01
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight is not supported"):
        read_gguf(model(tmp_path, config=config, tensors={"rope_freqs.weight": factors}), "float32")


def test_other_rope_factors(tmp_path):
    assert read_gguf(model(tmp_path, tensors={"rope_freqs.weight": np.ones(4)}), "float32")[0] == CONFIG
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is \[5\], expected \[4\]"):
        read_gguf(model(tmp_path, tensors={"rope_freqs.weight": np.ones(5)}), "float32")
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight"):
        read_gguf(model(tmp_path, tensors={"rope_freqs.weight": np.full(4, np.nan)}), "float32")


REFUSED = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scale_linear": 2.0,
    "rope.scaling.attn_factor": 1.2,
    "rope.dimension_count": 4,
    "attention.value_length": 4,
    "attention.sliding_window": 128,
    "attention.causal": False,
    "attention.clamp_kqv": 8.0,
    "attention.max_alibi_bias": 8.0,
    "attention.scale": 0.1,
    "attn_logit_softcapping": 50.0,
    "embedding_scale": 12.0,
    "expert_count": 8,
    "final_logit_softcapping": 30.0,
    "logit_scale": 0.5,
    "residual_scale": 0.2,
    "use_parallel_residual": True,
}


@pytest.mark.parametrize(("name", "value"), REFUSED.items(), ids=list(REFUSED))
def test_fields_that_change_the_mathematics_are_refused_by_name(tmp_path, name, value):
    path = model(tmp_path, gguf_fields(CONFIG, **{name: value}))
    with pytest.raises(ConfigError, match=rf"model\.gguf cannot be run:\n  - llama\.{name} = "):
        read_gguf(path, "float32")


def test_neutral_fields_pass(tmp_path):
    fields = gguf_fields(
        CONFIG, rope__scaling__type="linear", rope__scaling__factor=1.0, expert_count=0, attention__causal=True,
        attention__sliding_window=512,
    )  # fmt: skip
    assert config_from_gguf(GGUFFile(model(tmp_path, fields))) == CONFIG


def test_missing_fields_and_wrong_types_in_one_error(tmp_path):
    fields = gguf_fields(
        CONFIG, block_count=..., attention__layer_norm_rms_epsilon=..., context_length="512",
        attention__head_count_kv=[2, 1],
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        read_gguf(model(tmp_path, fields | {"tokenizer.ggml.eos_token_id": "</s>"}), "float32")
    message = str(caught.value)
    assert "missing: llama.block_count, llama.attention.layer_norm_rms_epsilon" in message
    for name in ("llama.context_length", "llama.attention.head_count_kv", "tokenizer.ggml.eos_token_id"):
        assert f"  - {name} must be " in message


@pytest.mark.parametrize(
    ("fields", "error", "reason"),
    [
        ({"split.count": 2}, CheckpointError, "one of 2 parts"),
        ({"general.type": "adapter"}, CheckpointError, "holds no model: general.type = 'adapter'"),
    ],
)
def test_files_that_are_no_whole_model(tmp_path, fields, error, reason):
    with pytest.raises(error, match=reason):
        read_gguf(model(tmp_path, gguf_fields(CONFIG) | fields), "float32")


def test_other_architectures_are_refused_by_name(tmp_path):
    path = write_gguf(tmp_path / "g.gguf", {}, {"x": np.ones(3)}, "gemma2")
    with pytest.raises(ConfigError, match=r"general\.architecture = 'gemma2' is not supported; there are: llama"):
        read_gguf(path, "float32")


# --- tensors and files


def test_all_wrong_tensors_in_one_error_before_anything_is_read(tmp_path, monkeypatch):
    path = model(
        tmp_path,
        tensors={
            "output_norm.weight": None,
            "blk.0.ffn_up.weight": np.zeros((48, 96)),
            "blk.0.attn_output.bias": np.zeros(48),
        },
    )
    monkeypatch.setattr(GGUFFile, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(CheckpointError) as caught:
        read_gguf(path, "float32")
    for problem in (
        "missing: output_norm.weight",
        "mis-shaped: blk.0.ffn_up.weight is [48, 96], expected [96, 48]",
        "unused: blk.0.attn_output.bias",
    ):
        assert problem in str(caught.value)


def test_formats_that_are_no_numbers_are_refused_by_name(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for name, value in gguf_fields(CONFIG).items():
        add_field(writer, name, value)
    for name, tensor in gguf_tensors(random_weights(CONFIG), CONFIG).items():
        writer.add_tensor(name, tensor.astype(np.int8) if name == "output_norm.weight" else tensor)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(CheckpointError, match=r"unreadable: output_norm\.weight is I8"):
        read_gguf(tmp_path / "x.gguf", "float32")


def test_numbers_that_are_not_finite_are_named(tmp_path):
    bad = np.ones(48)
    bad[7] = np.inf
    path = model(tmp_path, tensors={"blk.1.ffn_norm.weight": bad})
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_norm\.weight: NaN, infinity"):
        read_gguf(path, "float32")
    path = model(tmp_path, tensors={"blk.1.ffn_norm.weight": np.full(48, 1e5)})
    read_gguf(path, "bfloat16")
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_norm\.weight: .* too large for float16"):
        read_gguf(path, "float16")


def test_every_truncation_is_found(tmp_path):
    config = dataclasses.replace(CONFIG, num_layers=1, width=8, mlp_width=8, num_heads=1, num_kv_heads=1, vocab_size=8)
    path = model(tmp_path, config=config)
    read_gguf(path, "float32")
    whole = path.read_bytes()
    # The end of the file may be padding of the last tensor, so cut behind its last byte.
    end = max(tensor.offset + tensor.num_bytes for tensor in GGUFFile(path).tensors.values())
    for size in [*range(0, end, 23), end - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model\.gguf (is truncated|is no GGUF|cannot be read)"):
            read_gguf(path, "float32")


def test_files_that_are_no_gguf(tmp_path):
    path = tmp_path / "x.gguf"
    with pytest.raises(CheckpointError, match="there is no file"):
        GGUFFile(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        GGUFFile(tmp_path)
    for content, reason in (
        (b"", "cannot be read"),
        (b"PK\x03\x04" + bytes(60), "is no GGUF file"),
        (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "version 1"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "big-endian"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q1sI", 1, b"a", 77), "damaged: metadata of type 77"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", 1 << 62), "truncated"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 1 << 62, 0), "truncated"),
        (struct.pack("<4sIQQQ1sIQIQ", b"GGUF", 3, 1, 0, 1, b"a", 1, 4, 999, 0), "type 999"),
        (struct.pack("<4sIQQQ1sIQIQ", b"GGUF", 3, 1, 0, 1, b"a", 1, 5, 2, 0), r"shape \[5\] cannot be Q4_0"),
        (struct.pack("<4sIQQQ1sIQIQ", b"GGUF", 3, 1, 0, 1, b"a", 1, 1 << 40, 0, 0), "truncated"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=reason):
            GGUFFile(path)


def test_header_agrees_with_the_package(tmp_path):
    fields = gguf_fields(CONFIG) | {
        "a.bool": True, "a.text": "naïve 🙂", "a.numbers": [1, 2, 3], "a.texts": ["x", "", "ü"], "a.floats": [0.5, 1.5],
    }  # fmt: skip
    path = model(tmp_path, fields)
    theirs, ours = gguf.GGUFReader(path), GGUFFile(path)
    for name in fields:
        assert ours.metadata[name] == pytest.approx(theirs.fields[name].contents()), name
    for tensor in theirs.tensors:
        place = ours.tensors[tensor.name]
        assert (place.offset, place.num_bytes, place.format) == (tensor.data_offset, tensor.n_bytes, "F32")
        assert place.shape == tuple(tensor.shape.tolist())[::-1]
