"""Free episodes: a scripted model plays right, wrong and out of its role; a random one goes through the real engine."""

import dataclasses
from collections.abc import Callable

import pytest
import text_models

from lragent_jax import episodes
from lragent_jax.engine import Engine
from lragent_jax.episodes import max_tokens, num_pages, run_episodes
from lragent_jax.models.errors import InputError
from lragent_jax.outputs import GenerationOutput
from lragent_jax.react import ROLES
from lragent_jax.world.examples import padding_for
from lragent_jax.world.oracle import play
from lragent_jax.world.question import Question, make_questions
from lragent_jax.world.transcript import text_of

TOKENIZER = text_models.tokenizer()
QUESTIONS = list(make_questions("evaluation", 6, 2))
NO_MISTAKE = [next(q for q in QUESTIONS if q.num_hops == 3)]

Script = Callable[[str, str], str]
"""(agent, the text so far) to an output."""


class ScriptedEngine:
    """The engine's side of an episode, with a script in the model's place. Trajectories are real ones."""

    def __init__(self, script: Script, context_length: int = 4096):
        self._engine = text_models.text_engine()
        self._script = script
        self.config = dataclasses.replace(self._engine.config, context_length=context_length)
        self.tokenizer, self.agents = TOKENIZER, list(ROLES)
        self.calls: list[tuple[str, int]] = []
        self.trajectory, self.cache_stats = self._engine.trajectory, self._engine.cache_stats
        self.opened = []

    def generate(self, prompts, agent, params):
        self.calls.append((agent, len(prompts)))
        outputs = []
        for trajectory in prompts:
            text = self._script(agent, TOKENIZER.decode(trajectory.token_ids))
            ids = TOKENIZER.encode(text)[: params.max_new_tokens * 8]  # this vocabulary has short tokens
            trajectory.append(ids)
            outputs.append(GenerationOutput(text, ids, "stop", 3, len(trajectory), 0.0, 0.0))
        return outputs


def run(script: Script, questions=QUESTIONS, context_length: int = 4096, **options):
    engine = ScriptedEngine(script, context_length)
    return run_episodes(as_engine(engine), questions, **options), engine


def as_engine(engine: ScriptedEngine) -> Engine:
    return engine  # pyright: ignore[reportReturnType]


def oracle(questions: list[Question], target_tokens: int | None = None, mistake=None) -> Script:
    """Says what the oracle says next."""

    def count(text):
        return len(TOKENIZER.encode(text))

    plays = [play(q, padding_for(q, target_tokens, count), mistake) for q in questions]

    def script(agent: str, text: str) -> str:
        [pieces] = [pieces for pieces in plays if text_of(pieces).startswith(text)]
        so_far = ""
        for piece in pieces:
            if so_far == text:
                assert piece.role == agent
                return piece.text
            so_far += piece.text
        raise AssertionError(text)

    return script


@pytest.mark.parametrize("target_tokens", [None, 1500])
def test_agents_that_write_what_the_oracle_writes_get_the_oracles_episode(target_tokens):
    found, engine = run(oracle(QUESTIONS, target_tokens), target_tokens=target_tokens, batch_size=4)
    for question, episode in zip(QUESTIONS, found, strict=True):
        padding = padding_for(question, target_tokens, lambda text: len(TOKENIZER.encode(text)))
        assert episode.text == text_of(play(question, padding))
        assert episode.token_ids == TOKENIZER.encode(episode.text, add_bos=True)
        assert episode.right
        assert (episode.verdict, episode.verdict_right, episode.end) == ("right", True, "finished")
        assert not any(episode.bad_outputs.values())
        assert episode.num_outputs["plan"] == 2 * episode.num_outputs["action"] == 2 * episode.num_steps
        assert episode.num_outputs["reflect"] == 1
        assert episode.num_prefilled_tokens == {role: 3 * n for role, n in episode.num_outputs.items()}
    assert {num_rows for _, num_rows in engine.calls} <= {1, 2, 3}, "six are three and three"


def test_a_wrong_answer_is_found_out():
    questions = [q for q in QUESTIONS if q.num_hops > 1]
    found, _ = run(oracle(questions, mistake="early"), questions)
    for question, episode in zip(questions, found, strict=True):
        assert episode.answer in question.path[:-1]
        assert not episode.right
        assert (episode.verdict, episode.verdict_right) == ("wrong", True)


def spoilt(role: str, output: str, times: int = 1, at: str = "") -> Script:
    """The oracle, but for the first outputs of a role whose context ends in `at`."""
    right, spoils = oracle(QUESTIONS), dict.fromkeys(range(times))

    def script(agent: str, text: str) -> str:
        if agent == role and text.endswith(at) and spoils:
            spoils.popitem()
            return output
        return right(agent, text) if not spoilt_before(text) else "?"

    def spoilt_before(text: str) -> bool:
        return len(spoils) < times

    return script


@pytest.mark.parametrize(
    "output", ["", "\n", " Search", " search[", " Foo[", " Finish now, please", "[", " Search\n[", "]"]
)
def test_no_tools_name_is_told_and_counted(output):
    [episode], _ = run(spoilt("plan", output, at="Action 1:"), NO_MISTAKE, max_steps=2)
    assert episode.bad_outputs["plan"] >= 1
    assert "\nObservation 1: That is no tool. There are Search, Lookup and Finish.\nThought 2:" in episode.text
    assert (episode.end, episode.answer, episode.verdict) == ("steps", None, None)
    assert not episode.right
    assert not episode.verdict_right
    assert episode.num_outputs["action"] == 0


@pytest.mark.parametrize("output", ["", "\n", "film: x", "film: x\n", "]\n", " ]", "film: x\n]\n"])
def test_an_argument_without_its_bracket_is_told_and_counted(output):
    [episode], _ = run(spoilt("action", output), NO_MISTAKE, max_steps=2)
    assert episode.bad_outputs["action"] == 1
    assert "\nObservation 1: The argument must end with a bracket.\nThought 2:" in episode.text
    assert episode.answer is None


@pytest.mark.parametrize("output", ["nobody]\n", "film: [x]]]\n", "x] and [y]\n", "film: x]", "I need the mayor]\n"])
def test_an_unknown_entity_is_told_and_counted_where_it_is_no_key(output):
    [episode], _ = run(spoilt("action", output), NO_MISTAKE, max_steps=2)
    assert "\nObservation 1: Could not find " in episode.text
    assert episode.bad_outputs["action"] == (0 if output.startswith("film") else 1)


@pytest.mark.parametrize("output", ["", " \n", " I need the mayor of the"])
def test_a_thought_that_is_none_or_does_not_end(output):
    [episode], _ = run(spoilt("plan", output, at="Thought 1:"), NO_MISTAKE, max_steps=1)
    assert episode.bad_outputs["plan"] >= 1
    assert f"Thought 1:{output.rstrip(chr(10))}\nAction 1:" in episode.text
    assert episode.end == "steps"


@pytest.mark.parametrize("output", ["", "\n", " I need the mayor.\n", " rightly\n", "]\n"])
def test_no_verdict_is_counted_and_changes_no_answer(output):
    [episode], _ = run(spoilt("reflect", output), NO_MISTAKE)
    assert episode.bad_outputs == {"plan": 0, "action": 0, "reflect": 1}
    assert episode.right
    assert episode.verdict is None
    assert not episode.verdict_right


@pytest.mark.parametrize("answer", ["Lowen]\n", "city: Nowhere]\n"])
def test_finish_takes_any_argument_with_a_bracket(answer):
    outputs = {"plan": [" I know.\n", " Finish["], "action": [answer], "reflect": [" wrong: no.\n"]}
    [episode], _ = run(lambda agent, text: outputs[agent].pop(0), NO_MISTAKE)
    assert (episode.answer, episode.end, episode.num_steps) == (answer.strip()[:-1], "finished", 1)
    assert episode.bad_outputs["action"] == (1 if ":" not in answer else 0)
    assert episode.verdict_right


def test_what_an_agent_writes_behind_its_stop_is_not_read():
    outputs = {"plan": [" I know.\n\nFinish", " Finish[x"], "action": ["city: A]\nb]"], "reflect": [" wrong\nright"]}
    [episode], _ = run(lambda agent, text: outputs[agent].pop(0), NO_MISTAKE)
    assert (episode.answer, episode.verdict, sum(episode.bad_outputs.values())) == ("city: A", "wrong", 0)


def test_an_episode_that_fills_the_context_ends():
    found, engine = run(lambda agent, text: "x" * 50, max_steps=100, context_length=1500, batch_size=8)
    assert {episode.end for episode in found} == {"tokens"}
    assert all(len(episode.token_ids) <= 1500 for episode in found)
    assert len(engine.calls) < 60


def test_an_opening_that_does_not_fit_is_no_crash():
    found, engine = run(lambda agent, text: "", context_length=200)
    assert [(e.end, e.num_steps, e.token_ids) for e in found] == [("tokens", 0, [])] * len(QUESTIONS)
    assert engine.calls == []


def test_batches_are_even_and_only_hold_who_has_something_to_say():
    questions = list(make_questions("evaluation", 11, 4))
    found, engine = run(oracle(questions), questions, batch_size=8)
    assert engine.calls[0] == ("plan", 5)
    assert max(num_rows for _, num_rows in engine.calls) == 6
    assert sum(num_rows for _, num_rows in engine.calls) == sum(sum(one.num_outputs.values()) for one in found)
    _, engine = run(oracle(QUESTIONS), batch_size=1)
    assert {num_rows for _, num_rows in engine.calls} == {1}


def test_progress_counts_episodes():
    reports = []
    run(oracle(QUESTIONS), batch_size=3, progress=lambda done, total, what: reports.append((done, total)))
    assert reports[-1] == (6, 6)
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)
    assert len(reports) > 4


def test_roles_map_to_agents():
    _, engine = run(lambda agent, text: "", max_steps=1, roles={"plan": "reflect"})
    assert {agent for agent, _ in engine.calls} == {"reflect"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"roles": {"planner": "plan"}}, "unknown roles: planner"),
        ({"roles": {"plan": "nobody"}}, "no such agents: nobody"),
        ({"target_tokens": 4090}, "target_tokens must be between"),
        ({"target_tokens": 0}, "target_tokens must be between"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"temperature": -1.0}, "temperature must be"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(options, message):
    engine = ScriptedEngine(lambda agent, text: "")
    with pytest.raises(InputError, match=message):
        run_episodes(as_engine(engine), QUESTIONS, **options)
    assert engine.calls == []


def test_an_engine_without_a_tokenizer_is_refused_and_no_questions_are_no_work():
    engine = text_models.text_engine(tokenizer=None)
    with pytest.raises(InputError, match="without a tokenizer"):
        run_episodes(engine, QUESTIONS)
    assert run_episodes(text_models.text_engine(), []) == []


def test_pools_are_sized_for_the_longest_episodes():
    engine = as_engine(ScriptedEngine(lambda agent, text: ""))
    assert max_tokens(engine, None) == 4096
    assert max_tokens(engine, 1000) == 1000 + episodes.EXTRA_TOKENS
    assert max_tokens(engine, 3900) == 4096
    assert num_pages(engine, 1000, 5) == 5 * -(-1640 // 16)


def test_a_random_model_runs_to_the_end_wherever_it_stands_in_a_batch(monkeypatch):
    """The real engine, in which nothing is left behind and a row's neighbours change nothing."""
    monkeypatch.setattr(episodes, "_MOST_TOKENS", {"thought": 4, "tool": 2, "argument": 4, "verdict": 2})
    engine = text_models.text_engine(
        num_pages=6, page_size=1024, prefill_buckets=(256,), decode_block=4, sharing="base_lr"
    )
    found = run_episodes(engine, QUESTIONS[:2], max_steps=2, batch_size=2)
    assert run_episodes(engine, QUESTIONS[1::-1], max_steps=2, batch_size=2) == found[::-1]
    for episode in found:
        assert episode.end == "steps"
        assert episode.num_outputs["plan"] == 4
        assert episode.bad_outputs["plan"] >= 2
        assert episode.num_prefilled_tokens["plan"] > 0
        assert not episode.right
    stats = engine.cache_stats()
    assert (stats.base.pages_used, stats.low_rank.pages_used) == (0, 0)
