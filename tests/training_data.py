"""A task that a tiny model learns: which word follows which name."""

import json
from pathlib import Path
from typing import Any

ANSWERS = {"Warsaw": "river", "canal": "patent", "article": "dates", "Vistula": "sea"}


def lines(shift: int = 0) -> list[dict[str, str]]:
    """Per name a trajectory of two outputs: the second line goes on where the first one ended."""
    names, answers = list(ANSWERS), list(ANSWERS.values())
    written = []
    for i, name in enumerate(names):
        first = {"input": f"Question: {name}?\nThought 1:", "output": f" the {answers[(i + shift) % len(answers)]}\n"}
        written += [first, {"input": f"{first['input']}{first['output']}Action 1:", "output": " Search["}]
    return written


def write_lines(path: Path, items: list[Any]) -> Path:
    """Objects as JSON, strings as they are, a line each."""
    texts = [item if isinstance(item, str) else json.dumps(item) for item in items]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path
