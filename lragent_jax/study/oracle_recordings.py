"""Episodes as the oracle plays them, as token ids for what is teacher-forced."""

from collections.abc import Sequence

from lragent_jax.recording import Part, Recording
from lragent_jax.tokenizer import Tokenizer
from lragent_jax.world.examples import padding_for
from lragent_jax.world.names import Split
from lragent_jax.world.oracle import play
from lragent_jax.world.padding import TokenCounter
from lragent_jax.world.question import make_questions
from lragent_jax.world.transcript import Piece


def oracle_recordings(tokenizer: Tokenizer, split: Split, number: int, seed: int, tokens: int) -> list[Recording]:
    """`number` trajectories without mistakes, of 1, 2 and 3 hops in turn, brought to `tokens` tokens."""
    count_tokens = TokenCounter(tokenizer.encode)
    return [
        _recording(tokenizer, play(question, padding_for(question, tokens, count_tokens)))
        for question in make_questions(split, number, seed)
    ]


def _recording(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> Recording:
    return Recording(
        tuple(Part(tokenizer.encode(piece.text, add_bos=not i), piece.role) for i, piece in enumerate(pieces))
    )
