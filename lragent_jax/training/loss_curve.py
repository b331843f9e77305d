"""Losses as they come, a JSON line each: what a plot is drawn from."""

import json
import os
from pathlib import Path
from typing import Any


class LossCurve:
    """The file of one agent. Lines are on disk as soon as they are added."""

    def __init__(self, path: Path, steps_done: int):
        """Goes on behind `steps_done` steps: lines of later ones, which are run again, are dropped."""
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_losses(path) if line["step"] <= steps_done] if steps_done else []
        draft = path.with_name(f".{path.name}")
        draft.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(draft, path)  # a kill in here must not cost the lines of steps that are not run again

    def add(self, **values: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def read_losses(path: Path) -> list[dict[str, Any]]:
    """The lines of a loss file. One that a kill left unfinished at its end is no line; no file is no lines."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]
