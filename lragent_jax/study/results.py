"""A study's results: one JSON file that is whole at all times, and grows cell by cell."""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lragent_jax.models.errors import InputError

FORMAT, VERSION = "lragent-study", 1


class Results:
    """Cells by part and key, what they were measured with, and the sets of agents they belong to.

    Raises `InputError` for a file that is no study, and whenever what is to be measured does not go with what is in
    it. Everything that is added is on disk when the call returns; an interrupted one changes nothing.
    """

    def __init__(self, path: str | Path, *, fresh: bool = False):
        self.path = Path(path)
        self.data: dict[str, Any] = {"format": FORMAT, "version": VERSION, "settings": {}, "kinds": {}, "cells": {}}
        if not fresh and self.path.exists():
            self.data = _read(self.path)

    @classmethod
    def existing(cls, path: str | Path) -> "Results":
        """Those of a file that is there: to whoever only reads it, a mistyped name is no empty study."""
        if not Path(path).is_file():
            raise InputError(f"there is no file {path} with results of a study; name one that was measured into")
        return cls(path)

    def cells(self, part: str) -> dict[str, dict[str, Any]]:
        return self.data["cells"].get(part, {})

    def has(self, part: str, key: str) -> bool:
        return key in self.cells(part)

    def add(self, part: str, cells: Mapping[str, dict[str, Any]]) -> None:
        self.data["cells"].setdefault(part, {}).update(cells)
        self.save()

    def use_settings(self, settings: Mapping[str, Any]) -> None:
        """What decides results is the same for all cells."""
        before = self.data["settings"]
        for name, value in settings.items():
            if name in before and before[name] != value:
                raise InputError(
                    f"{self.path} was measured with {name} {before[name]!r}, and this is {value!r}: "
                    "name another file, or start it anew (--fresh)"
                )
        before.update(settings)

    def use_agents(self, name: str, identity: Mapping[str, Any]) -> None:
        """Agents of one kind are the same adapters in all cells."""
        before = self.data["kinds"].setdefault(name, dict(identity))
        if before["adapters"] != identity["adapters"]:
            different = [role for role, value in identity["adapters"].items() if before["adapters"].get(role) != value]
            raise InputError(
                f"{self.path} has results of {name} with other adapters ({', '.join(different)} differ): give these "
                f"another name, name another file, or forget those results (--drop {name})"
            )

    def drop(self, dropped_kinds: Collection[str]) -> None:
        """Forgets kinds of agents, those stacked from them, and all that was measured of them.

        Raises `InputError`, and forgets nothing, where there is nothing of one of them.
        """
        kinds = self.data["kinds"]
        if unknown := [kind for kind in dropped_kinds if kind not in kinds]:
            raise InputError(f"{self.path} has no results of {', '.join(unknown)} to drop; it has: {', '.join(kinds)}")
        dropped = {name for name, of in kinds.items() if {name, of["reference"]} & set(dropped_kinds)}
        for name in dropped:
            del kinds[name]
        for part, cells in self.data["cells"].items():
            self.data["cells"][part] = {key: cell for key, cell in cells.items() if cell["kind"] not in dropped}
        self.save()

    def merge(self, other: "Results") -> None:
        """Takes the cells of `other` that this one lacks; both must belong to the same study and the same agents."""
        self.use_settings(other.data["settings"])
        for name, identity in other.data["kinds"].items():
            self.use_agents(name, identity)
        runs = self.data.setdefault("runs", [])
        runs += [run for run in other.data.get("runs", []) if run not in runs]
        for part, cells in other.data["cells"].items():
            self.data["cells"][part] = dict(cells) | self.cells(part)
        self.save()

    def save(self) -> None:
        draft = self.path.with_name(f".{self.path.name}.draft")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("w") as file:
                json.dump(self.data, file, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self.path)
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as the results of a study: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
        raise InputError(f"{path} holds no results of a study of this version; name another file, or pass --fresh")
    return data
