"""transformers + PEFT as a peer in benchmarks: runs at toy sizes, with adapters that count. Needs torch."""

import pytest

# PEFT calls transformers by a name that is on its way out.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")]


@pytest.fixture(scope="module")
def peer():
    from lragent_jax.measure.torch_peer import TorchPeer
    from lragent_jax.models.config import LlamaConfig

    return TorchPeer(LlamaConfig.preset("tiny"), rank=4, dtype="float32")


def test_figures(peer):
    from lragent_jax.measure.torch_peer import measure

    figures = measure(peer, [8, 16], context=8, steps=2, repeats=1, compiled=False)
    assert set(figures["prefill_s"]) == {"8", "16"}
    assert all(seconds > 0 for seconds in (*figures["prefill_s"].values(), figures["eager_decode_ms"]))


def test_adapters_are_three_and_none_is_merged(peer):
    import torch  # pyright: ignore[reportMissingImports]

    ids = peer.ids(8)
    logits = []
    with torch.inference_mode():
        for agent in ("plan", "action", "reflect"):
            peer.model.set_adapter(agent)
            logits.append(peer.model(ids).logits)
        with peer.model.disable_adapter():
            logits.append(peer.model(ids).logits)
    assert all(float((a - b).abs().max()) > 1e-3 for i, a in enumerate(logits) for b in logits[:i])


def test_merging_keeps_what_the_adapter_computes(peer):
    """Last: it ends the peer. The step is not compiled here, which takes minutes on a CPU."""
    import torch  # pyright: ignore[reportMissingImports]

    peer.model.set_adapter("action")
    context = 8
    with torch.inference_mode():
        out = peer.model(peer.ids(context), use_cache=True)
        cache, last, want = out.past_key_values, out.logits[:, -1:].argmax(-1), []
        for _ in range(4):
            want.append(int(last))
            out = peer.model(last, past_key_values=cache, use_cache=True)
            last = out.logits[:, -1:].argmax(-1)
    seen = []
    compiled = torch.compile

    def eager(forward, mode):
        seen.append(mode)

        def step(ids, positions):
            seen.append(int(ids))
            return forward(ids, positions)

        return step

    torch.compile = eager
    try:
        assert peer.merged_decode_s(context, steps=2, repeats=1) > 0
    finally:
        torch.compile = compiled
    assert seen == ["reduce-overhead", *want]
