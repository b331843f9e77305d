"""Finished episodes by what they have in common: what tables and plots ask for."""

import dataclasses
from typing import Any

from lragent_jax.react import ROLES
from lragent_jax.sharing import SHARING_MODES
from lragent_jax.study.agent_set import MAIN_KIND, repeated_kinds
from lragent_jax.study.results import Results
from lragent_jax.study.statistics import Estimate, paired_difference, share


@dataclasses.dataclass(frozen=True)
class Group:
    """Cells of one kind, mode and length, by number of hops."""

    cells: tuple[dict[str, Any], ...]

    @property
    def right(self) -> str:
        return "".join(cell["right"] for cell in self.cells)

    @property
    def number(self) -> int:
        return sum(cell["number"] for cell in self.cells)

    @property
    def is_complete(self) -> bool:
        """Whether every number of hops is there: means over some of them would not compare with means over all."""
        return {cell["hops"] for cell in self.cells} in ({None}, {1, 2, 3})

    def accuracy(self) -> Estimate | None:
        return share(self.right) if self.is_complete else None

    def of_hops(self, hops: int) -> Estimate | None:
        """Of the questions with so many hops; where they are mixed, every third one."""
        right = "".join(
            cell["right"][hops - 1 :: 3] if cell["hops"] is None else cell["right"] * (cell["hops"] == hops)
            for cell in self.cells
        )
        return share(right) if right else None

    def difference(self, reference: "Group") -> Estimate | None:
        """To a group of the same questions; None where it has others."""
        same = [_questions(cell) for cell in self.cells] == [_questions(cell) for cell in reference.cells]
        return paired_difference(self.right, reference.right) if same else None

    def mean(self, name: str) -> float:
        """Of a count that cells hold by role, for each episode."""
        return sum(self.sum(name, role) for role in ROLES) / self.number

    def sum(self, name: str, role: str) -> int:
        return sum(cell[name][role] for cell in self.cells)

    def ends(self, end: str) -> float:
        """The share of episodes that ended so."""
        return sum(cell["ends"].get(end, 0) for cell in self.cells) / self.number

    def verdicts_right(self) -> Estimate:
        """Of the episodes that came to an answer, those that reflect judged rightly."""
        finished = sum(cell["ends"].get("finished", 0) for cell in self.cells)
        right = sum(cell["verdict_right"].count("1") for cell in self.cells)
        return share("1" * right + "0" * (finished - right)) if finished else Estimate(0.0, 0.0, 1.0)


class Grid:
    """All episodes of a study."""

    def __init__(self, results: Results):
        self._kinds = results.data["kinds"]
        self._groups: dict[tuple[str, str, int], Group] = {}
        chosen: dict[tuple, dict[str, Any]] = {}
        for cell in results.cells("episodes").values():
            place = (cell["kind"], cell["mode"], cell["tokens"], cell["hops"])
            if place not in chosen or chosen[place]["number"] < cell["number"]:
                chosen[place] = cell
        for kind, mode, tokens in dict.fromkeys(place[:3] for place in chosen):
            cells = [cell for place, cell in chosen.items() if place[:3] == (kind, mode, tokens)]
            self._groups[kind, mode, tokens] = Group(tuple(sorted(cells, key=lambda cell: cell["hops"] or 0)))

    @property
    def kinds(self) -> list[str]:
        """The embedded agents' first, those of a repeated training last."""
        found = dict.fromkeys(kind for kind, _, _ in self._groups)
        again = repeated_kinds(found)
        return sorted(found, key=lambda kind: (kind != MAIN_KIND, kind in again))

    @property
    def first_kinds(self) -> list[str]:
        """Those that are not another kind's training repeated."""
        again = repeated_kinds(self.kinds)
        return [kind for kind in self.kinds if kind not in again]

    def complete_lengths(self, kind: str) -> list[int]:
        """Those at which some mode has answered questions of every number of hops."""
        return sorted({tokens for (of, _, tokens), group in self._groups.items() if of == kind and group.is_complete})

    def lengths(self, kind: str) -> list[int]:
        return sorted({tokens for of, _, tokens in self._groups if of == kind})

    def modes(self, kind: str) -> list[str]:
        found = {mode for of, mode, _ in self._groups if of == kind}
        return [mode for mode in SHARING_MODES if mode in found]

    def group(self, kind: str, mode: str, tokens: int) -> Group | None:
        return self._groups.get((kind, mode, tokens))

    def reference(self, kind: str, tokens: int) -> Group | None:
        """What a kind's modes are compared with at this length."""
        return self.group(self._kinds[kind]["reference"], "none", tokens)


def _questions(cell: dict[str, Any]) -> tuple:
    return cell["hops"], cell["number"], cell["seed"]
