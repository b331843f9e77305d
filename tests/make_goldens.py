"""Writes tests/goldens: what transformers + PEFT compute on the tiny models. Needs torch: python tests/make_goldens.py

To be run again when a family, an adapter or a case changes, or to move to newer libraries; `make test-parity` compares
live, with whatever versions are installed.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import parity_torch
from parity_models import FAMILIES, fingerprint, write_all

FOLDER = Path(__file__).parent / "goldens"
SEED = 0


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            model = parity_torch.TorchModel(*write_all(Path(folder), family, SEED))
            results: dict[str, Any] = parity_torch.results(model, family, SEED)
        np.savez_compressed(FOLDER / f"{family}.npz", **results)
        decoded = {name.split("/")[1]: len(ids) for name, ids in results.items() if name.endswith("greedy_ids")}
        print(f"{family}: {(FOLDER / f'{family}.npz').stat().st_size} bytes, tokens decoded greedily: {decoded}")
    made_with = {"seed": SEED, "numpy": np.__version__, **parity_torch.VERSIONS}
    made_from = {family: fingerprint(family, SEED) for family in FAMILIES}
    text = json.dumps({"made_with": made_with, "fingerprints": made_from}, indent=2)
    (FOLDER / "versions.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
