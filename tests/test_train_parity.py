"""What was trained here runs in transformers + PEFT to the same logits. `make test-parity` runs it."""

import numpy as np
from test_parity import parity_torch, pytestmark  # noqa: F401  (a fixture, and the mark of every such test)
from text_models import tokenizer, write_text_model
from tolerances import assert_close
from training_data import lines, write_lines

from lragent_jax.engine import Engine
from lragent_jax.models.adapter_bank import TARGETS
from lragent_jax.training.options import TrainingOptions
from lragent_jax.training.trainer import train


def test_peft_loads_what_was_trained(parity_torch, tmp_path):  # noqa: F811
    model, data = write_text_model(tmp_path / "model"), write_lines(tmp_path / "plan.jsonl", lines())
    options = TrainingOptions(
        rank=4, alpha=6, targets=TARGETS, steps=12, learning_rate=3e-2, tokens_per_step=128, sequence_length=64,
        dtype="float32",
    )  # fmt: skip
    result = train(model, {"plan": data}, tmp_path / "out", options=options)["plan"]
    theirs = parity_torch.TorchModel(model, {"plan": tmp_path / "out" / "plan"})
    ids = tokenizer().encode(lines()[1]["input"] + lines()[1]["output"], add_bos=True)
    want = theirs.logits(ids, "plan")
    engine = Engine.from_pretrained(
        model, {"plan": tmp_path / "out" / "plan.orbax"}, dtype="float32", sharing="none", num_pages=32, page_size=16
    )
    with engine.trajectory().append(ids[:1]) as trajectory:
        got = [*engine.score(trajectory, ids[1:], "plan"), engine.next_token_logits(trajectory, "plan")]
    assert_close(np.stack(got), want, "parity")
    assert np.abs(want - theirs.logits(ids, None)).max() > 1, "an adapter that changes nothing compares nothing"
    assert result["train_loss"] < 4
