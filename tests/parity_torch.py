"""The other side of the comparison: transformers + PEFT in f32. Needs torch."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import parity_cases as cases
import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
import transformers
from parity_cases import TRAJECTORY
from safetensors.numpy import load_file

# Models as small as these run ten times slower on several threads.
torch.set_num_threads(1)

VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}


class TorchModel:
    """A Hugging Face folder and PEFT folders by agent, run by the libraries themselves."""

    def __init__(self, folder: Path, adapters: Mapping[str, Path]):
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        self.base, loading = loaded
        assert not any(loading.values()), f"transformers did not take the folder as it is: {loading}"
        self.base.eval()
        self.peft = None
        for name, adapter in adapters.items():
            if self.peft is None:
                self.peft = peft.PeftModel.from_pretrained(self.base, adapter, adapter_name=name)
            else:
                self.peft.load_adapter(adapter, name)
            taken = set(peft.get_peft_model_state_dict(self.peft, adapter_name=name))
            assert taken == set(load_file(adapter / "adapter_model.safetensors")), f"PEFT did not take {name} as it is"

    @contextlib.contextmanager
    def running(self, agent: str | None) -> Iterator[torch.nn.Module]:
        """The model under an agent's adapter, None for the base."""
        with torch.no_grad():
            if self.peft is None:
                assert agent is None, f"no adapters are loaded, so there is no {agent}"
                yield self.base
            elif agent is None:
                with self.peft.disable_adapter():
                    yield self.peft
            else:
                self.peft.set_adapter(agent)
                yield self.peft

    def logits(self, ids: Sequence[int], agent: str | None) -> np.ndarray:
        """f32 [T, V], without a cache."""
        with self.running(agent) as model:
            return model(torch.tensor([list(ids)]), use_cache=False).logits[0].numpy()

    def decode(self, prompt: Sequence[int], agent: str | None, forced: Sequence[int] | None, count: int):
        """Token by token over the library's own cache: (ids, logits f32 [ids + 1, V]), row i behind i ids.

        Takes the ids of `forced`, or else the best one until `count` or until none leads by more than `MARGIN`.
        """
        with self.running(agent) as model:
            out = model(torch.tensor([list(prompt)]), use_cache=True)
            ids: list[int] = []
            rows = [out.logits[0, -1].numpy()]
            while len(ids) < count:
                second, first = np.sort(rows[-1])[-2:]
                if forced is None and first - second <= cases.MARGIN:
                    break
                ids.append(int(np.argmax(rows[-1])) if forced is None else forced[len(ids)])
                out = model(torch.tensor([ids[-1:]]), past_key_values=out.past_key_values, use_cache=True)
                rows.append(out.logits[0, -1].numpy())
        return ids, np.stack(rows)


def results(model: TorchModel, family: str, seed: int) -> dict[str, np.ndarray]:
    """Everything that is compared for a family; see `parity_cases` for the names."""
    out = {f"submodule/{name}": array for name, array in _submodules(model, seed).items()}
    for agent in cases.decode_agents(family):
        out |= {f"decode/{agent}/{name}": array for name, array in _decode(model, agent, seed).items()}
    for set_name in cases.adapter_sets(family):
        out |= {f"trajectory/{set_name}/{name}": array for name, array in _trajectory(model, set_name, seed).items()}
    return out


def _submodules(model: TorchModel, seed: int) -> dict[str, np.ndarray]:
    with model.running(None):
        llama = model.base.model
        layer, width = llama.layers[1], llama.config.hidden_size
        x, small = (torch.tensor(cases.hidden(seed, width, scale)) for scale in (1.0, 0.01))
        positions = torch.arange(x.shape[1])[None]
        causal = torch.full((1, 1, x.shape[1], x.shape[1]), -torch.inf).triu(1)
        attended, _ = layer.self_attn(x, position_embeddings=llama.rotary_emb(x, positions), attention_mask=causal)
        cos, sin = llama.rotary_emb(x, torch.tensor(cases.ROTARY_POSITIONS)[None])
        out = {
            "embed": llama.embed_tokens(torch.tensor([cases.submodule_ids(seed)])),
            "norm": layer.input_layernorm(x),
            "norm_of_small": layer.input_layernorm(small),
            "cos": cos[..., : cos.shape[-1] // 2],  # the two halves are the same
            "sin": sin[..., : sin.shape[-1] // 2],
            "attention": attended,
            "mlp": layer.mlp(x),
            "unembed": model.base.lm_head(x[:, :2]),
        }
        return {name: tensor.numpy() for name, tensor in out.items()}


def _decode(model: TorchModel, agent: str | None, seed: int) -> dict[str, np.ndarray]:
    prompt = cases.prompt_ids(seed)
    _, forced = model.decode(prompt, agent, cases.forced_ids(seed), cases.DECODED_LENGTH)
    greedy_ids, greedy = model.decode(prompt, agent, None, cases.DECODED_LENGTH)
    return {
        "prompt": model.logits(prompt, agent)[list(cases.PROMPT_ROWS)],
        "forced": forced[list(cases.FORCED_ROWS)],
        "greedy_ids": np.asarray(greedy_ids, np.int32),
        "greedy": greedy[[row for row in cases.GREEDY_ROWS if row <= len(greedy_ids)]],
    }


def _trajectory(model: TorchModel, set_name: str, seed: int) -> dict[str, np.ndarray]:
    """Every agent reads everything under its own adapter: what mode `none` must do."""
    out: dict[str, np.ndarray] = {}
    context: list[int] = []
    for index, event in enumerate(TRAJECTORY):
        agent = cases.agent_name(set_name, event.role)
        if event.kind == "append":
            context += cases.event_ids(seed, index)
        elif event.kind == "score":
            ids, length = cases.event_ids(seed, index), len(context)
            context += ids
            out[f"{index}/logits"] = model.logits(context, agent)[length - 1 : -1][cases.score_rows(event.num_tokens)]
        elif event.kind == "generate":
            ids, rows = model.decode(context, agent, None, event.num_tokens)
            context += ids
            out |= {f"{index}/ids": np.asarray(ids, np.int32), f"{index}/logits": rows[-1]}
        else:
            out[f"{index}/logits"] = model.logits(context, agent)[-1]
    return out
