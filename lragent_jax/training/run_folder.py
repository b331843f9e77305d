"""The folder that a training writes: what was asked for, agents that are done, and states of the one that is not."""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lragent_jax.models.adapter import Adapter
from lragent_jax.models.adapter_checkpoint import save_adapter
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import CheckpointError, InputError
from lragent_jax.models.json_file import read_json
from lragent_jax.models.peft import WEIGHTS_FILE, read_peft, write_peft
from lragent_jax.models.peft_config import CONFIG_FILE
from lragent_jax.models.problems import listing
from lragent_jax.training.agent_run import AgentResult
from lragent_jax.training.checkpoints import TrainingCheckpoints

MANIFEST_FILE = "lragent_training.json"
LOSSES_FILE = "losses.jsonl"
RESULT_FILE = "training.json"
FORMAT = "lragent-training"
VERSION = 1

_CHECKPOINTS_FOLDER = "checkpoints"
_ORBAX_SUFFIX = ".orbax"


def check_agent_names(agents: Sequence[str]) -> None:
    """Raises `InputError` for names that do not make folders of their own."""
    if not agents:
        raise InputError("there is no agent to train")
    for name in agents:
        if name in ("", ".", "..") or Path(name).name != name or name.startswith("."):
            raise InputError(f"{name!r} cannot be the name of a folder; call the agent something else")
        if name in (_CHECKPOINTS_FOLDER, MANIFEST_FILE, LOSSES_FILE) or name.endswith(_ORBAX_SUFFIX):
            raise InputError(
                f"{name!r} is the name of something else in the folder of a training; call the agent something else"
            )


class RunFolder:
    """OUT: a manifest, per agent a PEFT folder with its losses and an Orbax adapter, and states of unfinished ones.

    The losses of agents that are trained at once are one file beside their folders.
    """

    def __init__(self, out: str | os.PathLike):
        """Raises `CheckpointError` if `out` is there and is no folder of a training, or could not be written."""
        self.path = Path(out).absolute()
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"{self.path} is a file; name a folder to write")
        if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / MANIFEST_FILE).is_file():
            raise CheckpointError(
                f"{self.path} holds other things (no {MANIFEST_FILE}) and is not written to; name another folder"
            )
        there = next(folder for folder in (self.path, *self.path.parents) if folder.exists())
        if not os.access(there, os.W_OK):
            raise CheckpointError(f"{self.path} cannot be made: {there} is not writable; name another folder")

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises one `CheckpointError` that lists how a training begun here differs from `settings`.

        Settings that are not known yet may be left out, each as a whole.
        """
        if not (self.path / MANIFEST_FILE).is_file():
            return
        manifest = read_json(self.path / MANIFEST_FILE)
        if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
            raise CheckpointError(
                f"{self.path / MANIFEST_FILE} is not of the format {FORMAT}, version {VERSION}; name another folder"
            )
        stored = manifest.get("settings", {})
        there = _flat({name: stored[name] for name in settings if name in stored})
        here = _flat(json.loads(json.dumps(settings)))
        names = [name for name in here | there if name not in there or name not in here or there[name] != here[name]]
        if problems := [f"{name}: {_shown(there, name)} there, {_shown(here, name)} now" for name in names]:
            raise CheckpointError(
                listing(
                    f"{self.path} holds a training of other settings; ask for these or name another folder:", problems
                )
            )

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Writes the manifest, unless a training of the same settings was begun here before."""
        self.check(settings)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be made: {error}; name another folder") from error
        if not (self.path / MANIFEST_FILE).is_file():
            _write_json(self.path / MANIFEST_FILE, {"format": FORMAT, "version": VERSION, "settings": settings})

    def losses(self, agent: str | None) -> Path:
        """One agent's; None: those of all agents that are trained at once."""
        return (self.path if agent is None else self.path / agent) / LOSSES_FILE

    def checkpoints(self, agent: str) -> TrainingCheckpoints:
        return TrainingCheckpoints(self.path / _CHECKPOINTS_FOLDER / agent)

    def finished(self, agent: str) -> dict[str, Any] | None:
        """What was written of an agent's result, if it is done."""
        path = self.path / agent / RESULT_FILE
        return read_json(path) if path.is_file() else None

    def adapter(self, agent: str, config: LlamaConfig) -> Adapter:
        """The adapter of an agent that is done."""
        return read_peft(self.path / agent, config)

    def finish(
        self,
        agent: str,
        adapter: Adapter,
        config: LlamaConfig,
        alpha: int | float,
        base_model: str | None,
        result: AgentResult,
    ) -> dict[str, Any]:
        """Writes an agent's adapter, as PEFT and as Orbax, and its result; its states go."""
        folder, draft = self.path / agent, self.path / f".{agent}.peft"
        folder.mkdir(exist_ok=True)
        write_peft(draft, adapter, config, base_model=base_model, alpha=alpha, force=True)
        for file in (WEIGHTS_FILE, CONFIG_FILE):
            os.replace(draft / file, folder / file)
        draft.rmdir()
        written = self.adapter(agent, config)
        save_adapter(self.path / f"{agent}{_ORBAX_SUFFIX}", written, force=True)
        described = dataclasses.asdict(result) | {
            "content_hash": written.content_hash,
            "a_group": written.a_group_hash,
        }
        _write_json(folder / RESULT_FILE, described)
        self.clear_checkpoints(agent)
        return described

    def clear_checkpoints(self, agent: str) -> None:
        self.checkpoints(agent).clear()
        checkpoints = self.path / _CHECKPOINTS_FOLDER
        if checkpoints.is_dir() and not any(checkpoints.iterdir()):
            shutil.rmtree(checkpoints)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    """The file appears whole or not at all."""
    draft = path.with_name(f".{path.name}")
    draft.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, path)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects by dotted name."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {
        name: leaf for key in value for name, leaf in _flat(value[key], f"{prefix}.{key}" if prefix else key).items()
    }


def _shown(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else "nothing"
