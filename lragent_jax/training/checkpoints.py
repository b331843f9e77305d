"""States of a training that was not finished: folders that appear whole or not at all, the newest two of them."""

import json
import shutil
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from lragent_jax.models.errors import CheckpointError
from lragent_jax.models.json_file import read_json
from lragent_jax.models.new_folder import new_folder

T = TypeVar("T")

_MANIFEST_FILE = "lragent_training_state.json"
_STATE_FOLDER = "state"
_PREFIX = "step_"
_KEPT = 2


class TrainingCheckpoints:
    """The states of one agent under a folder of their own."""

    def __init__(self, folder: Path):
        self._folder = folder.absolute()

    def save(self, step: int, state: object) -> None:
        """Writes the arrays of `state`, a pytree, as they are behind `step` steps."""
        leaves = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state))}
        with new_folder(self._folder / f"{_PREFIX}{step}", marker=_MANIFEST_FILE, force=True) as draft:
            with ocp.PyTreeCheckpointer() as checkpointer:
                checkpointer.save(draft / _STATE_FOLDER, leaves)
            (draft / _MANIFEST_FILE).write_text(json.dumps({"step": step, "arrays": len(leaves)}) + "\n")
        for old in self._steps()[:-_KEPT]:
            shutil.rmtree(self._folder / f"{_PREFIX}{old}")

    def restore(self, like: T) -> tuple[int, T] | None:
        """(steps done, state) of the newest state, placed as `like` is; None where there is none.

        Raises `CheckpointError` for one that is damaged, or shaped differently.
        """
        if not (steps := self._steps()):
            return None
        folder = self._folder / f"{_PREFIX}{steps[-1]}"
        expected, structure = jax.tree.flatten(like)
        if (arrays := read_json(folder / _MANIFEST_FILE).get("arrays")) != len(expected):
            raise CheckpointError(f"{folder} holds {arrays} arrays, not {len(expected)}; delete it to go on without")
        names = {str(i): 0 for i in range(len(expected))}
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                stored = checkpointer.restore(folder / _STATE_FOLDER, item=names, restore_args=restore_args)
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(f"{folder} is damaged: {error}; delete it to go on from an earlier state") from error
        leaves = []
        for name, leaf in zip(names, expected, strict=True):
            if np.shape(stored[name]) != leaf.shape:
                raise CheckpointError(
                    f"{folder} is damaged: array {name} is {np.shape(stored[name])}, not {leaf.shape}; delete it to "
                    "go on from an earlier state"
                )
            leaves.append(jax.device_put(np.asarray(stored[name], leaf.dtype), leaf.sharding))
        return steps[-1], jax.tree.unflatten(structure, leaves)

    def clear(self) -> None:
        """Deletes all states, and what a kill in the middle of a save has left."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _steps(self) -> list[int]:
        if not self._folder.is_dir():
            return []
        return sorted(int(path.name.removeprefix(_PREFIX)) for path in self._folder.glob(f"{_PREFIX}*"))
