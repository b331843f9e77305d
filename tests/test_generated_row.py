"""Where an output ends and what of its text may be shown; the tokenizer is a fake that spells one letter per id."""

from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lragent_jax.generated_row import GeneratedRow
from lragent_jax.sampling_params import SamplingParams
from lragent_jax.tokenizer import StreamDecoder


class Letters:
    """Id i is the i-th letter."""

    def push(self, token: int) -> str:
        return chr(ord("a") + token)

    def flush(self) -> str:
        return ""


def ids(text: str) -> list[int]:
    return [ord(letter) - ord("a") for letter in text]


def row(stop=(), max_new_tokens=100, stop_ids=(), decoder=True) -> GeneratedRow:
    params = SamplingParams(max_new_tokens=max_new_tokens, stop=stop)
    letters = cast(StreamDecoder, Letters()) if decoder else None
    return GeneratedRow(params, max_new_tokens, frozenset(stop_ids), letters)


def push(generated: GeneratedRow, text: str) -> GeneratedRow:
    for token in ids(text):
        generated.push(token)
    return generated


def test_length_ends_without_running_the_last_token():
    generated = push(row(max_new_tokens=3), "abcdef")
    assert (generated.text, generated.finish_reason, generated.num_run) == ("abc", "length", 2)


def test_a_stop_id_does_not_join_and_what_is_before_it_has_run():
    generated = push(row(stop_ids=ids("z")), "abzc")
    assert (generated.token_ids, generated.finish_reason, generated.num_run) == (ids("ab"), "stop", 2)


def test_a_stop_string_joins_up_to_the_token_that_completes_it():
    generated = push(row(stop=["cd"]), "abcdef")
    assert generated.token_ids == ids("abcd")
    assert (generated.text, generated.finish_reason, generated.num_run) == ("ab", "stop", 3)


def test_the_earliest_of_several_stop_strings_wins():
    assert push(row(stop=["bcd", "cd"]), "abcd").text == "a"


def test_the_first_stop_string_to_be_complete_wins():
    assert push(row(stop=["bcde", "c"]), "abcde").text == "ab"


def test_without_a_tokenizer_there_is_no_text():
    generated = push(row(max_new_tokens=2, decoder=False), "ab")
    assert (generated.text, generated.token_ids) == (None, ids("ab"))


def test_a_failed_call_leaves_nothing():
    generated = push(row(), "ab")
    generated.discard()
    assert (generated.token_ids, generated.num_run) == ([], 0)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_an_interrupted_row_keeps_what_it_has(count):
    generated = push(row(), "abcde"[:count])
    generated.interrupt(count)
    assert (len(generated.token_ids), generated.num_run) == (count, max(count - 1, 0))


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_streamed_text_is_the_text_and_never_shows_a_stop_string(text, stop):
    generated, shown = row(stop=stop, max_new_tokens=max(len(text), 1)), ""
    for token in ids(text):
        generated.push(token)
        shown += generated.take_text()
        assert not any(s in shown for s in stop)
        if generated.finish_reason:
            break
    ends = [text.find(s) + len(s) for s in stop if s in text]
    if ends:  # the text in front of whichever stop string was complete first
        complete = text[: min(ends)]
        assert generated.text == min((complete[: complete.find(s)] for s in stop if s in complete), key=len)
        assert len(generated.token_ids) == min(ends)
    if generated.finish_reason:
        assert shown == generated.text
