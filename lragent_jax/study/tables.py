"""The tables of a study in Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lragent_jax.react import ROLES
from lragent_jax.recording import OUTPUT_KINDS
from lragent_jax.sharing import SHARING_MODES
from lragent_jax.study.agent_set import repeated, repeated_kinds
from lragent_jax.study.grid import Grid, Group
from lragent_jax.study.results import Results
from lragent_jax.study.statistics import Estimate


def markdown(results: Results, plots: Sequence[str] = ()) -> str:
    """The whole page."""
    sections = [
        _head(results),
        *_kinds(results),
        *_images(plots),
        *_by_length(results),
        *_trained_twice(results),
        *_episodes(results),
        *_teacher_forced(results, "kl", "Teacher-forced on evaluation trajectories", _KL_NOTE),
        *_teacher_forced(results, "recorded", "Recorded text", _RECORDED_NOTE),
        *_similarity(results),
        *_sensitivity(results),
        _LIMITS,
    ]
    return "\n\n".join(sections) + "\n"


_KINDS = {
    "apart": "every agent trained alone, on contexts that it runs from beginning to end; r = 8 on q and v.",
    "shared_a": "the same, but the first agent's A of v is frozen into the others: one A-group (the paper's recipe).",
    "apart_stacked": "the agents apart as one A-group, whose rank is the sum of theirs.",
    "all": "as apart, with adapters on all seven projections.",
    "all_stacked": "those as one A-group.",
    "apart_again": "the same training as apart's, repeated; apart_again_stacked, those as one A-group.",
    "all_again": "the same training as all's, repeated; all_again_stacked, those as one A-group.",
    "joint": "all three trained at once on the cache that they will share, with one A of v; every token is run by the "
    "agent that runs it then. A quarter of the trajectories is run by one agent alone. "
    "`lragent_jax/data/adapters/README.md` has the commands.",
    "embedded": "the agents that come with the package: a training of kind joint, rounded to bfloat16.",
    "recorded": "shared_a, trained on recorded trajectories.",
}

_JOINT_NOTE = """What shared_a loses under `base` and `base_lr` could be the cache's doing, or that of agents that
never met, while they were trained, what others leave in a cache. joint is the test: base model, rank, targets, learning
rate, text and number of epochs are those of shared_a (action and reflect saw more of the text), and what an agent reads
while it is trained is what it reads when the cache is shared. If the cache were to blame, joint would lose as much."""

_MAKING = r"""To make such agents and measure them, from `data/train-0` to `data/train-2` and `data/validation`, which
`lragent_jax/data/adapters/README.md` writes (and makes `runs/joint` of):

```
cat data/train-[012]/plan.jsonl > data/plan.jsonl; cat data/train-[01]/reflect.jsonl > data/reflect.jsonl
train() {
    lragent train MODEL --agent plan=data/plan.jsonl --agent action=data/train-0/action.jsonl \
        --agent reflect=data/reflect.jsonl --validation plan=data/validation/plan.jsonl \
        --validation action=data/validation/action.jsonl --validation reflect=data/validation/reflect.jsonl \
        --epochs 2 --learning-rate 2e-3 "$@"
}
train --kind shared_a --out runs/shared_a
train --kind apart --out runs/apart
train --kind apart --targets all --out runs/all
python scripts/study.py --adapters shared_a=runs/shared_a --adapters apart=runs/apart --adapters all=runs/all \
    --main shared_a --out RESULTS.json
python scripts/study.py --adapters joint=runs/joint --main joint --out RESULTS.json
python scripts/study.py --out RESULTS.json
```

The last one measures the embedded agents. The stacked kinds are made by the study itself. A training on another kind of
device, or with another JAX, rounds otherwise: its agents are others, and `--out` refuses to mix their cells with these
under one name."""

_AGAIN_NOTE = """apart_again and all_again were trained by the commands above, into `runs/apart_again` and
`runs/all_again`, and measured with `--adapters apart_again=runs/apart_again --adapters all_again=runs/all_again --main
shared_a`. The commands of the first ones were written down later, from what this page said of them: as far as that goes
the two differ by how a training rounds, and by where that led it."""

_LIMITS = """## Limits

* One small base (the smaller a model, the more of a task its adapters carry, and the further its agents' states drift
  apart), one made-up world, one training of most kinds of agents: intervals are over questions alone.
* Greedy decoding. A wrong thought stays in the context, so that every later output reads it: free episodes add up what
  single outputs, teacher-forced, lose.
* Lengths are those of a right episode, reached with paragraphs about other entities; a wrong episode may end shorter or
  longer.
* No training or validation text holds a name of the evaluation questions. Before the embedded agents were trained, the
  wrong answers of weaker ones to twenty questions of seed 0 were read, and the training mix was given more paragraphs
  about other entities; nothing else was chosen with these questions in view."""

_KL_NOTE = (
    "The oracle's outputs under the agents that should write them; means over all their positions. KL is that of "
    "`none`'s distribution to the mode's, in nats; NLL that of the oracle's tokens. Prefilled tokens per trajectory."
)
_RECORDED_NOTE = (
    "Adapters trained on four fifths of recorded trajectories, measured on the fifth that they have not seen: negative "
    "log-likelihood of the recorded outputs, in nats per token."
)


def _head(results: Results) -> str:
    settings = results.data["settings"]
    said = [
        f"{run['device']}, JAX {run['jax']}, up to {run['batch_size']} episodes at a time"
        for run in results.data.get("runs", [])
    ]
    runs = "; ".join(dict.fromkeys(said))
    return (
        "# What sharing costs in accuracy\n\n"
        "Written by `python scripts/study.py --report` from the results of `python scripts/study.py` (its first lines "
        f"say how both are called). Model: {settings.get('model')}, {settings.get('dtype')}; {settings.get('scale')} "
        f"scale, seed {settings.get('seed')}. {runs}.\n\n"
        "Agents plan, action and reflect answer questions about a world whose names no training text holds. They write "
        "freely, greedily, and tools answer. All modes get the same questions and the same paragraphs, and nothing but "
        "the cache is different. The paper (arXiv 2602.01053) found `none` ≥ `base` ≈ `base_lr` > "
        "`full` for adapters of an 8B model; what follows is what was found here. Intervals are 95 %: "
        "Wilson's for shares, Agresti and Min's for paired differences to `none` on the same "
        "questions, in percentage points. What is empty was not measured."
    )


def _kinds(results: Results) -> Iterator[str]:
    """How the agents that were measured were made, as far as it is known what a kind's name means."""
    known = [f"* {name}: {text}" for name, text in _KINDS.items() if name in results.data["kinds"]]
    if known:
        yield "## Kinds of agents\n\n" + "\n".join(known)
        if {"joint", "shared_a"} <= set(results.data["kinds"]):
            yield _JOINT_NOTE
    if "shared_a" in results.data["kinds"]:
        yield _MAKING
    if repeated_kinds(results.data["kinds"]) & _KINDS.keys():
        yield _AGAIN_NOTE


def _images(plots: Sequence[str]) -> Iterator[str]:
    if plots:
        yield "\n".join(f"![{name.removesuffix('.png')}]({name})" for name in plots)


def _by_length(results: Results) -> Iterator[str]:
    """All hops together, a column for every length."""
    grid = Grid(results)
    for kind in grid.kinds:
        lengths = grid.complete_lengths(kind)
        if len(lengths) < 2:
            continue
        rows = []
        for mode in grid.modes(kind):
            shares = [_share(_accuracy(grid, kind, mode, tokens)) for tokens in lengths]
            if any(shares):
                rows.append([f"`{mode}`", *shares])
        yield f"## By length: {kind}\n\nQuestions right in %, 1 to 3 hops together."
        yield _table(("sharing", *(f"{tokens:,} tokens" for tokens in lengths)), rows)


def _accuracy(grid: Grid, kind: str, mode: str, tokens: int) -> Estimate | None:
    group = grid.group(kind, mode, tokens)
    return group.accuracy() if group else None


def _trained_twice(results: Results) -> Iterator[str]:
    """What a training by itself decides, where one was repeated: all hops together."""
    grid = Grid(results)
    for kind in grid.first_kinds:
        both = (kind, repeated(kind))
        lengths = [
            tokens
            for tokens in grid.lengths(kind)
            if any(all(_accuracy(grid, of, mode, tokens) for of in both) for mode in grid.modes(kind))
        ]
        rows = []
        for mode in grid.modes(kind):
            shares = [_share(_accuracy(grid, of, mode, tokens)) for tokens in lengths for of in both]
            if any(map(all, zip(shares[::2], shares[1::2], strict=True))):
                rows.append([f"`{mode}`", *shares])
        if rows:
            yield f"## Trained twice: {kind}\n\nQuestions right in %, 1 to 3 hops together, and those of {both[1]}."
            yield _table(
                ("sharing", *(f"{tokens:,} tokens{end}" for tokens in lengths for end in ("", ", again"))), rows
            )


def _episodes(results: Results) -> Iterator[str]:
    grid = Grid(results)
    for kind in grid.kinds:
        identity = results.data["kinds"][kind]
        ranks = "; ".join(
            f"{role} {', '.join(f'{target} {rank}' for target, rank in of.items())}"
            for role, of in identity["ranks"].items()
        )
        yield f"## Free episodes: {kind}"
        yield f"A-groups: {identity['num_groups']}. Ranks: {ranks}."
        for tokens in grid.lengths(kind):
            groups = {mode: group for mode in grid.modes(kind) if (group := grid.group(kind, mode, tokens))}
            counts = sorted({cell["number"] for group in groups.values() for cell in group.cells})
            yield f"### {tokens:,} tokens ({' or '.join(map(str, counts))} questions in a cell)"
            yield _table(_EPISODE_COLUMNS, [_episode_row(mode, group, grid.reference(kind, tokens))
                                            for mode, group in groups.items()])  # fmt: skip


_EPISODE_COLUMNS = (
    "sharing", "1 hop", "2 hops", "3 hops", "all", "less `none`", "no answer", "verdicts right",
    *(f"{role}: outside the role" for role in ROLES), "prefilled per episode",
)  # fmt: skip


def _episode_row(mode: str, group: Group, reference: Group | None) -> list[str]:
    by_hops = [f"`{mode}`", *(_share(group.of_hops(hops)) for hops in (1, 2, 3))]
    if not group.is_complete:
        return by_hops + [""] * (len(_EPISODE_COLUMNS) - len(by_hops))
    difference = group.difference(reference) if reference and mode != "none" else None
    return [
        *by_hops,
        _share(group.accuracy()),
        _points(difference),
        f"{100 * (1 - group.ends('finished')):.1f} %",
        _share(group.verdicts_right()),
        *(f"{group.sum('bad_outputs', role):,} of {group.sum('outputs', role):,}" for role in ROLES),
        f"{group.mean('prefilled_tokens'):,.0f}",
    ]


def _teacher_forced(results: Results, part: str, title: str, note: str) -> Iterator[str]:
    """One table for each kind and length, over all blocks."""
    cells = _repeated_last(results.cells(part))
    if not cells:
        return
    yield f"## {title}\n\n{note}"
    for kind, tokens in dict.fromkeys((cell["kind"], cell["tokens"]) for cell in cells):
        of_mode: dict[str, list[dict[str, Any]]] = {
            mode: [cell for cell in cells if (cell["kind"], cell["tokens"], cell["mode"]) == (kind, tokens, mode)]
            for mode in SHARING_MODES
        }
        rows = [[f"`{mode}`", *_teacher_forced_row(found)] for mode, found in of_mode.items() if found]
        number = max(sum(cell["number"] for cell in found) for found in of_mode.values())
        yield f"### {kind}: {number} trajectories of up to {tokens:,} tokens"
        columns = ("sharing", "trajectories", "positions", "KL", "top-1 as `none`", "NLL", "prefilled")
        yield _table(columns, rows)
        yield from _by_output_kind(of_mode)


def _repeated_last(cells: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    again = repeated_kinds({cell["kind"] for cell in cells.values()})
    return sorted(cells.values(), key=lambda cell: cell["kind"] in again)


def _by_output_kind(of_mode: Mapping[str, Sequence[dict[str, Any]]]) -> Iterator[str]:
    """Whose outputs move: top-1 agreement and KL by what is written, over the cells that have them apart."""
    rows = []
    for mode, cells in of_mode.items():
        parts = [cell["by_kind"] for cell in cells if "by_kind" in cell]
        if parts and mode != "none":
            rows.append(
                [f"`{mode}`", *(_moved([part[kind] for part in parts if kind in part]) for kind in OUTPUT_KINDS)]
            )
    if rows:
        yield "Top-1 as `none`, and KL from it, by what is written: thoughts and tools are plan's, arguments action's."
        yield _table(("sharing", *(f"{kind}s" for kind in OUTPUT_KINDS)), rows)


def _moved(parts: Sequence[Mapping[str, float]]) -> str:
    positions = sum(part["positions"] for part in parts)
    if not positions:
        return ""
    top1, kl = (sum(part[name] * part["positions"] for part in parts) / positions for name in ("top1_agreement", "kl"))
    return f"{100 * top1:.1f} %, {kl:.1e}"


def _teacher_forced_row(cells: Sequence[dict[str, Any]]) -> list[str]:
    positions, number = sum(cell["positions"] for cell in cells), sum(cell["number"] for cell in cells)

    def mean(name: str) -> float:
        return sum(cell[name] * cell["positions"] for cell in cells) / positions

    return [
        str(number),
        f"{positions:,}",
        f"{mean('kl'):.2e}",
        f"{100 * mean('top1_agreement'):.2f} %",
        f"{mean('nll'):.4f}",
        f"{sum(cell['prefilled_tokens'] for cell in cells) / number:,.0f}",
    ]


def _similarity(results: Results) -> Iterator[str]:
    cells = _repeated_last(results.cells("similarity"))
    if not cells:
        return
    yield (
        "## Similarity of V across agents\n\nCosine similarity of what agents that read everything on their own would "
        "cache for the same token: X W (base), X A (low rank) and X A B (adapter). Means over tokens, pairs of agents "
        "and layers, and the layers with the smallest and the largest."
    )
    rows = [
        [cell["kind"], f"{cell['number']} of {cell['tokens']:,} tokens", *(_range(cell[part]) for part in _PARTS)]
        for cell in cells
    ]
    yield _table(("agents", "trajectories", "base", "low rank", "adapter"), rows)


_PARTS = ("base", "low_rank", "adapter")


def _range(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def _sensitivity(results: Results) -> Iterator[str]:
    cells = _repeated_last(results.cells("sensitivity"))
    if not cells:
        return
    yield (
        "## Layers that `droidspeak` recomputes\n\nThe third of all layers whose sharing alone moves the agents most "
        "(KL to `none` in nats), measured on training trajectories."
    )
    rows = [
        [cell["kind"], f"{cell['number']}", ", ".join(map(str, cell["layers"])), f"{max(cell['drift']):.2e}"]
        for cell in cells
    ]
    yield _table(("agents", "trajectories", "layers", "largest KL"), rows)


def _share(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f"{100 * estimate.value:.1f} ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"


def _points(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f"{100 * estimate.value:+.1f} ({100 * estimate.low:+.1f} to {100 * estimate.high:+.1f})"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
