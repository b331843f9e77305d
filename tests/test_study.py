"""The study at toy size: a random model, which gets nothing right, through the very path that a GPU takes."""

import dataclasses
import json
import weakref

import jax
import numpy as np
import pytest
import text_models
from script_modules import load_script

from lragent_jax import episodes
from lragent_jax.compile_watch import CompileWatch
from lragent_jax.models.errors import InputError
from lragent_jax.recording import Recording
from lragent_jax.sharing import SHARING_MODES
from lragent_jax.study import study as study_module
from lragent_jax.study.agent_set import RECORDED_KIND, AgentSet, read_agents, with_stacked
from lragent_jax.study.deadline import Deadline, expected_seconds
from lragent_jax.study.episode_run import run_cell
from lragent_jax.study.plan import FULL, REDUCED, STACKED_MODES, EpisodeCell, Sample, Scale, episode_cells
from lragent_jax.study.results import Results
from lragent_jax.study.study import RecordedStudy, Study
from lragent_jax.study.workbench import BenchOptions, Workbench

SCALE = Scale(
    name="toy",
    hops=(None,),
    episodes=(Sample(1200, 2),),
    other_episodes=(Sample(1100, 1),),
    kl=(Sample(1100, 2),),
    similarity=Sample(1100, 1),
    sensitivity=Sample(1100, 1),
    block=1,
)
OPTIONS = BenchOptions(
    dtype="float32", batch_size=2, pool_gigabytes=1.0, page_size=512, prefill_buckets=(32, 512), decode_block=4
)
SHARED, APART = AgentSet("embedded", text_models.adapters()), AgentSet("apart", text_models.adapters((1, 2, 3)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return text_models.write_text_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def bench(model):
    return Workbench(model, OPTIONS, SCALE.longest)


@pytest.fixture(autouse=True)
def short_outputs(monkeypatch):
    monkeypatch.setattr(episodes, "_MOST_TOKENS", {"thought": 3, "tool": 2, "argument": 3, "verdict": 2})
    run = episodes.run_episodes
    monkeypatch.setattr(
        "lragent_jax.study.episode_run.run_episodes", lambda *args, **options: run(*args, max_steps=1, **options)
    )


@pytest.fixture
def quick_measures(monkeypatch):
    """What has tests of its own is told, not measured."""
    drift = np.arange(text_models.CONFIG.num_layers, dtype=float)
    monkeypatch.setattr(study_module, "layer_drift", lambda *args, **options: drift)
    monkeypatch.setattr(
        study_module, "value_similarity", lambda *args, **options: dict.fromkeys(("base", "low_rank", "adapter"), drift)
    )
    short = [Recording.tokenize(trajectory, text_models.tokenizer()) for trajectory in text_models.TRAJECTORIES]
    monkeypatch.setattr(study_module, "oracle_recordings", lambda tokenizer, split, number, *args: short[:number])


def without_seconds(value):
    """Results but for what differs from run to run."""
    if isinstance(value, dict):
        return {name: without_seconds(each) for name, each in value.items() if "seconds" not in name}
    return [without_seconds(each) for each in value] if isinstance(value, list) else value


class Killed(Exception):
    pass


def test_a_killed_study_goes_on_to_the_same_results(bench, tmp_path, monkeypatch, quick_measures):
    recorded = RecordedStudy(dataclasses.replace(SHARED, name=RECORDED_KIND), text_models.TRAJECTORIES * 2)
    modes = ("none", "droidspeak")

    def run(path):
        return Study(bench, [SHARED], Results(path), SCALE, modes=modes, recorded=recorded).run()

    assert run(tmp_path / "whole.json")
    whole = Results(tmp_path / "whole.json")
    assert {part: len(cells) for part, cells in whole.data["cells"].items()} == {
        "episodes": 2, "kl": 4, "similarity": 1, "recorded": 2, "sensitivity": 2,
    }  # fmt: skip

    saves = []
    save = Results.save

    def killing(self):
        if len(saves) % 3 == 2:
            saves.append("killed")
            raise Killed
        saves.append("saved")
        save(self)

    monkeypatch.setattr(Results, "save", killing)
    for _ in range(100):
        try:
            run(tmp_path / "killed.json")
            break
        except Killed:
            continue
    assert saves.count("killed") > 2
    killed = Results(tmp_path / "killed.json")
    assert without_seconds(killed.data) == without_seconds(whole.data)
    assert [path.name for path in tmp_path.iterdir() if "draft" in path.name] == []

    def never(*args, **options):
        raise AssertionError("a finished cell was run again")

    for name in ("run_cell", "run_block", "value_similarity", "layer_drift"):
        monkeypatch.setattr(study_module, name, never)
    assert run(tmp_path / "whole.json")


def test_droidspeak_recomputes_the_layers_that_training_data_chose(bench, tmp_path, monkeypatch):
    splits, engines = [], []
    find, make = study_module.oracle_recordings, bench.engine
    monkeypatch.setattr(
        study_module,
        "oracle_recordings",
        lambda tokenizer, split, *args: [splits.append(split), *find(tokenizer, split, *args)][1:],
    )
    monkeypatch.setattr(bench, "engine", lambda *args: engines.append(make(*args)) or engines[-1])
    results = Results(tmp_path / "r.json")
    Study(bench, [SHARED], results, SCALE, modes=["droidspeak"]).run(["episodes"])
    [known] = results.cells("sensitivity").values()
    assert splits == ["train"]
    assert known["layers"] == [int(np.argmax(known["drift"]))]
    assert [list(engine.recomputed_layers) for engine in engines] == [known["layers"]]


def test_cells_hold_what_tables_need_and_modes_get_the_same_questions(bench, tmp_path):
    results = Results(tmp_path / "r.json")
    Study(bench, [SHARED], results, SCALE, modes=["none", "full"]).run(["episodes"])
    cells = json.loads((tmp_path / "r.json").read_text())["cells"]["episodes"]
    none, full = (cells[f"embedded {mode} 1200 tokens mixed hops 2 questions 0"] for mode in ("none", "full"))
    for cell in (none, full):
        assert cell["right"] == "00"
        assert cell["ends"] == {"steps": 2}
        assert cell["outputs"]["plan"] == 4
        assert len(cell["failures"]) == 2
        assert cell["seconds"] >= cell["compile_seconds"] >= 0
    assert [f["wanted"] for f in none["failures"]] == [f["wanted"] for f in full["failures"]]
    assert none["prefilled_tokens"]["plan"] >= full["prefilled_tokens"]["plan"] > 0


def test_a_deadline_stops_before_a_cell_that_will_not_fit(bench, tmp_path):
    results = Results(tmp_path / "r.json")
    now = [0.0]
    deadline = Deadline(100, clock=lambda: now[0])
    study = Study(bench, [SHARED], results, SCALE, modes=["none", "full"], deadline=deadline)
    assert Study(bench, [SHARED], results, SCALE, modes=["none"]).run(["episodes"])
    for cell in results.cells("episodes").values():
        cell |= {"seconds": 75.0, "compile_seconds": 0.0}
    now[0] = 10.0
    assert not study.run(["episodes"]), "75 s and a reserve are more than 90 s"
    assert len(results.cells("episodes")) == 1
    now[0] = 0.0
    assert study.run(["episodes"])


def test_cells_that_are_expected_to_take_long():
    finished = [
        {"mode": "none", "tokens": 1000, "number": 100, "seconds": 30.0, "compile_seconds": 20.0},
        {"mode": "none", "tokens": 1000, "number": 100, "seconds": 12.0, "compile_seconds": 0.0},
        {"mode": "full", "tokens": 1000, "number": 100, "seconds": 5.0, "compile_seconds": 1.0},
    ]

    def expected(mode, tokens, number, compiles=False):
        return expected_seconds({"mode": mode, "tokens": tokens, "number": number}, finished, compiles)

    assert expected("none", 1000, 50) == 6.0
    assert expected("none", 1000, 50, compiles=True) == 26.0
    assert expected("full", 1000, 100) == 4.0
    assert expected("none", 4000, 100) == 48.0
    assert expected("none", 500, 100) == 12.0, "short episodes are not known to be faster"
    assert expected("base", 1000, 100) == 12.0
    assert expected_seconds({"mode": "none", "tokens": 1, "number": 1}, [], True) == 0.0


def test_the_grid_of_the_full_study_and_its_order():
    sets = with_stacked([APART, SHARED])
    assert [each.name for each in sets] == ["apart", "apart_stacked", "embedded"]
    cells = list(episode_cells(sets, SHARING_MODES, FULL, 0))
    assert len({cell.key for cell in cells}) == len(cells) == 7 * 3 * 5 + 2 * 3 * (7 + 3)
    assert [(c.mode, c.hops) for c in cells[:4]] == [("none", 1), ("none", 2), ("none", 3), ("full", 1)]
    assert {(c.agents.name, c.tokens, c.num_questions) for c in cells[:21]} == {("embedded", 1000, 500)}
    assert {c.agents.name for c in cells[:105]} == {"embedded"}
    assert {c.mode for c in cells if c.agents.name == "apart_stacked"} == set(STACKED_MODES)
    assert {(c.tokens, c.num_questions) for c in cells[105:]} == {(1000, 200), (4000, 200)}
    assert {c.num_questions for c in episode_cells(sets, ["none"], FULL.with_questions(7), 0)} == {7}


def test_reduced_runs_have_fifty_questions_of_mixed_hops_and_two_lengths():
    cells = list(episode_cells([SHARED], ["none"], REDUCED, 0))
    assert [(cell.tokens, cell.hops, cell.num_questions) for cell in cells] == [(250, None, 50), (500, None, 50)]


def test_other_adapters_under_a_kinds_name_are_refused(bench, tmp_path):
    results = Results(tmp_path / "r.json")
    Study(bench, [SHARED], results, SCALE)
    with pytest.raises(InputError, match=r"results of embedded with other adapters \(plan, action, reflect differ\)"):
        Study(bench, [dataclasses.replace(APART, name="embedded")], results, SCALE)
    with pytest.raises(InputError, match="was measured with seed 0, and this is 1"):
        Study(bench, [SHARED], results, SCALE, seed=1)
    with pytest.raises(InputError, match="was measured with scale 'toy', and this is 'full'"):
        Study(bench, [SHARED], results, FULL)
    results.save()
    Study(bench, [dataclasses.replace(APART, name="embedded")], Results(results.path, fresh=True), SCALE)


def test_results_of_old_agents_are_forgotten_and_no_others(bench, tmp_path):
    results = Results(tmp_path / "r.json")
    Study(bench, [SHARED, APART], results, SCALE)
    assert set(results.data["kinds"]) == {"embedded", "apart", "apart_stacked"}
    for kind in results.data["kinds"]:
        results.add("episodes", {f"{kind} none": {"kind": kind}})
        results.add("sensitivity", {kind: {"kind": kind}})
    load_script("study").main(["--drop", "apart", "--out", str(results.path)])
    left = Results(results.path)
    assert set(left.data["kinds"]) == {"embedded"}
    assert left.data["cells"] == {
        "episodes": {"embedded none": {"kind": "embedded"}},
        "sensitivity": {"embedded": {"kind": "embedded"}},
    }
    with pytest.raises(SystemExit, match="no results of apart, x to drop; it has: embedded"):
        load_script("study").main(["--drop", "embedded", "apart", "x", "--out", str(results.path)])
    assert Results(results.path).data == left.data
    Study(bench, [dataclasses.replace(SHARED, name="apart")], left, SCALE)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "lragent-study", "version": 0}', "{"])
def test_a_file_that_holds_no_results_is_refused(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(InputError, match=r"r\.json"):
        Results(tmp_path / "r.json")
    assert Results(tmp_path / "r.json", fresh=True).cells("episodes") == {}


def test_agents_that_lack_a_folder_are_refused(tmp_path):
    text_models.write_adapters(tmp_path, {"plan": text_models.adapters()["plan"]})
    with pytest.raises(InputError, match="lacks the adapter folders of action, reflect"):
        read_agents("apart", tmp_path, text_models.CONFIG)


def test_batches_shrink_where_the_pool_does_not_hold_them(model):
    roomy = Workbench(model, dataclasses.replace(OPTIONS, batch_size=8), 3000)
    assert {roomy.batch_size(tokens) for tokens in (100, 3000)} == {8}
    tight = Workbench(model, dataclasses.replace(OPTIONS, batch_size=8, pool_gigabytes=1e-9), 3000)
    assert (tight.batch_size(100), tight.batch_size(3000)) == (4, 1)


def test_episodes_compile_nothing_that_was_compiled_ahead(model):
    bench = Workbench(model, dataclasses.replace(OPTIONS, compile_ahead=True, prefill_buckets=(32,)), SCALE.longest)
    shown = []
    engine = bench.engine(SHARED, "base_lr", None, lambda done, total, what: shown.append(what))
    assert shown[-1] == "ready"
    cell = EpisodeCell(SHARED, "base_lr", 1100, 1, 2, 0)
    with CompileWatch() as watch:
        run_cell(cell, engine, bench.batch_size(cell.tokens), lambda *_: None)
    assert watch.num_programs == 0
    assert bench.engine(SHARED, "base_lr", None) is engine


def test_a_whole_batch_is_read_before_its_first_step(model):
    bench = Workbench(model, dataclasses.replace(OPTIONS, batch_size=4, prefill_buckets=(32,)), SCALE.longest)
    options = bench.engine(SHARED, "full", None).options
    chunks = -(-episodes.max_tokens(bench.engine(SHARED, "full", None), SCALE.longest) // 32)
    assert options.prefill_tokens >= 4 * 32 * chunks
    assert (options.max_batch_size, options.min_batch_size) == (4, 4)
    few = Workbench(model, dataclasses.replace(OPTIONS, batch_size=4, min_batch_size=2), SCALE.longest)
    assert few.engine(SHARED, "full", None).options.min_batch_size == 2
    assert few.surroundings()["min_batch_size"] == 2


def test_another_kind_can_be_the_main_one(tmp_path):
    text_models.write_adapters(tmp_path, dict(SHARED.adapters))
    sets = [read_agents(name, tmp_path, text_models.CONFIG, "shared_a") for name in ("embedded", "shared_a")]
    assert [agents.is_main for agents in sets] == [False, True]
    assert SHARED.is_main
    cells = list(episode_cells(sets, ["base_lr"], FULL, 0))
    of_kind = [[cell.tokens for cell in cells if cell.agents.name == name] for name in ("shared_a", "embedded")]
    assert len(of_kind[0]) > len(of_kind[1]) > 0
    assert cells[0].agents.name == "shared_a"


def test_the_script_measures_reports_and_refuses(model, tmp_path, monkeypatch, capsys, quick_measures):
    script = load_script("study")
    monkeypatch.setattr(script, "REDUCED", SCALE)
    folder = tmp_path / "agents"
    text_models.write_adapters(folder, dict(SHARED.adapters))
    common = ["--model", str(model), "--out", str(tmp_path / "r.json")]
    options = ["--page-size", "512", "--prefill-buckets", "32,512", "--decode-block", "4", "--batch-size", "2"]
    measure = [*common, *options, "--reduced", "--adapters", f"joint={folder}", "--modes", "none,full"]
    script.main([*measure, "--parts", "episodes,kl,similarity"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "finished": True,
        "cells": {"episodes": 2, "kl": 4, "similarity": 1},
    }
    script.main(["--report", "--out", str(tmp_path / "r.json"), "--docs", str(tmp_path / "docs")])
    written = json.loads(capsys.readouterr().out)["written"]
    assert written[0] == str(tmp_path / "docs" / "accuracy.md")
    page = (tmp_path / "docs" / "accuracy.md").read_text()
    assert "| `full` | 0.0 (0.0 to " in page
    for arguments, message in (
        ([*common, "--adapters", "joint"], "not of the form KIND=FOLDER"),
        ([*measure, "--modes", "nun"], "unknown: nun"),
        ([*measure, "--parts", "x"], "unknown: x"),
        ([*measure, "--kinds", "apart"], "unknown: apart; there are: joint"),
        ([*measure, "--main", "apart"], "--main apart is none of the --adapters: joint"),
    ):
        with pytest.raises(SystemExit, match=message):
            script.main(arguments)


def test_results_of_several_devices_become_one_study(tmp_path):
    def write(name, settings, adapters, cells):
        results = Results(tmp_path / name)
        results.use_settings({"seed": 0} | settings)
        results.use_agents("joint", {"adapters": adapters})
        results.data["runs"] = [{"device": "one"}]
        results.add("episodes", cells)
        return results

    first = write("a.json", {}, {"plan": "x"}, {"none": {"right": "11"}})
    first.merge(write("b.json", {}, {"plan": "x"}, {"none": {"right": "00"}, "full": {"right": "10"}}))
    whole = Results(tmp_path / "a.json")
    assert whole.cells("episodes") == {"none": {"right": "11"}, "full": {"right": "10"}}
    assert whole.data["runs"] == [{"device": "one"}]
    for name, other in (
        ("c.json", write("c.json", {"seed": 1}, {"plan": "x"}, {})),
        ("d.json", write("d.json", {}, {"plan": "y"}, {})),
    ):
        with pytest.raises(InputError, match=r"seed 0|plan differ"):
            whole.merge(other)
        assert Results(tmp_path / "a.json").data == first.data, name
    script = load_script("study")
    script.main(["--out", str(tmp_path / "e.json"), "--merge", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert Results(tmp_path / "e.json").cells("episodes") == whole.cells("episodes")
    with pytest.raises(SystemExit, match=r"no file .*missing\.json"):
        script.main(["--out", str(tmp_path / "f.json"), "--merge", str(tmp_path / "missing.json")])


def test_results_that_are_not_there_are_no_empty_study(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "accuracy.md").write_text("hours of work")
    (tmp_path / "damaged.json").write_text("{")
    whole = Results(tmp_path / "whole.json")
    whole.add("episodes", {"none": {"right": "11"}})
    missing = ["--out", str(tmp_path / "missing.json")]
    script = load_script("study")
    for arguments in (
        [*missing, "--report", "--docs", str(tmp_path / "docs")],
        [*missing, "--drop", "joint"],
        [*missing, "--merge", str(whole.path), str(tmp_path / "misspelt.json")],
    ):
        with pytest.raises(SystemExit, match=r"there is no file .*(missing|misspelt)\.json"):
            script.main(arguments)
    with pytest.raises(SystemExit, match=r"damaged\.json cannot be read"):
        script.main([*missing, "--merge", str(whole.path), str(tmp_path / "damaged.json")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.json", "docs", "whole.json"]
    assert (tmp_path / "docs" / "accuracy.md").read_text() == "hours of work"
    assert [path.name for path in (tmp_path / "docs").iterdir()] == ["accuracy.md"]


def test_no_engine_is_left_when_the_next_is_made(bench, tmp_path, monkeypatch, quick_measures):
    """Two would not fit the device; nor do a sensitivity's passes and an engine."""
    left: list[weakref.ref] = []
    make, run, drift = bench._make, study_module.run_cell, study_module.layer_drift

    def alone(function):
        def checking(*args, **options):
            assert [ref() for ref in left if ref() is not None] == []
            return function(*args, **options)

        return checking

    def noting(cell, engine, *args):
        result = run(cell, engine, *args)
        left.extend(map(weakref.ref, (engine, *jax.tree.leaves(engine._cache.arrays))))
        return result

    monkeypatch.setattr(bench, "_make", alone(make))
    monkeypatch.setattr(study_module, "run_cell", noting)
    monkeypatch.setattr(study_module, "layer_drift", alone(drift))
    bench.release()
    assert Study(bench, [SHARED, APART], Results(tmp_path / "r.json"), SCALE, modes=["full", "droidspeak"]).run()
    assert len(left) > 4
    assert all(ref() is None for ref in left)
