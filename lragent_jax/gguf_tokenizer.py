"""The tokenizer inside a GGUF file: vocabulary, merges and pre-tokenizer, rebuilt with the tokenizers library.

What each value means is set by llama.cpp (src/llama-vocab.cpp): files name a way of splitting text instead of holding
its regular expression.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from lragent_jax.models.errors import CheckpointError
from lragent_jax.models.gguf_file import GGUFFile

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

PREFIX = "tokenizer.ggml."
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # of tokenizer.ggml.token_type

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


@dataclasses.dataclass(frozen=True)
class _Split:
    """How a byte-level vocabulary cuts text before it merges: each expression cuts the pieces of the one before.

    `whole_words`: a piece that is a token is not merged up from its bytes. `bos`: the default for files that do not
    say whether a BOS goes in front.
    """

    expressions: tuple[str, ...]
    whole_words: bool = False
    bos: bool = False
    nfc: bool = False


_LLAMA3 = _Split(
    (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",), whole_words=True, bos=True
)
_QWEN2 = _Split((rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",))
_TEKKEN = _Split(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    whole_words=True,
    bos=True,
)
_DIGIT_BY_DIGIT = _Split((r"\p{N}", _GPT2))

SPLITS = {
    "default": _Split((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _Split((_GPT2,)),
    "mpt": _Split((_GPT2,)),
    "olmo": _Split((_GPT2,)),
    "phi-2": _Split((_GPT2,)),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "falcon3": _LLAMA3,
    "tekken": _TEKKEN,
    "qwen2": dataclasses.replace(_QWEN2, nfc=True),
    "deepseek-r1-qwen": _QWEN2,
    "smollm": _DIGIT_BY_DIGIT,
    "starcoder": _DIGIT_BY_DIGIT,
    "refact": _DIGIT_BY_DIGIT,
    "command-r": _DIGIT_BY_DIGIT,
    "codeshell": _DIGIT_BY_DIGIT,
    "minerva-7b": _DIGIT_BY_DIGIT,
}
"""By `tokenizer.ggml.pre`."""


def tokenizer_from_gguf(file: GGUFFile) -> "PreTrainedTokenizerFast | None":
    """The file's tokenizer with its special tokens and chat template, or `None` if it carries none.

    Raises `CheckpointError` for a kind of vocabulary or a pre-tokenizer that is not known here, and for a damaged one.
    """
    from transformers import PreTrainedTokenizerFast

    model = file.metadata.get(f"{PREFIX}model", "no_vocab")
    if model in ("no_vocab", "none"):
        return None
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if model not in builders:
        raise CheckpointError(
            f"{file.path}: {PREFIX}model = {model!r} is not supported; there are: {', '.join(builders)}"
        )
    tokens = _strings(file, "tokens")
    tokenizer, bos_by_default = builders[model](file, tokens)
    _add_tokens(file, tokenizer, tokens)
    special = {
        name: _token(file, tokens, key)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    if file.metadata.get(f"{PREFIX}add_bos_token", bos_by_default) and special["bos"] is not None:
        _put_in_front(tokenizer, special["bos"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=file.metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": token for name, token in special.items()},
    )


def _byte_level(file: GGUFFile, tokens: list[str]) -> tuple["tokenizers.Tokenizer", bool]:
    """GPT-2's scheme: text is cut by regular expressions, its bytes are spelled as characters and merged."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = file.metadata.get(f"{PREFIX}pre")
    if name not in SPLITS:
        raise CheckpointError(
            f"{file.path}: {PREFIX}pre = {name!r} does not say how text is split, or in a way that is not supported; "
            f"there are: {', '.join(SPLITS)}"
        )
    split = SPLITS[name]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in _strings(file, "merges"))]
    if bad := [merge for merge in merges if not {*merge, "".join(merge)} <= vocab.keys()]:
        raise CheckpointError(f"{file.path} is damaged: the vocabulary lacks tokens of the merge {bad[0]!r}")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=split.whole_words))
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(expression), "isolated") for expression in split.expressions),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split.bos


def _sentencepiece(file: GGUFFile, tokens: list[str]) -> tuple["tokenizers.Tokenizer", bool]:
    """Llama 2's scheme: spaces become "▁", one goes in front, and pairs merge in the order of their scores."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = _token(file, tokens, "unknown")
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=_merges(file, tokens), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    steps = [normalizers.Replace(" ", "▁")]
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.metadata.get(f"{PREFIX}add_space_prefix", True):
        steps = [normalizers.Prepend("▁"), *steps]
        undo = [*undo, decoders.Strip(" ", 1, 0)]
    tokenizer.normalizer, tokenizer.decoder = normalizers.Sequence(steps), decoders.Sequence(undo)
    return tokenizer, True


def _merges(file: GGUFFile, tokens: list[str]) -> list[tuple[str, str]]:
    """Every way of making a normal token from two others, best score first."""
    scores = file.metadata.get(f"{PREFIX}scores")
    types = _types(file, tokens)
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CheckpointError(f"{file.path} is damaged: {PREFIX}scores does not hold a number for each token")
    score = {token: s for token, s, kind in zip(tokens, scores, types, strict=True) if kind == _NORMAL}
    pairs = [
        (-score[token], token[:cut], token[cut:])
        for token in score
        for cut in range(1, len(token))
        if token[:cut] in score and token[cut:] in score
    ]
    return [(left, right) for _, left, right in sorted(pairs)]


def _add_tokens(file: GGUFFile, tokenizer: "tokenizers.Tokenizer", tokens: list[str]) -> None:
    """Control tokens and those of the user are found whole in the text; the former are special."""
    from tokenizers import AddedToken

    for kind, add in ((_CONTROL, tokenizer.add_special_tokens), (_USER_DEFINED, tokenizer.add_tokens)):
        found = [token for token, its_kind in zip(tokens, _types(file, tokens), strict=True) if its_kind == kind]
        add([AddedToken(token, normalized=False, special=kind == _CONTROL) for token in found])


def _put_in_front(tokenizer: "tokenizers.Tokenizer", token: str) -> None:
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", token, "$B"], special_tokens=[(token, tokenizer.token_to_id(token))]
    )


def _strings(file: GGUFFile, name: str) -> list[str]:
    value = file.metadata.get(f"{PREFIX}{name}")
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"{file.path} has no tokenizer that can be read: {PREFIX}{name} is no list of strings")
    return value


def _types(file: GGUFFile, tokens: list[str]) -> list[int]:
    types = file.metadata.get(f"{PREFIX}token_type", [_NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise CheckpointError(f"{file.path} is damaged: {PREFIX}token_type does not hold a number for each token")
    return types


def _token(file: GGUFFile, tokens: list[str], name: str) -> str | None:
    index: Any = file.metadata.get(f"{PREFIX}{name}_token_id")
    if index is None:
        return None
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise CheckpointError(
            f"{file.path} is damaged: {PREFIX}{name}_token_id = {index!r} is no token of its vocabulary"
        )
    return tokens[index]
