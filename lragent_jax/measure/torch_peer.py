"""What a user would run instead: transformers + PEFT on random weights of a well-known shape. Needs torch.

A program of its own, so that its memory is gone before JAX asks for any: `python -m lragent_jax.measure.torch_peer`.
Three LoRA adapters on q and v, SDPA, bfloat16 adapters beside bfloat16 weights (PEFT's own default of f32 would be
slower): prefill and greedy decode as they come, eager; then one adapter merged, a static cache, and `torch.compile` of
the decode step (mode "reduce-overhead": CUDA graphs). Weights are drawn where they are used. The last line of standard
output is one line of JSON: medians in seconds, or {"absent": why}.
"""

import argparse
import importlib
import importlib.util
import inspect
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from lragent_jax.models.config import LlamaConfig

PACKAGES = ("torch", "transformers", "peft")
_AGENTS = ("plan", "action", "reflect")


def missing_packages() -> list[str]:
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


class TorchPeer:
    """One Llama with adapters under PEFT, on a CUDA device if there is one."""

    def __init__(self, config: LlamaConfig, rank: int, dtype: str):
        self.torch, transformers, peft = (importlib.import_module(name) for name in PACKAGES)
        self.device = "cuda" if self.torch.cuda.is_available() else "cpu"
        llama = transformers.LlamaConfig(
            num_hidden_layers=config.num_layers, hidden_size=config.width, intermediate_size=config.mlp_width,
            num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim,
            vocab_size=config.vocab_size, max_position_embeddings=config.context_length,
            tie_word_embeddings=config.tied_embeddings, attn_implementation="sdpa",
        )  # fmt: skip
        before = self.torch.get_default_dtype()
        self.torch.set_default_dtype(getattr(self.torch, dtype))
        try:
            with self.torch.device(self.device):
                model = transformers.LlamaForCausalLM(llama).eval()
                lora = peft.LoraConfig(
                    r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], init_lora_weights=False
                )
                self.model = peft.get_peft_model(model, lora, _AGENTS[0], autocast_adapter_dtype=False)
                for agent in _AGENTS[1:]:
                    self.model.add_adapter(agent, lora)
        finally:
            self.torch.set_default_dtype(before)
        self.versions = {name: importlib.import_module(name).__version__ for name in PACKAGES}
        self.static_cache = transformers.StaticCache

    def ids(self, count: int):
        generator = self.torch.Generator().manual_seed(0)
        vocab = self.model.get_input_embeddings().num_embeddings
        return self.torch.randint(0, vocab, (1, count), generator=generator).to(self.device)

    def seconds(self, run: Callable[[], Any], repeats: int) -> float:
        """Median, after one run that does not count."""
        found = []
        for _ in range(1 + repeats):
            self._wait()
            started = time.perf_counter()
            run()
            self._wait()
            found.append(time.perf_counter() - started)
        return statistics.median(found[1:])

    def _wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def prefill_s(self, num_tokens: int, repeats: int) -> float:
        """Under the second adapter, with the logits of the last position only."""
        self.model.set_adapter(_AGENTS[1])
        ids = self.ids(num_tokens)
        with self.torch.inference_mode():
            return self.seconds(lambda: self.model(ids, use_cache=True, logits_to_keep=1).logits, repeats)

    def eager_decode_s(self, context: int, steps: int, repeats: int) -> float:
        """Seconds per token, greedy, over the library's own growing cache."""
        self.model.set_adapter(_AGENTS[1])
        with self.torch.inference_mode():
            out = self.model(self.ids(context), use_cache=True, logits_to_keep=1)
            cache, last = out.past_key_values, [out.logits[:, -1:].argmax(-1)]

            def run() -> None:
                for _ in range(steps):
                    logits = self.model(last[0], past_key_values=cache, use_cache=True).logits
                    last[0] = logits[:, -1:].argmax(-1)

            return self.seconds(run, repeats) / steps

    def merged_decode_s(self, context: int, steps: int, repeats: int) -> float:
        """The same with one adapter merged into the weights, a static cache and a compiled step. Ends this peer."""
        torch = self.torch
        merged = self.model.merge_and_unload(adapter_names=[_AGENTS[1]])
        cache = self.static_cache(config=merged.config, max_cache_len=context + (1 + repeats) * steps)
        takes_positions = "cache_position" in inspect.signature(merged.model.forward).parameters

        def forward(ids, positions):
            more = {"cache_position": positions} if takes_positions else {}
            out = merged(
                ids, position_ids=positions[None], past_key_values=cache, use_cache=True, logits_to_keep=1, **more
            )
            return out.logits.argmax(-1)

        compiled = torch.compile(forward, mode="reduce-overhead")
        with torch.no_grad():  # CUDA graphs write to the cache, which inference tensors do not allow
            positions = torch.arange(context, device=self.device)
            state = [forward(self.ids(context), positions), positions[-1:] + 1]

            def run() -> None:
                for _ in range(steps):
                    state[0] = compiled(state[0].clone(), state[1]).clone()
                    state[1] = state[1] + 1

            return self.seconds(run, repeats) / steps


def measure(
    peer: TorchPeer, prefill: Sequence[int], context: int, steps: int, repeats: int, compiled: bool
) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "versions": peer.versions, "device": peer.device, "context": context,
        "prefill_s": {str(tokens): peer.prefill_s(tokens, repeats) for tokens in prefill},
        "eager_decode_ms": 1e3 * peer.eager_decode_s(context, steps, repeats),
    }  # fmt: skip
    if compiled:
        started = time.perf_counter()
        figures["merged_decode_ms"] = 1e3 * peer.merged_decode_s(context, steps, repeats)
        figures["merged_s"] = time.perf_counter() - started  # compilation included
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-3.1-8b")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prefill", default="4096,8192", help="comma-separated lengths in tokens")
    parser.add_argument("--context", type=int, default=4096, help="of decoding")
    parser.add_argument("--steps", type=int, default=16, help="decoded in one measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true", help="leave out the merged, compiled decode")
    arguments = parser.parse_args()
    if missing := missing_packages():
        print(json.dumps({"absent": f"not installed: {', '.join(missing)}"}))
        return
    started = time.perf_counter()
    peer = TorchPeer(LlamaConfig.preset(arguments.preset), arguments.rank, arguments.dtype)
    made_s = time.perf_counter() - started
    lengths = [int(length) for length in arguments.prefill.split(",")]
    figures = measure(
        peer, lengths, arguments.context, arguments.steps, arguments.repeats, not arguments.no_compile
    )  # fmt: skip
    print(json.dumps(figures | {"made_s": made_s}))


if __name__ == "__main__":
    main()
