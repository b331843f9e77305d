"""Replays: counts and bytes against the arithmetic of the modes, drift against its definition, and every refusal."""

import dataclasses
import json
import math
import weakref
from fractions import Fraction

import numpy as np
import pytest
from text_models import CONFIG, TRAJECTORIES, adapters, text_engine, tokenizer
from tolerances import TOLERANCES

from lragent_jax import replay as replay_module
from lragent_jax.cache_cost import cache_bytes_per_token
from lragent_jax.compile_watch import CompileWatch
from lragent_jax.drift import Drift
from lragent_jax.engine import Engine
from lragent_jax.models.adapter import Adapter, LoraWeights
from lragent_jax.models.errors import InputError, OutOfPagesError
from lragent_jax.react import ReactTrajectory, Step
from lragent_jax.recording import OUTPUT_KINDS, Recording
from lragent_jax.replay import replay
from lragent_jax.sharing import SHARING_MODES, SharingMode, layers_to_recompute

PAGE = 16
TWO_GROUPS = (100, 100, 200)  # reflect has an A of its own


class Arithmetic:
    """What one trajectory costs, from the rules alone: who has read how far, and what that makes a call run.

    `readers` maps an agent to the name under which its reads count: its own, its A-group's, or everybody's.
    """

    def __init__(self, recording: Recording, readers: dict[str, str]):
        self.prefilled = self.cached = 0
        self.read = dict.fromkeys(readers.values(), 0)
        length = 0
        for part in recording.parts:
            if part.role is not None:
                reader = readers[part.role]
                lacking = max(length - self.read[reader], 1)  # at least the last token, for its logits
                self.prefilled += lacking
                self.cached += length - lacking
                self.read[reader] = length + len(part.ids) - 1  # the token sampled last has not run
            length += len(part.ids)

    def pages(self) -> int:
        return sum(-(-read // PAGE) for read in self.read.values())


AGENTS = ("plan", "action", "reflect")
OWN = {agent: agent for agent in AGENTS}
EVERYBODY = dict.fromkeys(AGENTS, "all")


CHOSEN = Fraction(len(layers_to_recompute(None, CONFIG.num_layers)), CONFIG.num_layers)


def bytes_by_formula(base_pages: int, low_rank_pages: int) -> int:
    base = 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 4
    low_rank = CONFIG.num_layers * 4 * 4  # rank 4 on v alone
    return PAGE * (base_pages * base + low_rank_pages * low_rank)


@pytest.mark.parametrize("groups", [(100, 100, 100), TWO_GROUPS], ids=["one A-group", "two A-groups"])
def test_counts_and_bytes_are_those_of_the_modes(groups):
    group_of = {agent: str(group) for agent, group in zip(AGENTS, groups, strict=True)}
    prefilled_by = {
        "none": OWN, "full": EVERYBODY, "base": OWN, "base_lr": group_of, "pre_lr": EVERYBODY, "rebase": EVERYBODY,
        "droidspeak": OWN,
    }  # fmt: skip
    report = replay(text_engine(adapters(groups)), TRAJECTORIES)
    assert list(report.modes) == list(SHARING_MODES)
    recordings = [Recording.tokenize(trajectory, tokenizer()) for trajectory in TRAJECTORIES]
    for mode in SHARING_MODES:
        readers = prefilled_by[mode]
        costs = [Arithmetic(recording, readers) for recording in recordings]
        queries = (
            sum(recording.num_outputs for recording in recordings) if mode == "rebase" else 0
        )  # the last token again, each call
        assert report.modes[mode].prefilled_tokens == sum(cost.prefilled for cost in costs) + queries, mode
        assert report.modes[mode].cached_tokens == sum(cost.cached for cost in costs), mode
        # What the last reader of all has read is in the shared base cache; groups have what their own agents read.
        bases = [max(cost.read.values()) for cost in costs]
        used = {
            "none": [(cost.pages(), 0) for cost in costs],
            "full": [(-(-base // PAGE), 0) for base in bases],
            "base": [(-(-base // PAGE), cost.pages()) for base, cost in zip(bases, costs, strict=True)],
            "base_lr": [(-(-base // PAGE), cost.pages()) for base, cost in zip(bases, costs, strict=True)],
            "pre_lr": [(-(-base // PAGE), len(set(groups)) * -(-base // PAGE)) for base in bases],
            "rebase": [(-(-base // PAGE), len(set(groups)) * -(-base // PAGE)) for base in bases],
            "droidspeak": [  # of a base page's layers, the chosen ones for every agent
                (-(-base // PAGE) * (1 - CHOSEN) + cost.pages() * CHOSEN, 0)
                for base, cost in zip(bases, costs, strict=True)
            ],
        }[mode]
        assert report.modes[mode].cache_bytes == max(bytes_by_formula(*pages) for pages in used), mode


def test_drift_is_that_of_logits_scored_by_hand():
    trajectory = TRAJECTORIES[0]
    parts = Recording.tokenize(trajectory, tokenizer()).parts

    def scored(mode: SharingMode) -> list[np.ndarray]:
        engine = text_engine().with_sharing(mode, num_pages=64, num_low_rank_pages=192)
        with engine.trajectory() as context:
            return [
                engine.score(context, part.ids, part.role)
                for part in parts
                if part.role is not None or context.append(part.ids) is None
            ]

    drift = Drift()
    for reference, logits in zip(scored("none"), scored("full"), strict=True):
        drift.add(reference, logits)
    report = replay(text_engine(), [trajectory], ["full"])
    assert list(report.modes) == ["none", "full"], "the reference runs, asked for or not"
    assert report.modes["full"].kl == pytest.approx(drift.kl, rel=1e-3)
    assert report.modes["full"].kl > 1e-4
    assert report.modes["full"].top1_agreement == drift.top1_agreement
    assert (report.modes["none"].kl, report.modes["none"].top1_agreement) == (0.0, 1.0)
    other_way = replay(text_engine(), [trajectory], ["none", "full", "none"], reference="full")
    assert list(other_way.modes) == ["full", "none"]
    assert other_way.modes["full"].kl == 0.0
    assert other_way.modes["none"].kl > 1e-4


def test_drift_by_what_is_written_adds_up():
    recording = Recording.tokenize(TRAJECTORIES[1], tokenizer())
    kinds = ["tool", "argument", "thought", "thought", "thought", "tool", "argument", "verdict", "verdict"]
    assert recording.output_kinds() == kinds
    assert recording.cut(recording.num_tokens - 1).output_kinds() == kinds[:-1]
    for figures in replay(text_engine(), [recording], ["full"]).modes.values():
        parts = figures.by_kind.values()
        assert list(figures.by_kind) == ["thought", "tool", "argument", "verdict"]
        assert sum(part.positions for part in parts) == recording.num_output_tokens
        for name in ("kl", "nll", "top1_agreement"):
            mean = sum(getattr(part, name) * part.positions for part in parts) / recording.num_output_tokens
            assert mean == pytest.approx(getattr(figures, name))


def test_agents_that_add_nothing_move_nothing():
    silent = {
        name: Adapter({at: LoraWeights(pair.lora_a, 0 * pair.lora_b) for at, pair in adapter.weights.items()})
        for name, adapter in adapters().items()
    }
    report = replay(text_engine(silent), TRAJECTORIES)
    for figures in report.modes.values():
        assert figures.kl == pytest.approx(0.0, abs=TOLERANCES["equal", "float32"])
        assert figures.top1_agreement == 1.0


def test_roles_go_to_agents_of_other_names():
    named = dict(zip(["planner", "action", "critic"], adapters().values(), strict=True))
    roles = {"plan": "planner", "reflect": "critic"}
    want = replay(text_engine(), TRAJECTORIES[:1], ["full"]).modes["full"]
    got = replay(text_engine(named), TRAJECTORIES[:1], ["full"], roles=roles).modes["full"]
    assert (got.kl, got.prefilled_tokens) == (want.kl, want.prefilled_tokens)
    base_only = replay(text_engine({}), TRAJECTORIES[:1], ["full"], roles=dict.fromkeys(AGENTS))
    assert base_only.modes["none"].prefilled_tokens == base_only.modes["full"].prefilled_tokens


def test_the_report_is_one_line_of_json_in_the_promised_form():
    report = replay(text_engine(), TRAJECTORIES[:1], ["base_lr"])
    line = report.to_json()
    assert "\n" not in line
    figures = json.loads(line)
    assert list(figures) == ["modes"]
    assert list(figures["modes"]) == ["none", "base_lr"]
    for mode in figures["modes"].values():
        names = [
            "prefilled_tokens",
            "cached_tokens",
            "cache_bytes",
            "ttft_s",
            "tokens_per_s",
            "top1_agreement",
            "kl",
            "nll",
            "by_kind",
        ]
        assert list(mode) == names
        by_kind = mode.pop("by_kind")
        assert set(by_kind) <= set(OUTPUT_KINDS)
        assert all(math.isfinite(value) for of_kind in by_kind.values() for value in of_kind.values())
        assert all(math.isfinite(value) for value in mode.values())
        assert mode["ttft_s"] > 0
        assert mode["tokens_per_s"] > 0


def test_recordings_are_replayed_as_they_are_and_untimed_runs_measure_the_same():
    timed = replay(text_engine(), TRAJECTORIES, ["full", "base_lr"])
    recordings = [Recording.tokenize(trajectory, tokenizer()) for trajectory in TRAJECTORIES]
    untimed = replay(text_engine(), recordings, ["full", "base_lr"], timed=False)
    assert (untimed.num_tokens, untimed.num_output_tokens) == (timed.num_tokens, timed.num_output_tokens)
    for mode, figures in untimed.modes.items():
        assert figures.tokens_per_s is None
        assert dataclasses.replace(timed.modes[mode], ttft_s=0, tokens_per_s=None) == dataclasses.replace(
            figures, ttft_s=0
        )
        assert figures.nll > 0


def test_long_trajectories_are_cut_behind_an_output():
    recording = Recording.tokenize(TRAJECTORIES[0], tokenizer())
    limit = recording.num_tokens - 1
    report = replay(text_engine(), TRAJECTORIES, ["full"], max_tokens=limit)
    beginning = recording.cut(limit)
    assert beginning.num_tokens <= limit
    assert beginning.num_outputs == recording.num_outputs - 1
    assert beginning.parts == recording.parts[: len(beginning.parts)]
    assert beginning.parts[-1].role is not None
    assert recording.cut(limit + 1) == recording
    assert report.num_outputs == sum(
        Recording.tokenize(trajectory, tokenizer()).cut(limit).num_outputs for trajectory in TRAJECTORIES
    )
    assert report.notes[0] == f"trajectory 0: {beginning.note}"
    assert f"cut from {recording.num_tokens} to {beginning.num_tokens} tokens" in beginning.note


def test_pieces_are_tokenised_one_by_one_with_one_bos():
    recording = Recording.tokenize(TRAJECTORIES[0], tokenizer())
    ids = [token for part in recording.parts for token in part.ids]
    assert [i for i, token in enumerate(ids) if token == tokenizer().bos_token_id] == [0]
    for part, segment in zip(recording.parts, TRAJECTORIES[0].segments(), strict=True):
        assert tokenizer().decode(part.ids) == segment.text
        assert part.role == segment.role
    assert recording.num_tokens == len(ids)


def test_progress_never_goes_back_and_ends_at_the_end():
    seen = []
    report = replay(
        text_engine(), TRAJECTORIES, ["full"], progress=lambda done, total, what: seen.append((done, total, what))
    )
    done = [step for step, _, _ in seen]
    assert done == sorted(done)
    assert seen[-1][0] == seen[-1][1] == 2 * report.num_outputs
    assert {total for _, total, _ in seen} == {2 * report.num_outputs}
    assert "full, trajectory 2 of 2" in seen[-1][2]


def count_calls(monkeypatch) -> list[str]:
    """The sharing mode of every `score_output` call from here on."""
    calls, original = [], Engine.score_output

    def counted(self, *args, **kwargs):
        calls.append(self.sharing)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "score_output", counted)
    return calls


class Compiling(CompileWatch):
    """Finds a compilation in the first `remaining` runs."""

    remaining = 0

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.num_programs = int(Compiling.remaining > 0)
        Compiling.remaining -= 1


def test_a_run_that_compiled_is_run_again_and_counts_once(monkeypatch):
    want = replay(text_engine(), TRAJECTORIES[:1], ["full"])
    monkeypatch.setattr(replay_module, "CompileWatch", Compiling)
    Compiling.remaining = 1
    calls = count_calls(monkeypatch)
    got = replay(text_engine(), TRAJECTORIES[:1], ["full"])
    assert calls == ["none"] * 2 * want.num_outputs + ["full"] * want.num_outputs
    for mode, figures in got.modes.items():
        assert figures.prefilled_tokens == want.modes[mode].prefilled_tokens
        assert figures.cached_tokens == want.modes[mode].cached_tokens
        assert figures.cache_bytes == want.modes[mode].cache_bytes


def test_what_is_compiled_beforehand_is_not_compiled_again(monkeypatch):
    calls = count_calls(monkeypatch)
    options = {"prefill_buckets": (24,), "page_size": 24}  # programs that no other test has
    report = replay(text_engine(**options), TRAJECTORIES[:1], ["base"], warmup=True)
    assert len(calls) == 2 * report.num_outputs


def test_one_mode_at_a_time_holds_pages(monkeypatch):
    alive: list[weakref.ref] = []
    original = Engine.with_sharing

    def tracked(self, *args, **kwargs):
        assert [ref for ref in alive if ref() is not None] == [], "the mode before still holds its caches"
        engine = original(self, *args, **kwargs)
        alive.append(weakref.ref(engine))
        return engine

    monkeypatch.setattr(Engine, "with_sharing", tracked)
    replay(text_engine(), TRAJECTORIES)
    assert len(alive) == len(SHARING_MODES) * len(TRAJECTORIES)


def test_pools_are_as_large_as_needed_and_no_larger_than_asked():
    with pytest.raises(OutOfPagesError, match="num_pages"):
        replay(text_engine(), TRAJECTORIES, ["full"], num_pages=3)
    engine = text_engine()
    replay(engine, TRAJECTORIES, num_pages=64)
    assert engine.cache_stats().bytes_used == 0, "the engine that was lent is untouched"


LONG = ReactTrajectory("", "long", "", (Step("word " * 5000, "Finish[x]", ""),))
EMPTY = ReactTrajectory("", "empty", "", (Step("", "", "nothing"),))
UNFINISHED = ReactTrajectory("", "open", "", (Step("Now.", "Search[x]", ""),))


@pytest.mark.parametrize(
    ("trajectories", "options", "message"),
    [
        ([], {}, "no trajectory was given"),
        ([TRAJECTORIES[0], EMPTY], {}, "trajectory 1 holds no recorded output"),
        ([LONG], {}, r"trajectory 0 has \d+ tokens.*context is 4096: pass max_tokens of 4080"),
        (TRAJECTORIES, {"max_tokens": 0}, "max_tokens must be at least 1"),
        (TRAJECTORIES, {"max_tokens": 9}, r"0: cut from \d+ to 0 tokens(.|\n)*trajectory 1.*raise max_tokens"),
        (TRAJECTORIES, {"modes": ["none", "half"]}, "unknown sharing mode 'half'"),
        (TRAJECTORIES, {"reference": "half"}, "unknown sharing mode 'half'"),
        (TRAJECTORIES, {"roles": {"judge": "plan"}}, "unknown role 'judge'; there are: plan, action, reflect"),
        (TRAJECTORIES, {"roles": {"reflect": "critic"}}, "role reflect needs an agent 'critic'; there are: 'plan'"),
        ([UNFINISHED], {"roles": {"reflect": "critic"}}, "role reflect needs an agent 'critic'"),
    ],
)  # fmt: skip
def test_what_cannot_be_replayed_is_refused_before_anything_runs(trajectories, options, message, monkeypatch):
    engine = text_engine()
    monkeypatch.setattr(Engine, "with_sharing", lambda *args, **kwargs: pytest.fail("something ran"))
    with pytest.raises(InputError, match=message):
        replay(engine, trajectories, **options)


def test_a_role_without_an_agent_is_refused_if_it_occurs():
    two = {name: adapter for name, adapter in adapters().items() if name != "reflect"}
    with pytest.raises(InputError, match="role reflect needs an agent 'reflect'; there are: 'plan', 'action'"):
        replay(text_engine(two), TRAJECTORIES)
    with pytest.raises(InputError, match="role plan needs an agent 'plan'; there are: none is loaded"):
        replay(text_engine({}), TRAJECTORIES)
    assert replay(text_engine(two), [UNFINISHED], ["full"]).num_outputs == 3


def test_a_model_without_a_tokenizer_is_refused():
    with pytest.raises(InputError, match="replay needs a tokenizer"):
        replay(text_engine(tokenizer=None), TRAJECTORIES)


@pytest.mark.parametrize("mode", SHARING_MODES)
def test_bytes_per_token_are_those_the_engine_counts(mode):
    agents = adapters(TWO_GROUPS)
    engine = text_engine(agents).with_sharing(mode, num_pages=64, num_low_rank_pages=192)
    with engine.trajectory() as trajectory:
        trajectory.append(list(range(2, 2 + 3 * PAGE)))
        for agent in agents:
            engine.next_token_logits(trajectory, agent)
        used = engine.cache_stats().bytes_used
    assert used == 3 * PAGE * cache_bytes_per_token(CONFIG, list(agents.values()), mode, itemsize=4)


@pytest.mark.parametrize("mode", SHARING_MODES)
def test_bytes_per_token_without_agents_are_those_of_the_base_model(mode):
    want = 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 2
    assert cache_bytes_per_token(CONFIG, [], mode, itemsize=2) == want
