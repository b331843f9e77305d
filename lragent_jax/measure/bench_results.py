"""One JSON file in which the results of several runs meet: traces by C, profiles by name, one of each other kind."""

import json
from pathlib import Path
from typing import Any

Results = dict[str, Any]


def merged(old: Results, new: Results) -> Results:
    """What is new replaces what is old, kind by kind; each trace and each profile by itself."""
    result = {**old, **new}
    for kind in ("trace", "profile"):
        if kind in result:
            result[kind] = {**old.get(kind, {}), **new.get(kind, {})}
    if "trace" in result:
        result["trace"] = {chunk: result["trace"][chunk] for chunk in sorted(result["trace"], key=int)}
    return result


def read(path: Path) -> Results:
    """The file's results; none if there is no such file yet."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, results: Results) -> None:
    """The file is whole at all times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(results, indent=1) + "\n")
    draft.replace(path)
