"""Text to token ids and back: a thin layer over transformers' tokenizers, which load on first use."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lragent_jax.gguf_tokenizer import tokenizer_from_gguf
from lragent_jax.models.errors import CheckpointError, InputError
from lragent_jax.models.folder import ModelKind, find_model
from lragent_jax.models.gguf_file import GGUFFile
from lragent_jax.models.json_file import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILE = "tokenizer.json"
OTHER_VOCABULARIES = ("tokenizer.model", "vocab.json")

_REPLACEMENT = "\ufffd"  # what decoders make of bytes that are no character, or not yet


class Tokenizer:
    """One model's tokenizer. Ids are the truth: `encode` of joined pieces may differ from the joined ids of each."""

    def __init__(self, backend: "PreTrainedTokenizerBase"):
        self._backend = backend
        self.bos_token_id: int | None = _id_or_none(backend.bos_token_id)
        self.eos_token_id: int | None = _id_or_none(backend.eos_token_id)
        # Asked of the tokenizer itself: its settings say it in too many places.
        marked = backend.encode("a", add_special_tokens=True)
        self.adds_bos: bool = bool(marked) and marked[0] == self.bos_token_id and marked != self.encode("a")

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return len(self._backend)

    @property
    def chat_template(self) -> str | None:
        """The template's source, the default one where there are several."""
        template = self._backend.chat_template
        return template.get("default") if isinstance(template, dict) else template

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """The ids of `text` alone. Special tokens that are spelled out in it count as such; none is added.

        `add_bos` asks for a BOS in front, for the first piece of a sequence: it is added if this tokenizer would add
        one and the text does not begin with it. Raises `InputError` for what is no Unicode text.
        """
        try:
            ids = self._backend.encode(text, add_special_tokens=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"this is no Unicode text: {error}") from error
        return self.with_bos(ids) if add_bos else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, as `encode` makes them, on all cores."""
        if not texts:
            return []
        try:
            return self._backend(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
        except (TypeError, ValueError) as error:
            raise InputError(f"these are not all Unicode texts: {error}") from error

    def with_bos(self, ids: list[int]) -> list[int]:
        """The ids of a sequence's first piece: with a BOS in front if this tokenizer adds one and none is there."""
        bos = self.bos_token_id
        if not self.adds_bos or bos is None or ids[:1] == [bos]:
            return ids
        return [bos, *ids]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are no character become U+FFFD."""
        return str(
            self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        )

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation, messages being {"role": …, "content": …}, ready for `encode`.

        Raises `InputError` where the model has no chat template, or its template refuses the messages.
        """
        if self.chat_template is None:
            raise InputError("this model came without a chat template; write the prompt as plain text")
        from jinja2 import TemplateError

        try:
            return str(
                self._backend.apply_chat_template(
                    [dict(message) for message in messages],
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
        except (TemplateError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"the chat template of this model refuses these messages: {error}") from error

    def stream_decoder(self, context: Sequence[int] = ()) -> "StreamDecoder":
        """A decoder for ids that arrive one by one; `context` are those in front of them, already shown."""
        return StreamDecoder(self, context)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json, tokenizer_config.json and the chat template into `folder`."""
        self._backend.save_pretrained(str(folder))


class StreamDecoder:
    """Text of ids that arrive one by one, a whole character at a time.

    A token's text depends on its neighbours (a character may span tokens; some tokenizers drop the first space), so
    new text is that of a window of ids beyond what was shown of it. The window moves on when it ends in a whole
    character and so stays a few tokens long.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._window = list(context[-_CONTEXT_TOKENS:])
        self._num_context = len(self._window)
        # Characters of the window's text; one that the context leaves incomplete counts as new.
        self._num_shown = len(tokenizer.decode(self._window).rstrip(_REPLACEMENT))

    def push(self, token: int) -> str:
        """The text that `token` completes; bytes of a character that is not complete wait for the next call."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        whole = text.rstrip(_REPLACEMENT)
        new = whole[self._num_shown :]
        self._num_shown = max(self._num_shown, len(whole))
        if whole == text:
            self._move_on()
        return new

    def flush(self) -> str:
        """What still waits, with U+FFFD for bytes whose character was never completed."""
        text = self._tokenizer.decode(self._window)
        new = text[self._num_shown :]
        self._num_shown = len(text)
        return new

    def _move_on(self) -> None:
        window = self._window[self._num_context :]
        # Not to one without text: behind a lone space, or a special token, the next token would count as the first.
        if text := self._tokenizer.decode(window):
            self._window, self._num_context, self._num_shown = window, len(window), len(text)


_CONTEXT_TOKENS = 8


def load_tokenizer(path: str | os.PathLike) -> Tokenizer | None:
    """The tokenizer of the model at `path` (what `read_model` reads), or `None` if it has none.

    A GGUF file carries its own; folders are looked into for tokenizer.json, then for what transformers can convert.
    Raises `CheckpointError` for a path that is no model and a tokenizer that cannot be loaded.
    """
    kind, path = find_model(path)
    if kind is ModelKind.GGUF:
        with _transformers():
            backend = tokenizer_from_gguf(GGUFFile(path))
        return None if backend is None else Tokenizer(backend)
    if (path / TOKENIZER_FILE).is_file():
        read_json(path / TOKENIZER_FILE)  # a damaged file is reported with its place
        return _from_folder(path, "PreTrainedTokenizerFast")
    if any((path / name).is_file() for name in OTHER_VOCABULARIES):
        return _from_folder(path, "AutoTokenizer")
    return None


def _from_folder(folder: Path, loader: str) -> Tokenizer:
    """tokenizer.json is loaded as it stands: AutoTokenizer may rebuild it as the class that config.json suggests."""
    with _transformers() as transformers:
        try:
            return Tokenizer(
                getattr(transformers, loader).from_pretrained(
                    str(folder), local_files_only=True, clean_up_tokenization_spaces=False
                )
            )
        except Exception as error:  # the Rust library behind it raises nothing more specific
            raise CheckpointError(f"the tokenizer in {folder} cannot be loaded: {error}") from error


@contextlib.contextmanager
def _transformers() -> Iterator[Any]:
    """transformers, without its advice that PyTorch is missing."""
    switch = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        import transformers

        yield transformers
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before


def _id_or_none(token_id: Any) -> int | None:
    return token_id if isinstance(token_id, int) else None
