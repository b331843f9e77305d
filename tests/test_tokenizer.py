"""Tokenizers of folders and of GGUF files: ids as the models' own, one BOS at most, and whole characters in streams."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import config_json, write_gguf
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from lragent_jax.gguf_tokenizer import SPLITS
from lragent_jax.models.checkpoint import MANIFEST_FILE
from lragent_jax.models.errors import CheckpointError, InputError
from lragent_jax.tokenizer import Tokenizer, load_tokenizer

CORPUS = [
    "The capital of France is Paris. It's 3 o'clock, we've 12345 apples!",
    "naïve café, Übermut, Straße; 日本語のテキスト; 🙂🙃 and more 🙂‍↔️",
    "    indented\n\n\tcode = {'a': [1, 2, 33, 444]}  # two  spaces",
] * 4
TEXTS = [
    "", " ", "a", " a", "The capital of France is", "12345 and 3.14159, ½² ٣٤", "don't I'LL we've it'S",
    "  two  spaces\n\n\tnew\r\nline   ", "日本語 naïve café 🙂‍↔️ end", "x=y+1;<>~^|$", "ÅngströmABCdef", "\u0041\u030a",
]  # fmt: skip
TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}: {{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>"]


def byte_level(pre_tokenizer=None) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def byte_fallback() -> Backend:
    """Llama 2's kind: "▁" for spaces, one in front, bytes where there is no token."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghij", "▁a", "ab", "▁ab"]
    merges = [("▁", "a"), ("a", "b"), ("▁", "ab"), ("▁a", "b")]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    backend = Backend(model)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def put_in_front(backend: Backend, template: str) -> Backend:
    tokens = [(token, backend.token_to_id(token)) for token in SPECIAL if backend.token_to_id(token) is not None]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    return backend


def folder_of(path, backend: Backend, **settings_json):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config_json()))
    backend.save(str(path / "tokenizer.json"))
    settings_json = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"} | settings_json
    (path / "tokenizer_config.json").write_text(json.dumps(settings_json))
    return path


def load(path) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Tokenizer:
    return load(folder_of(tmp_path_factory.mktemp("bpe"), byte_level()))


@pytest.fixture(scope="module")
def spm(tmp_path_factory) -> Tokenizer:
    return load(folder_of(tmp_path_factory.mktemp("spm"), byte_fallback()))


# --- folders


@pytest.mark.parametrize("text", TEXTS)
def test_ids_of_a_folder_are_those_of_its_file(tmp_path, text):
    backend = put_in_front(byte_level(), "<s> $A")
    tokenizer = load(folder_of(tmp_path, backend))
    assert tokenizer.encode(text) == backend.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text, add_bos=True) == [tokenizer.bos_token_id, *tokenizer.encode(text)]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == backend.get_vocab_size()


def test_tokenizer_json_counts_whatever_class_is_named(tmp_path):
    """As in folders of Llama 3 distillates, which call a byte-level file LlamaTokenizerFast."""
    backend = byte_level()
    settings_json = {"tokenizer_class": "LlamaTokenizerFast", "clean_up_tokenization_spaces": True, "legacy": False}
    tokenizer = load(folder_of(tmp_path, backend, **settings_json))
    text = "it 's , here . naïve"
    assert tokenizer.encode(text) == backend.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("template", "settings_json", "adds_bos"),
    [
        ("<s> $A", {}, True),
        ("<s> $A <|im_end|>", {}, True),
        ("$A <|im_end|>", {}, False),
        ("$A", {}, False),
        ("$A", {"bos_token": None}, False),
        ("$A", {"add_bos_token": False}, False),
    ],
)
def test_bos_where_the_tokenizer_adds_one_and_nothing_else(tmp_path, template, settings_json, adds_bos):
    tokenizer = load(folder_of(tmp_path, put_in_front(byte_level(), template), **settings_json))
    plain = tokenizer.encode("hello")
    assert tokenizer.adds_bos == adds_bos
    assert tokenizer.encode("hello", add_bos=True) == ([0, *plain] if adds_bos else plain)
    assert tokenizer.encode("", add_bos=True) == ([0] if adds_bos else [])
    assert 2 not in tokenizer.encode("hello", add_bos=True)


def test_bos_is_not_doubled(tmp_path):
    tokenizer = load(folder_of(tmp_path, put_in_front(byte_level(), "<s> $A")))
    assert tokenizer.encode("<s>hello", add_bos=True) == tokenizer.encode("<s>hello") == tokenizer.encode("hello", True)


def test_special_tokens_in_text_count_and_are_left_out_of_text(bpe):
    ids = bpe.encode("<|im_start|>user<|im_end|>")
    assert (ids[0], ids[-1]) == (1, 2)
    assert bpe.decode(ids) == "user"
    assert bpe.decode(ids, skip_special_tokens=False) == "<|im_start|>user<|im_end|>"


@pytest.mark.parametrize("text", ["\ud800", b"bytes", None, 3])
def test_what_is_no_text(bpe, text):
    with pytest.raises(InputError, match="no Unicode text"):
        bpe.encode(text)


def test_chat_template(tmp_path, bpe):
    tokenizer = load(folder_of(tmp_path, byte_level(), chat_template=TEMPLATE))
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages)
    assert text == "<|im_start|>user: hi<|im_end|><|im_start|>assistant: "
    assert (
        tokenizer.apply_chat_template(messages, add_generation_prompt=False) == text.partition("<|im_start|>assis")[0]
    )
    assert tokenizer.encode(text)[0] == 1
    with pytest.raises(InputError, match="refuses these messages: no system role"):
        tokenizer.apply_chat_template([{"role": "system", "content": "hi"}])
    with pytest.raises(InputError, match="refuses these messages"):
        tokenizer.apply_chat_template([])
    with pytest.raises(InputError, match="without a chat template"):
        bpe.apply_chat_template(messages)


def test_folder_without_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_json()))
    assert load_tokenizer(tmp_path) is None
    with pytest.raises(CheckpointError, match="no model at"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model": {"type": "BPE"}}'])
def test_damaged_tokenizer(tmp_path, content):
    folder = folder_of(tmp_path, byte_level())
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json|tokenizer in"):
        load_tokenizer(folder)


def test_saved_beside_a_checkpoint_it_stays_the_same(tmp_path):
    for backend in (put_in_front(byte_level(), "<s> $A"), put_in_front(byte_fallback(), "<s> $A")):
        before = load(folder_of(tmp_path / "model", backend, chat_template=TEMPLATE, eos_token="<|im_end|>"))
        (tmp_path / "checkpoint").mkdir(exist_ok=True)
        (tmp_path / "checkpoint" / MANIFEST_FILE).touch()
        before.save(tmp_path / "checkpoint")
        after = load(tmp_path / "checkpoint")
        for text in TEXTS:
            assert after.encode(text, add_bos=True) == before.encode(text, add_bos=True)
            assert after.decode(after.encode(text)) == before.decode(before.encode(text))
        assert (after.chat_template, after.adds_bos) == (TEMPLATE, True)
        assert (after.bos_token_id, after.eos_token_id) == (before.bos_token_id, before.eos_token_id)


# --- streams


def stream(tokenizer: Tokenizer, ids: list[int], context: list[int] | None = None) -> list[str]:
    decoder = tokenizer.stream_decoder(context or [])
    return [*(decoder.push(i) for i in ids), decoder.flush()]


@pytest.mark.parametrize("kind", ["bpe", "spm"])
@given(text=st.text(max_size=40) | st.text("a b🙂日é", max_size=20))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_streamed_text_is_the_text_in_whole_characters(request, kind, text):
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", ["bpe", "spm"])
@given(ids=st.lists(st.integers(3, 258), max_size=30))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_ids_at_all_stream_to_an_end(request, kind, ids):
    tokenizer = request.getfixturevalue(kind)
    text, whole = "".join(stream(tokenizer, ids)), tokenizer.decode(ids)
    if kind == "bpe":
        assert text == whole
    # Byte fallback takes back a whole character when a broken one follows it; what was shown stays shown.
    rest = iter(text)
    assert all(character in rest for character in whole.replace("\ufffd", ""))


def test_text_comes_as_soon_as_it_is_certain(bpe, spm):
    assert stream(bpe, bpe.encode("q q")) == ["q", " ", "q", ""]
    smile = spm.encode("a🙂")[-4:]
    assert stream(spm, smile) == ["", "", "", "🙂", ""]
    assert stream(spm, smile[:2]) == ["", "", "\ufffd\ufffd"]


def test_the_first_space_stays_behind_a_context(spm):
    ids = spm.encode("a ab")
    assert stream(spm, ids[1:]) == ["ab", ""]
    assert stream(spm, ids[1:], context=ids[:1]) == [" ab", ""]


def test_a_character_that_the_context_leaves_incomplete_is_new(bpe, spm):
    for tokenizer in (bpe, spm):
        ids = tokenizer.encode("aﷺ")
        pieces = stream(tokenizer, ids[-1:], context=ids[:-1])
        assert pieces == ["ﷺ", ""]


def test_the_window_stays_short(bpe, monkeypatch):
    lengths = []
    decode = Tokenizer.decode
    monkeypatch.setattr(
        Tokenizer, "decode", lambda self, ids, **kw: lengths.append(len(ids)) or decode(self, ids, **kw)
    )
    stream(bpe, bpe.encode("The capital of France. " * 30))
    assert max(lengths) <= 3


# --- GGUF


def gguf_with(path, **fields):
    return write_gguf(path / "t.gguf", {f"tokenizer.{n.replace('__', '.')}": v for n, v in fields.items()}, {"x": X})


X = np.ones(1)


def byte_level_gguf(path, pre: str, backend: Backend, **fields):
    stored = json.loads(backend.to_str())["model"]
    tokens = sorted(stored["vocab"], key=stored["vocab"].__getitem__)
    merges = [" ".join(merge) for merge in stored["merges"]]
    types = [3 if token in SPECIAL else 1 for token in tokens]
    return gguf_with(
        path, ggml__model="gpt2", ggml__pre=pre, ggml__tokens=tokens, ggml__merges=merges, ggml__token_type=types,
        ggml__bos_token_id=0, ggml__eos_token_id=2, **fields,
    )  # fmt: skip


def digit_by_digit():
    """SmolLM's own pre-tokenizer, as its tokenizer.json spells it."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


@pytest.mark.parametrize(("pre", "make"), [("smollm", digit_by_digit), ("gpt-2", lambda: None)])
def test_gguf_splits_like_the_folder_it_was_made_from(tmp_path, pre, make):
    backend = byte_level(make())
    tokenizer = load(byte_level_gguf(tmp_path, pre, backend, chat_template=TEMPLATE, ggml__add_bos_token=False))
    for text in [*TEXTS, *CORPUS, "<|im_start|>user\n12<|im_end|>"]:
        assert tokenizer.encode(text, add_bos=True) == backend.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.adds_bos) == (0, 2, False)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]).startswith("<|im_start|>user: hi")
    assert tokenizer.vocab_size == backend.get_vocab_size()


PIECES = {
    "llama-bpe": ["I", "'m", " ", "123", "45", " x", "=[", "7", "]\n\n", " ", " Δt", ";\n", "DON", "'T"],
    "qwen2": ["I", "'m", " ", "1", "2", "3", "4", "5", " x", "=[", "7", "]\n\n", " ", " Δt", ";\n", "DON", "'T"],
    "smollm": [
        "I",
        "'m",
        " ",
        "1",
        "2",
        "3",
        "4",
        "5",
        " x",
        "=[",
        "7",
        "]",
        "\n\n ",
        " Δt",
        ";",
        "\n",
        "DON",
        "'",
        "T",
    ],
    "gpt-2": ["I", "'m", " 12345", " x", "=[", "7", "]", "\n\n ", " Δt", ";", "\n", "DON", "'", "T"],
    "tekken": ["I", "'m", " ", "1", "2", "3", "4", "5", " x", "=[", "7", "]\n\n", " ", " Δt", ";\n", "DON", "'T"],
    "default": ["I", "'", "m", " ", "123", "45", " x", "=[", "7", "]", "\n\n ", " Δt", ";", "\n", "DON", "'", "T"],
}


@pytest.mark.parametrize("pre", PIECES)
def test_how_each_name_splits(pre):
    splits = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(e), "isolated") for e in SPLITS[pre].expressions])
    text = "I'm 12345 x=[7]\n\n  Δt;\nDON'T"
    pieces = [piece for piece, _ in splits.pre_tokenize_str(text)]
    assert "".join(pieces) == text
    assert pieces == PIECES[pre]


def test_gguf_of_qwen2_splits_as_transformers_does(tmp_path):
    """A folder with vocab.json and merges.txt instead of tokenizer.json is left to transformers' own class."""
    backend = byte_level()
    stored = json.loads(backend.to_str())["model"]
    (tmp_path / "config.json").write_text(json.dumps(config_json("qwen2")))
    (tmp_path / "vocab.json").write_text(json.dumps(stored["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(merge) for merge in stored["merges"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    theirs = load(tmp_path)
    (tmp_path / "gguf").mkdir()
    ours = load(byte_level_gguf(tmp_path / "gguf", "qwen2", backend))
    for text in [*TEXTS, *CORPUS]:
        assert ours.encode(text, add_bos=True) == theirs.encode(text, add_bos=True)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


def test_llama3_takes_whole_words_and_a_bos(tmp_path):
    """A word that is a token is taken although no merge leads to it."""
    backend = byte_level()
    stored = json.loads(backend.to_str())["model"]
    tokens = [*sorted(stored["vocab"], key=stored["vocab"].__getitem__), "Ġwhole"]
    merges = [" ".join(merge) for merge in stored["merges"]]
    fields = {"ggml__tokens": tokens, "ggml__merges": merges, "ggml__bos_token_id": 0}
    llama3 = load(gguf_with(tmp_path, ggml__model="gpt2", ggml__pre="llama-bpe", **fields))
    assert llama3.encode("a whole", add_bos=True) == [0, *backend.encode("a").ids, len(tokens) - 1]
    qwen = load(gguf_with(tmp_path, ggml__model="gpt2", ggml__pre="qwen2", **fields))
    assert len(tokens) - 1 not in qwen.encode("a whole", add_bos=True)
    assert qwen.encode("A\u030a") == qwen.encode("\u00c5"), "Qwen composes characters"
    assert llama3.encode("A\u030a") != llama3.encode("\u00c5")


@pytest.fixture(scope="module")
def sentencepiece_model():
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs the sentencepiece package, the reference here")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=420, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, minloglevel=9,
        character_coverage=0.98, allow_whitespace_only_pieces=True, user_defined_symbols=["<mark>"],
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_gguf(path, model, **fields):
    def kind(i):
        if model.IsUnknown(i):
            return 2
        if model.IsControl(i):
            return 3
        return 6 if model.IsByte(i) else 4 if model.IdToPiece(i) == "<mark>" else 1

    size = range(model.GetPieceSize())
    return gguf_with(
        path, ggml__model="llama", ggml__pre="default", ggml__tokens=[model.IdToPiece(i) for i in size],
        ggml__scores=[float(model.GetScore(i)) for i in size], ggml__token_type=[kind(i) for i in size],
        ggml__bos_token_id=model.bos_id(), ggml__eos_token_id=model.eos_id(), ggml__unknown_token_id=model.unk_id(),
        **fields,
    )  # fmt: skip


def test_sentencepiece_vocabulary_encodes_as_sentencepiece_does(tmp_path, sentencepiece_model):
    tokenizer = load(sentencepiece_gguf(tmp_path, sentencepiece_model))
    assert tokenizer.adds_bos
    for text in [*TEXTS, *CORPUS, "ȳ unseen ﷽", "▁ literal"]:
        want = sentencepiece_model.Encode(text)
        assert tokenizer.encode(text) == want, text
        assert tokenizer.encode(text, add_bos=True) == [sentencepiece_model.bos_id(), *want]
        assert tokenizer.decode(want) == sentencepiece_model.Decode(want)
    plain = load(sentencepiece_gguf(tmp_path, sentencepiece_model, ggml__add_space_prefix=False))
    assert plain.encode("a") == [sentencepiece_model.PieceToId("a")]
    assert plain.decode(plain.encode(" a")) == " a"


def test_sentencepiece_finds_special_tokens_whole(tmp_path, sentencepiece_model):
    tokenizer = load(sentencepiece_gguf(tmp_path, sentencepiece_model, ggml__add_bos_token=False))
    assert not tokenizer.adds_bos
    mark, end = (sentencepiece_model.PieceToId(piece) for piece in ("<mark>", "</s>"))
    ids = tokenizer.encode("Paris<mark></s>")
    assert ids[-2:] == [mark, end]
    assert tokenizer.decode(ids) == "Paris<mark>"


def test_gguf_without_a_vocabulary(tmp_path):
    assert load_tokenizer(gguf_with(tmp_path)) is None
    assert load_tokenizer(gguf_with(tmp_path, ggml__model="no_vocab")) is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"ggml__model": "bert"}, r"ggml\.model = 'bert' is not supported"),
        ({"ggml__pre": "viking"}, r"ggml\.pre = 'viking' does not say"),
        ({"ggml__pre": 3}, r"ggml\.pre = 3 does not say"),
        ({"ggml__tokens": [1, 2]}, r"ggml\.tokens is no list of strings"),
        ({"ggml__merges": ["a b c"]}, r"vocabulary lacks tokens of the merge \('a', 'b c'\)"),
        ({"ggml__merges": ["ab"]}, r"vocabulary lacks tokens of the merge \('ab', ''\)"),
        ({"ggml__token_type": [1]}, r"ggml\.token_type does not hold a number for each token"),
        ({"ggml__bos_token_id": 3}, r"bos_token_id = 3 is no token"),
        ({"ggml__model": "llama", "ggml__scores": [1.0]}, r"ggml\.scores does not hold a number for each token"),
    ],
)
def test_vocabularies_that_cannot_be_read(tmp_path, fields, reason):
    good = {"ggml__model": "gpt2", "ggml__pre": "gpt-2", "ggml__tokens": ["a", "b", "ab"], "ggml__merges": ["a b"]}
    load(gguf_with(tmp_path, **good))
    with pytest.raises(CheckpointError, match=reason):
        load_tokenizer(gguf_with(tmp_path, **good | fields))


def test_gguf_tokenizer_saved_beside_a_checkpoint(tmp_path, sentencepiece_model):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / MANIFEST_FILE).touch()
    for path in (
        sentencepiece_gguf(tmp_path, sentencepiece_model, chat_template=TEMPLATE),
        byte_level_gguf(tmp_path, "smollm", byte_level(digit_by_digit()), chat_template=TEMPLATE),
        byte_level_gguf(tmp_path, "llama-bpe", byte_level(), chat_template=TEMPLATE),
    ):
        before = load(path)
        before.save(tmp_path / "checkpoint")
        after = load(tmp_path / "checkpoint")
        for text in TEXTS:
            assert after.encode(text, add_bos=True) == before.encode(text, add_bos=True)
        assert (after.chat_template, after.adds_bos) == (TEMPLATE, before.adds_bos)


# --- imports


def test_transformers_loads_on_first_use_and_keeps_quiet(tmp_path):
    program = (
        "import sys, lragent_jax.tokenizer as t\n"
        "assert not {'transformers', 'tokenizers', 'torch'} & set(sys.modules)\n"
        f"print(t.load_tokenizer({str(folder_of(tmp_path, byte_level()))!r}).decode([70]))"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
