"""Trajectories to train on: files, ids, who runs which of them, and which are run by one agent alone."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_models import CONFIG, tokenizer
from training_data import write_lines

from lragent_jax.models.errors import InputError
from lragent_jax.react import ROLES
from lragent_jax.training.examples import TokenSequence, sequences_hash
from lragent_jax.training.joint_run import JointPacker
from lragent_jax.training.packing import batch_shapes, slot_agents
from lragent_jax.training.trajectories import agents_of, alone, read_trajectories, readers, tokenize_trajectories
from lragent_jax.world.examples import Mix, write_examples

LINE: dict[str, Any] = {
    "pieces": [
        {"text": "Question: Warsaw?\nThought 1:"},
        {"text": " the river\n", "agent": "plan", "taught": False},
        {"text": "Action 1:", "agent": None},
        {"text": " Search[", "agent": "plan"},
        {"text": "canal]\n", "agent": "action", "taught": True},
        {"text": "Thought 2:"},
        {"text": " patent\n", "agent": "plan", "taught": False},
    ],
    "note": "not read",
}


def sequence_of(line: Any, path: Path, agents=("plan", "action")) -> TokenSequence:
    [sequence] = tokenize_trajectories(
        read_trajectories(write_lines(path / "one.jsonl", [line])), agents, tokenizer(), CONFIG
    )
    return sequence


def test_pieces_become_ids_outputs_and_who_runs_them(tmp_path):
    sequence = sequence_of(LINE, tmp_path)
    pieces = LINE["pieces"][:5]  # nobody is taught what follows
    ids = [tokenizer().encode(piece["text"], add_bos=not i) for i, piece in enumerate(pieces)]
    assert sequence.ids.tolist() == list(itertools.chain(*ids))
    assert sequence.is_output.tolist() == [i > 2 for i, of_piece in enumerate(ids) for _ in of_piece]
    assert sequence.agents is not None
    num_action = len(ids[4])
    # The bracket that plan drew last is run by action, as is all of its own output but the token that it draws last.
    assert sequence.agents.tolist() == [0] * (len(sequence.ids) - num_action - 1) + [1] * (num_action + 1)


def test_a_trajectory_that_one_agent_runs_alone(tmp_path):
    line = {"pieces": [dict(piece, taught=True) for piece in LINE["pieces"]]}
    sequence = sequence_of(line, tmp_path)
    plan, action = (alone(sequence, agent) for agent in (0, 1))
    assert plan is not None
    assert action is not None
    lengths = np.cumsum([len(tokenizer().encode(p["text"], add_bos=not i)) for i, p in enumerate(line["pieces"])])
    is_of = {  # first token and end of what each writes
        0: [(lengths[0], lengths[1]), (lengths[2], lengths[3]), (lengths[5], lengths[6])],
        1: [(lengths[3], lengths[4])],
    }
    for agent, one in ((0, plan), (1, action)):
        assert len(one.ids) == is_of[agent][-1][1]
        np.testing.assert_array_equal(one.ids, sequence.ids[: len(one.ids)])
        assert set(np.flatnonzero(one.is_output)) == {at for start, end in is_of[agent] for at in range(start, end)}
        assert one.agents is not None
        assert set(one.agents.tolist()) == {agent}
    assert alone(sequence, 2) is None


def test_a_loss_is_that_of_the_agent_whose_output_it_is(tmp_path):
    """In batches: behind another sequence, between the pieces that others wrote."""
    line = {"pieces": [dict(piece, taught=True) for piece in LINE["pieces"]]}
    sequence = sequence_of(line, tmp_path)
    packer = JointPacker([sequence, sequence], 2, 0.0, sequence_length=128, tokens_per_step=128)
    [step] = packer.epoch(None)
    [shape] = batch_shapes([(packer, [step])]).values()
    assert shape.by_token
    batch = packer.batch(step, shape)
    outputs = [(piece["text"], piece["agent"]) for piece in line["pieces"] if piece.get("agent")] * 2
    want = [("plan", "action").index(agent) for text, agent in outputs for _ in tokenizer().encode(text)]
    got = slot_agents(batch)[0][batch.weights[0] > 0]
    assert got.tolist() == want
    written = "".join(text for text, _ in outputs)
    assert tokenizer().decode(batch.targets[0][: len(want)].tolist()) == written


def test_a_share_of_an_epoch_is_run_by_one_agent_each():
    rng = np.random.default_rng(0)
    writers = [None, 0, None, 1, 1, None, 2]
    sequences = [
        TokenSequence(
            rng.integers(2, 99, 7).astype(np.int32), np.array([w is not None for w in writers]), readers(writers)
        )
        for _ in range(400)
    ]

    def kinds(share: float, seed: list[int] | None) -> dict[Any, int]:
        packer = JointPacker(sequences, 3, share, sequence_length=64, tokens_per_step=256)
        drawn = [packer.sequences[i] for step in packer.epoch(seed) for row in step.rows for i in row]
        assert len(drawn) == 400
        assert len({id(one.ids.base if one.ids.base is not None else one.ids) for one in drawn}) == 400
        agents = [tuple(sorted(set(one.agents[:-1].tolist()))) for one in drawn if one.agents is not None]
        return {agent: agents.count(agent) for agent in set(agents)}

    assert kinds(0.0, [0, 0]) == kinds(0.5, None) == {(0, 1, 2): 400}
    some = kinds(0.3, [0, 0])
    assert some == kinds(0.3, [0, 0]) != kinds(0.3, [0, 1])
    assert 250 < some[0, 1, 2] < 310
    assert all(20 < some[agent,] < 60 for agent in range(3))
    assert set(kinds(1.0, [0, 0])) == {(0,), (1,), (2,)}


def test_other_agents_make_other_data(tmp_path):
    one, other = sequence_of(LINE, tmp_path), sequence_of(LINE, tmp_path, ("action", "plan"))
    assert sequences_hash([one]) != sequences_hash([other])


BAD = [
    ({"pieces": []}, "no piece is an output to learn"),
    ({"pieces": [{"text": "a"}]}, "no piece is an output to learn"),
    ({"pieces": [{"text": "a"}, {"text": "b", "agent": "plan", "taught": False}]}, "no piece is an output to learn"),
    ({"pieces": {}}, 'must be an object with "pieces"'),
    ([], 'must be an object with "pieces"'),
    ({"pieces": ["a"]}, r"pieces\[0\] must be an object with text and agent, not \"a\""),
    ({"pieces": [{"text": ""}]}, r"pieces\[0\]\.text must be text that is not empty"),
    ({"pieces": [{"text": "a"}, {"agent": "plan"}]}, r"pieces\[1\]\.text must be text .*, not null"),
    ({"pieces": [{"text": "a", "agent": 1}]}, r"pieces\[0\]\.agent must be a name, or null for context, not 1"),
    ({"pieces": [{"text": "a", "agent": "plan", "taught": 1}]}, r"pieces\[0\]\.taught must be true or false, not 1"),
    ("{", "no JSON"),
]


def test_lines_that_are_no_trajectories_are_listed(tmp_path):
    path = write_lines(tmp_path / "bad.jsonl", [LINE, *(line for line, _ in BAD)])
    with pytest.raises(InputError, match=r"bad\.jsonl cannot be trained on") as caught:
        read_trajectories(path)
    told = str(caught.value)
    for number, (_, problem) in enumerate(BAD, start=2):
        assert [line for line in told.splitlines() if re.search(rf"bad\.jsonl:{number}: {problem}", line)]
    assert "bad.jsonl:1:" not in told
    with pytest.raises(InputError, match="is empty: it must hold lines like"):
        read_trajectories(write_lines(tmp_path / "empty.jsonl", [""]))
    with pytest.raises(InputError, match="there is no file"):
        read_trajectories(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("pieces", "problem"),
    [
        ([{"text": "a", "agent": "plan"}], "must begin with context"),
        ([{"text": "a " * 5000}, {"text": "b", "agent": "plan"}], r"it has \d+ tokens, the model's context 4096"),
    ],
)
def test_trajectories_that_cannot_be_run_are_named(tmp_path, pieces, problem):
    path = write_lines(tmp_path / "long.jsonl", [LINE, {"pieces": pieces}])
    with pytest.raises(InputError, match=rf"long\.jsonl:2: .*{problem}"):
        tokenize_trajectories(read_trajectories(path), ["plan", "action"], tokenizer(), CONFIG)


def test_agents_come_in_the_order_they_write_and_are_taught(tmp_path):
    trajectories = read_trajectories(write_lines(tmp_path / "one.jsonl", [LINE]))
    assert agents_of(trajectories) == ["plan", "action"]
    untaught = {"pieces": [dict(p, taught=p.get("agent") == "action") for p in LINE["pieces"]]}
    with pytest.raises(InputError, match="no output that plan should learn"):
        agents_of(read_trajectories(write_lines(tmp_path / "other.jsonl", [untaught])))


def test_the_world_writes_the_same_episodes_for_both_ways_of_training(tmp_path):
    size = write_examples(tmp_path, "train", 12, 3, len, Mix.of_length(2000))
    trajectories = read_trajectories(tmp_path / "trajectories.jsonl")
    assert len(trajectories) == size.lines["trajectories"] == 12
    assert agents_of(trajectories) == list(ROLES)
    for role in ROLES:
        want = [json.loads(line) for line in (tmp_path / f"{role}.jsonl").read_text().splitlines()]
        got = [
            {"input": "".join(p.text for p in one.pieces[:i]), "output": piece.text}
            for one in trajectories
            for i, piece in enumerate(one.pieces)
            if piece.agent == role and piece.taught
        ]
        assert got == want
    assert any(piece.agent and not piece.taught for one in trajectories for piece in one.pieces), "no mistake to test"
