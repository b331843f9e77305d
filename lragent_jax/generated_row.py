"""What one row has generated so far: where it stops, and what of its text may be shown."""

from lragent_jax.outputs import FinishReason
from lragent_jax.sampling_params import SamplingParams
from lragent_jax.tokenizer import StreamDecoder


class GeneratedRow:
    """Takes tokens in the order the device produced them and decides where the output ends.

    Ids are compared on the device, strings here. `decoder` turns one id after the other into text (None without a
    tokenizer). `num_run` is how many of the joined tokens are in the cache: all of them behind a stop id, and one
    less otherwise, because the token sampled last is run by whoever reads it next.
    """

    def __init__(
        self,
        params: SamplingParams,
        max_new_tokens: int,
        stop_ids: frozenset[int],
        decoder: StreamDecoder | None,
    ):
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.num_run = 0
        self.max_new_tokens = max_new_tokens
        self._params, self._stop_ids, self._decoder = params, stop_ids, decoder
        self._text = ""
        self._shown = 0
        self._longest_stop = max(map(len, params.stop), default=0)

    @property
    def text(self) -> str | None:
        return None if self._decoder is None else self._text

    def push(self, token: int) -> None:
        """One more token; those behind the end are ignored."""
        if self.finish_reason:
            return
        if token in self._stop_ids:
            self._finish("stop", num_run=len(self.token_ids))
            return
        self.token_ids.append(token)
        if self._decoder is not None and self._add_text(self._decoder.push(token)):
            self._finish("stop", num_run=len(self.token_ids) - 1, flush=False)
            return
        if len(self.token_ids) >= self.max_new_tokens:
            self._finish("length", num_run=len(self.token_ids) - 1)

    def interrupt(self, num_kept: int) -> None:
        """The caller wants no more, or not now: of what was pushed, so many tokens stay."""
        del self.token_ids[num_kept:]
        self.num_run = max(len(self.token_ids) - 1, 0)

    def discard(self) -> None:
        """The call failed: nothing joins."""
        self.token_ids, self.num_run = [], 0

    def take_text(self) -> str:
        """The text that has become certain since the last call: no stop string can begin in it any more."""
        end = len(self._text) if self.finish_reason else len(self._text) - self._held_back()
        new, self._shown = self._text[self._shown : end], max(end, self._shown)
        return new

    def _finish(self, reason: FinishReason, num_run: int, flush: bool = True) -> None:
        self.finish_reason, self.num_run = reason, num_run
        if flush and self._decoder is not None:
            self._add_text(self._decoder.flush())

    def _add_text(self, text: str) -> bool:
        """Adds text and, if that completes a stop string, cuts in front of it."""
        search_from = max(len(self._text) - self._longest_stop + 1, 0)
        self._text += text
        found = [index for stop in self._params.stop if (index := self._text.find(stop, search_from)) >= 0]
        if found:
            self._text = self._text[: min(found)]
        return bool(found)

    def _held_back(self) -> int:
        """Length of the longest end of the text that is the beginning of a stop string."""
        for length in range(min(self._longest_stop - 1, len(self._text) - self._shown), 0, -1):
            end = self._text[-length:]
            if any(stop.startswith(end) for stop in self._params.stop):
                return length
        return 0
