"""The agents that ship, on the model they were trained for: transformers + PEFT give the logits of mode `none`.

The base is what our GGUF reader made of it, written out for transformers: quantised files are not what is compared.
"""

import importlib
import importlib.util
from pathlib import Path

import model_folders
import numpy as np
import pytest
from tolerances import assert_close

from lragent_jax import embedded
from lragent_jax.models.folder import read_config, read_model
from lragent_jax.react import ROLES
from lragent_jax.world.oracle import play
from lragent_jax.world.question import make_questions
from lragent_jax.world.transcript import text_of

pytestmark = [
    pytest.mark.parity,
    # PEFT 0.21 asks transformers 5.23 for a property under its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # It asks the hub about the base that the adapters name, and does without an answer.
    pytest.mark.filterwarnings("ignore:Unable to fetch remote file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]


@pytest.fixture(scope="module")
def theirs(request, tmp_path_factory):
    missing = [name for name in ("torch", "peft", embedded.MODEL_PACKAGE) if importlib.util.find_spec(name) is None]
    if missing and (request.config.option.markexpr != "parity" or missing == [embedded.MODEL_PACKAGE]):
        pytest.skip(f"not installed: {', '.join(missing)}")
    folder = write_base(tmp_path_factory.mktemp("base"))
    return importlib.import_module("parity_torch").TorchModel(folder, embedded.adapter_folders())


def write_base(folder: Path) -> Path:
    """The embedded model as a Hugging Face folder."""
    config = read_config(embedded.find_model())
    assert config.tied_embeddings
    assert config.rope_scaling is None
    fields = model_folders.config_json(
        hidden_size=config.width, intermediate_size=config.mlp_width, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads, vocab_size=config.vocab_size,
        max_position_embeddings=config.context_length, rms_norm_eps=config.norm_eps, rope_theta=config.rope_theta,
        tie_word_embeddings=True,
    )  # fmt: skip
    _, _, params = read_model(embedded.find_model(), "float32")
    return model_folders.write_huggingface(
        folder, fields, model_folders.huggingface_tensors(model_folders.flat(params))
    )


def test_every_agent_agrees_on_an_episode(theirs):
    engine = embedded.embedded_engine("none", dtype="float32", num_pages=32)
    assert engine.tokenizer is not None
    [question] = make_questions("evaluation", 1, 0, num_hops=1)
    ids = engine.tokenizer.encode(text_of(play(question)), add_bos=True)
    found = {}
    for agent in (None, *ROLES):
        with engine.trajectory().append(ids[:1]) as trajectory:
            found[agent] = engine.score(trajectory, ids[1:], agent)
        assert_close(found[agent], theirs.logits(ids, agent)[:-1], "parity")
    for agent in ROLES:
        assert np.abs(found[agent] - found[None]).max() > 1, "the adapter does something"
