"""Training data: what is read, joined and refused."""

import dataclasses

import numpy as np
import pytest
from text_models import CONFIG, tokenizer
from training_data import lines, write_lines

from lragent_jax.models.errors import InputError
from lragent_jax.training.examples import Example, read_examples, tokenize

GOOD = {"input": "Question", "output": " a\n"}


def examples(*pairs: tuple[str, str]) -> list[Example]:
    return [Example(*pair, f"file:{number}") for number, pair in enumerate(pairs, start=1)]


def test_lines_are_read_in_order(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [GOOD, "", GOOD | {"output": "ü\u2028b", "more": 1}])
    path.write_text(path.read_text().replace("\\u2028", "\u2028"))  # no line end, for JSON
    assert read_examples(path) == [
        Example("Question", " a\n", f"{path}:1"),
        Example("Question", "ü\u2028b", f"{path}:3"),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "no JSON"),
        ("[1]", r"must be an object with input and output, not \[1\]"),
        ({"input": "a"}, "the field output is missing"),
        ({"output": "a"}, "the field input is missing"),
        ({"input": "a", "output": 3}, "output must be text, not 3"),
        ({"input": None, "output": "a"}, "input must be text, not null"),
        ({"input": "a", "output": ""}, "the output is empty"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path, line, problem):
    path = write_lines(tmp_path / "a.jsonl", [GOOD, line, GOOD, line])
    with pytest.raises(InputError, match=problem) as caught:
        read_examples(path)
    assert f"{path}:2: " in str(caught.value)
    assert f"{path}:4: " in str(caught.value)
    assert f"{path}:3" not in str(caught.value)


def test_files_that_hold_nothing(tmp_path):
    with pytest.raises(InputError, match="is empty"):
        read_examples(write_lines(tmp_path / "a.jsonl", ["", " "]))
    with pytest.raises(InputError, match="there is no file"):
        read_examples(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        read_examples(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b'{"input": "\xe4"}')
    with pytest.raises(InputError, match="cannot be read"):
        read_examples(tmp_path / "latin.jsonl")


def test_lines_of_one_trajectory_are_joined():
    encode = tokenizer().encode
    joined, alone, other = tokenize(
        examples(("Q\n", "a\n"), ("Q\na\nObs\n", "b\n"), ("Q\na\nObs\nb\n", "c\n"), ("Q\n", "x\n"), ("R\n", "a\n")),
        tokenizer(), CONFIG,
    )  # fmt: skip
    pieces = [("Q\n", False), ("a\n", True), ("Obs\n", False), ("b\n", True), ("c\n", True)]
    ids = [[*encode(text, add_bos=text == "Q\n")] for text, _ in pieces]
    assert joined.ids.tolist() == [i for piece in ids for i in piece]
    flags = [is_output for piece, (_, is_output) in zip(ids, pieces, strict=True) for _ in piece]
    assert joined.is_output.tolist() == flags
    assert alone.ids.tolist() == [*encode("Q\n", add_bos=True), *encode("x\n")]
    assert other.ids.tolist() == [*encode("R\n", add_bos=True), *encode("a\n")]


def test_a_prefix_that_lacks_the_output_is_another_sequence():
    """Two answers to one question: the second must not be read as going on behind the first."""
    assert len(tokenize(examples(("Q\n", "a\n"), ("Q\nb\n", "c\n")), tokenizer(), CONFIG)) == 2


def test_joined_lines_have_the_outputs_of_separate_ones():
    written = [Example(line["input"], line["output"], "file") for line in lines()]
    joined = tokenize(written, tokenizer(), CONFIG)
    separate = [tokenize([one], tokenizer(), CONFIG)[0] for one in written]
    assert len(joined) == len(written) // 2
    assert sum(one.num_outputs for one in joined) == sum(one.num_outputs for one in separate)
    assert sum(one.num_inputs for one in joined) < sum(one.num_inputs for one in separate)
    last = separate[1]
    np.testing.assert_array_equal(joined[0].ids[-last.num_outputs :], last.ids[-last.num_outputs :])


def test_what_the_model_has_no_room_for_is_named():
    long = "a b c d " * 2000
    with pytest.raises(InputError, match=r"file:2: input and output are \d+ tokens, the model's context 4096"):
        tokenize(examples(("Q", "a"), ("Q", long)), tokenizer(), CONFIG)
    small = dataclasses.replace(CONFIG, vocab_size=300)
    with pytest.raises(InputError, match="file:1: the tokenizer makes ids beyond the model's vocabulary of 300"):
        tokenize(examples(("Thought Action Observation Question", "Warsaw")), tokenizer(), small)
    with pytest.raises(InputError, match="file:1: this is no Unicode text"):
        tokenize(examples(("\ud800", "a")), tokenizer(), CONFIG)
