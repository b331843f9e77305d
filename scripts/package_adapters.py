"""Puts trained agents into the package: the output of a training as bf16 PEFT folders, and a README about them.

    python scripts/package_adapters.py RUN --made-by "lragent world …" --made-by "lragent train …"

RUN is what `lragent train` or `scripts/train.py` wrote: plan, action and reflect as PEFT folders, each with its
training.json. They replace `lragent_jax/data/adapters`. Rounded to bf16, adapters of one A-group still are one. The
last line on standard output is JSON.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lragent_jax.embedded import ADAPTERS, BASE_MODEL, find_model
from lragent_jax.models.adapter import Adapter
from lragent_jax.models.adapter_checkpoint import read_adapter
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import CheckpointError, LRAgentError
from lragent_jax.models.folder import read_config
from lragent_jax.models.json_file import read_json
from lragent_jax.models.peft import WEIGHTS_FILE, read_peft, write_peft
from lragent_jax.models.peft_config import CONFIG_FILE
from lragent_jax.react import ROLES
from lragent_jax.training.run_folder import MANIFEST_FILE, RESULT_FILE

_SETTINGS = ("kind", "rank", "alpha", "targets", "steps", "epochs", "learning_rate", "tokens_per_step", "seed")

_JOINT_NOTE = """All three were trained in the same steps, on the cache that they share. Validation: where that
is shared (mode `base_lr`), and behind it where each agent has run every token itself (mode `none`)."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, default=ADAPTERS, help="by default where the package looks for them")
    parser.add_argument("--model", type=Path, help="by default the embedded one, SmolLM2-135M-Instruct")
    parser.add_argument("--base-model", default=BASE_MODEL, help="its name on the Hugging Face hub")
    parser.add_argument("--made-by", action="append", default=[], metavar="COMMAND", help="for the README; repeatable")
    arguments = parser.parse_args(argv)
    try:
        config = read_config(arguments.model or find_model())
        written = package(arguments.run, arguments.out, config, arguments.base_model, arguments.made_by)
    except LRAgentError as error:
        sys.exit(f"error: {error}")
    print(json.dumps({role: adapter.content_hash for role, adapter in written.items()}))


def package(run: Path, out: Path, config: LlamaConfig, base_model: str, commands: Sequence[str]) -> dict[str, Adapter]:
    """Writes a folder for each agent, and the README; returns the adapters as they are read back.

    Raises `CheckpointError` and `AdapterError`, before anything is written, for what is missing or does not fit.
    """
    results = {role: _result(run / role) for role in ROLES}
    adapters = {role: read_adapter(run / role, config) for role in ROLES}
    out.mkdir(parents=True, exist_ok=True)
    for role, adapter in adapters.items():
        alpha = read_json(run / role / CONFIG_FILE)["lora_alpha"]
        write_peft(out / role, adapter, config, base_model=base_model, alpha=alpha, dtype="bfloat16", force=True)
    written = {role: read_peft(out / role, config) for role in ROLES}
    settings = read_json(run / MANIFEST_FILE).get("settings", {}) if (run / MANIFEST_FILE).is_file() else {}
    (out / "README.md").write_text(_readme(base_model, commands, settings, results, written, out))
    return written


def _result(folder: Path) -> dict[str, Any]:
    if not (folder / RESULT_FILE).is_file():
        raise CheckpointError(f"{folder} lacks {RESULT_FILE}: it is no agent that `lragent train` has finished")
    return read_json(folder / RESULT_FILE)


def _readme(
    base_model: str,
    commands: Sequence[str],
    settings: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    adapters: Mapping[str, Adapter],
    out: Path,
) -> str:
    groups = len({adapter.a_group_hash for adapter in adapters.values()})
    shown = ", ".join(f"{name} {_text(settings[name])}" for name in _SETTINGS if settings.get(name) is not None)
    lines = [
        "# The embedded agents",
        "",
        f"LoRA adapters for {base_model}, as PEFT folders in bfloat16,",
        f"{'one A-group' if groups == 1 else f'{groups} A-groups'}: plan writes thoughts and names tools, "
        "action writes their arguments, reflect judges the answer, in",
        "episodes about the made-up world of `lragent world`. Licence: Apache-2.0, as the base model and the package.",
        "",
        *(["```", *commands, "```", ""] if commands else []),
        *([f"Settings: {shown}.", ""] if shown else []),
        *([_JOINT_NOTE, ""] if settings.get("kind") == "joint" else []),
        "| agent | ranks | steps | tokens | validation loss | output tokens right | bytes | content hash |",
        "|---|---|---:|---:|---:|---:|---:|---|",
        *(_row(role, results[role], adapters[role], out / role / WEIGHTS_FILE) for role in ROLES),
    ]
    return "\n".join(lines) + "\n"


def _row(role: str, result: Mapping[str, Any], adapter: Adapter, weights: Path) -> str:
    shares = (result["validation_accuracy"], result.get("separate_accuracy"))
    losses = (result["validation_loss"], result.get("separate_loss"))
    cells = (
        role,
        ", ".join(f"{target} {adapter.rank(target)}" for target in adapter.targets),
        f"{result['steps']:,}",
        f"{result['tokens']:,}",
        " / ".join(f"{loss:.4f}" for loss in losses if loss is not None),
        " / ".join(f"{100 * share:.2f} %" for share in shares if share is not None),
        f"{weights.stat().st_size:,}",
        f"`{adapter.content_hash[:16]}`",
    )
    return f"| {' | '.join(cells)} |"


def _text(value: Any) -> str:
    return " and ".join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    main()
