"""`lragent generate`: one agent goes on from a prompt."""

import dataclasses
import itertools
import json as json_module
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lragent_jax.cli import options
from lragent_jax.cli.console import labelled, progress_bar, stderr
from lragent_jax.models.errors import InputError

if TYPE_CHECKING:
    from lragent_jax.engine import Engine
    from lragent_jax.outputs import GenerationOutput, StreamPiece


def generate(
    model: options.EmbeddedModel = None,
    adapter: options.Adapters = [],  # noqa: B006  (read only)
    agent: Annotated[
        str | None, typer.Option(help="The adapter to run; without it the base model.", show_default=False)
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to go on from.", show_default=False)] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="A file with that text.", show_default=False)
    ] = None,
    token_ids: Annotated[
        str | None, typer.Option(help="Token ids, separated by commas, instead of text.", show_default=False)
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the text into the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many tokens only; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this mass only.")] = 1.0,
    seed: int = 0,
    stop: Annotated[list[str], typer.Option(help="Text that ends the output; repeatable.")] = [],  # noqa: B006
    sharing: Annotated[str, typer.Option(help="The sharing mode.")] = "base_lr",
    recompute_layers: options.RecomputeLayers = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes.")] = False,
    dtype: options.Dtype = None,
    num_pages: options.NumPages = None,
    page_size: options.PageSize = None,
    tensor_parallel: options.TensorParallel = 1,
    json: options.Json = False,
) -> None:
    """Generate with one agent. The text comes from --prompt, --file or standard input."""
    if sum(given is not None for given in (prompt, file, token_ids)) > 1:
        raise typer.BadParameter("give one of --prompt, --file and --token-ids")
    if chat and token_ids is not None:
        raise typer.BadParameter("--chat puts text into a template; it does not go with --token-ids")
    if stream and json:
        raise typer.BadParameter("--json prints one line at the end; it does not go with --stream")
    given, mode = options.name_path_pairs(adapter, "--adapter"), options.sharing_mode(sharing)
    layers = options.recompute_layers(recompute_layers, [mode])
    context = options.integers(token_ids, "--token-ids") if token_ids is not None else _text(prompt, file)
    from lragent_jax import compilation_cache
    from lragent_jax.adapter_registry import unknown_agent
    from lragent_jax.compile_watch import CompileWatch
    from lragent_jax.engine import Engine
    from lragent_jax.sampling_params import SamplingParams

    path, adapters = options.model_and_adapters(model, given)
    if agent is not None and agent not in adapters:
        raise unknown_agent(agent, adapters)
    if not context:
        raise InputError("there is no text: --prompt, --file or standard input is empty")
    params = SamplingParams(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=tuple(stop)
    )
    compilation_cache.enable()
    with progress_bar() as progress:
        progress(0, 0, "reading the model")
        engine = Engine.from_pretrained(
            path, adapters, dtype=dtype, sharing="full", num_pages=1, page_size=page_size, recompute_layers=layers,
            tensor_parallel=tensor_parallel, progress=labelled(progress, "reading the model"),
        )  # fmt: skip
        if chat and isinstance(context, str):
            context = _in_chat_template(engine, context)
        ids = engine.trajectory().append(context).token_ids
        engine = engine.with_sharing(mode, **_pool_sizes(engine, len(ids) + max_new_tokens, num_pages))
        trajectory = engine.trajectory().append(ids)
        progress(0, 0, "compiling and generating")
        with CompileWatch() as watch:
            pieces = engine.stream(trajectory, agent, params) if stream else iter(())
            begun = list(itertools.islice(pieces, 2))  # behind the second piece nothing is left to compile
            output = None if stream else engine.generate(trajectory, agent, params)
    if output is None:
        output = _print_stream(engine, itertools.chain(begun, pieces))
    elif not json:
        print(_shown(output.text, output.token_ids))
    if json:
        print(json_module.dumps(dataclasses.asdict(output)))
    else:
        summary = _summary(output) + (", compilation included" if watch.num_programs else "")
        stderr().print(summary, style="dim", highlight=False, soft_wrap=True)


def _text(prompt: str | None, file: Path | None) -> str:
    if prompt is not None:
        return prompt
    if file is None and sys.stdin.isatty():
        raise typer.BadParameter("give --prompt, --file or --token-ids, or text on standard input")
    try:
        return sys.stdin.buffer.read().decode() if file is None else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the prompt cannot be read: {error}") from error


def _in_chat_template(engine: "Engine", text: str) -> str:
    if engine.tokenizer is None:
        raise InputError("this model came without a tokenizer: give token ids instead of text")
    return engine.tokenizer.apply_chat_template([{"role": "user", "content": text}])


def _pool_sizes(engine: "Engine", num_tokens: int, num_pages: int | None) -> dict[str, int]:
    """A trajectory of this length, whoever reads it; no more than the model can take."""
    if num_pages is not None:
        return {"num_pages": num_pages}
    num_tokens = min(num_tokens, engine.config.context_length)
    return {"num_pages": -(-num_tokens // engine.cache_stats().page_size)}


def _print_stream(engine: "Engine", pieces: Iterable["StreamPiece"]) -> "GenerationOutput":
    output = None
    for piece in pieces:
        print(_shown(piece.text if engine.tokenizer else None, piece.token_ids), end="", flush=True)
        output = piece.output
    assert output is not None, "the last piece carries the output"
    print()
    return output


def _shown(text: str | None, token_ids: list[int]) -> str:
    """Text, or ids where there is no tokenizer."""
    return text if text is not None else " ".join(map(str, token_ids)) + " "


def _summary(output: "GenerationOutput") -> str:
    speed = ""
    if len(output.token_ids) > 1:
        speed = f", then {(len(output.token_ids) - 1) / (output.latency_s - output.ttft_s):.1f} tokens/s"
    return (
        f"{len(output.token_ids)} tokens ({output.finish_reason}), {output.num_prefilled_tokens} prefilled, "
        f"first token after {output.ttft_s:.2f} s{speed}"
    )
