"""The one tolerance table of the tests. Loosening a line needs a written reason beside it."""

import numpy as np

# The largest |got - want| / (1 + |want|) that passes, by what is compared and in which dtype it was computed.
TOLERANCES = {
    # An implementation of an operation against its f32 oracle on the same (rounded) inputs.
    ("attention", "float32"): 2e-5,
    ("attention", "bfloat16"): 2e-2,  # outputs keep 8 bits of mantissa
    ("attention", "float16"): 4e-3,  # 11 bits
    # Rotated queries and keys; a sum in front of the rotation is rounded, or, by a compiler's choice, is not.
    ("rope", "bfloat16"): 2**-7,
    # A whole model's logits against transformers + PEFT.
    ("parity", "float32"): 1e-4,
    # The engine in f32 against a dense float64 model of a sharing mode.
    ("oracle", "float32"): 2e-5,
    # Two ways through our own model that are equal on paper.
    ("equal", "float32"): 1e-5,
}


def assert_close(got, want, what: str, dtype: str = "float32") -> None:
    """Fails where `got` differs from `want` by more than the table allows; NaN never passes."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shapes differ: {got.shape} and {want.shape}"
    error = np.abs(got - want) / (1 + np.abs(want))
    worst = float(error.max()) if error.size else 0.0
    assert worst <= TOLERANCES[what, dtype], f"{what} ({dtype}): off by {worst:.2e}"


TOKEN_MARGIN = 1e-3
"""Where the best two logits of a row are closer, rounding may decide which token greedy decoding takes."""


def assert_greedy(token_ids, logits) -> None:
    """Fails where a token is not the best of its row [T, V], unless it is less than the margin behind it."""
    logits, token_ids = np.asarray(logits, np.float64), np.asarray(token_ids)
    assert len(token_ids) == len(logits), f"{len(token_ids)} tokens and {len(logits)} rows of logits"
    behind = logits.max(axis=1) - np.take_along_axis(logits, token_ids[:, None], 1)[:, 0]
    assert (behind < TOKEN_MARGIN).all(), f"greedy decoding took a lesser token, {behind.max():.2e} behind the best"
