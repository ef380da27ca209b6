"""Tokenizers give back exactly what they were given, whatever it is."""

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyjax.data.config import TokenizerConfig
from tinyjax.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, load
from tinyjax.data.train_tokenizer import train
from tinyjax.errors import ConfigError, UserError

TEXTS = [
    "def f(x):\n    return x + 12345  # caf\u00e9\n" * 3,
    "the cat sat on the mat; the dog sat on the log\n" * 5,
    "tabs\tand\ttabs\r\n<s> </s> <unk> <0x0A>\n" * 3,
    "\u65e5\u672c\u8a9e \u65e5\u672c \U0001f600\U0001f600\n" * 3,
    "odd \u2581 and \u2585 and \0 here, the cat sat\n" * 2,
    "",
]
SIZES = {"bpe": 340, "unigram": 305, "char": 400}
SPECIAL = ["\u2581", "\u2581\u2581", " \u2581 ", "\u2585", "<s>", "</s>", "<unk>", "<0x0A>", "<0xE2>\u2581"]
WHITE = ["", " ", "  a  ", "\n", "\r\n", "\t", "\0", "\u2028\u2029", "\u00a0\u3000", "\x7f\x1b[0m", "\ufeff"]
MARKS = ["\u0301", "e\u0301", "\ufffd", "\uffff", "\U0010ffff", "\U0001f600", "\U0001f468\u200d\U0001f469"]
HARD = SPECIAL + WHITE + MARKS + ["a" * 10_000, " " * 5000, "\u65e5" * 3000, "0123456789"]
WORDS = [word for text in TEXTS for word in text.split(" ")] + [hard for hard in HARD if len(hard) < 50]


@pytest.fixture(scope="module")
def tokenizers():
    """One tokenizer of each kind."""
    trained = {kind: train(TokenizerConfig(kind=kind, vocab_size=size), TEXTS) for kind, size in SIZES.items()}
    return trained | {"byte": train(TokenizerConfig(kind="byte", vocab_size=259), [])}


KINDS = pytest.mark.parametrize("kind", [*SIZES, "byte"])


def assert_exact(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert not np.isin(ids, [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id]).any()
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    return ids


@KINDS
@pytest.mark.parametrize("text", HARD, ids=[ascii(text[:12]) for text in HARD])
def test_hard_texts_come_back(tokenizers, kind, text):
    assert_exact(tokenizers[kind], text)


@KINDS
@settings(max_examples=150, deadline=None)
@given(text=st.one_of(st.text(), st.lists(st.one_of(st.text(max_size=4), st.sampled_from(WORDS))).map("".join)))
def test_any_text_comes_back(tokenizers, kind, text):
    assert_exact(tokenizers[kind], text)


@KINDS
@settings(max_examples=60, deadline=None)
@given(data=st.binary(), errors=st.sampled_from(["ignore", "replace", "backslashreplace"]))
def test_any_decoded_bytes_come_back(tokenizers, kind, data, errors):
    for text in (data.decode("utf-8", errors), data.decode("latin-1")):
        assert_exact(tokenizers[kind], text)


@KINDS
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from(WORDS)).map("".join), max_size=6))
def test_a_batch_is_its_texts_one_by_one(tokenizers, kind, texts):
    tokenizer = tokenizers[kind]
    for ids, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_plain_sentencepiece_would_fail_these_tests(tokenizers):
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizers["bpe"].model)
    assert processor.decode(processor.encode("a\u2581b")) == "a b"


@KINDS
def test_pieces_are_the_bytes_of_their_ids(tokenizers, kind):
    tokenizer = tokenizers[kind]
    assert tokenizer.vocab_size == len(tokenizer.piece_bytes)
    assert tokenizer.piece_bytes[:3] == (b"", b"", b"")
    assert {bytes([value]) for value in range(256)} <= set(tokenizer.piece_bytes)
    assert all(tokenizer.piece_bytes[3:])
    for text in TEXTS:
        assert b"".join(tokenizer.piece_bytes[i] for i in tokenizer.encode(text)) == text.encode()
    assert tokenizer.decode_bytes([tokenizer.bos_id, *tokenizer.encode("x"), tokenizer.eos_id]) == b"x"


def test_sizes(tokenizers):
    assert tokenizers["bpe"].vocab_size == 340
    assert tokenizers["unigram"].vocab_size == 305
    characters = set("".join(TEXTS)) - set("\u2581\u2585\0")
    assert tokenizers["char"].vocab_size == 259 + len(characters - set("\r\n"))
    assert tokenizers["byte"].vocab_size == 259


def test_a_char_vocabulary_keeps_the_most_common():
    tokenizer = train(TokenizerConfig(kind="char", vocab_size=262), ["aaaa bbb cc d" + " " * 10])
    assert set(tokenizer.piece_bytes[259:]) == {b" ", b"a", b"b"}
    assert_exact(tokenizer, "abcd \u00e9")


@pytest.mark.parametrize("kind", SIZES)
def test_spaces_come_back_from_texts_that_had_none(kind):
    texts = ["\u65e5\u672c\u8a9e\u65e5\u672c" * 200]
    assert_exact(train(TokenizerConfig(kind=kind, vocab_size=264 if kind == "bpe" else 263), texts), " a  b ")


def test_a_char_vocabulary_of_one_is_the_space():
    assert train(TokenizerConfig(kind="char", vocab_size=260), ["abc"]).piece_bytes[259:] == (b" ",)


def test_merges_are_learned_within_lines_and_at_their_ends(tokenizers):
    pieces = set(tokenizers["bpe"].piece_bytes)
    assert any(len(piece) > 3 for piece in pieces)
    assert any(piece.endswith(b"\n") and len(piece) > 1 for piece in pieces)
    assert not any(len(piece) > 1 and any(chr(c).isdigit() for c in piece) for piece in pieces), "digits stand alone"
    assert len(tokenizers["bpe"].encode(TEXTS[1])) < 0.7 * len(TEXTS[1])


def test_reserved_characters_do_not_hide_the_text_around_them():
    """sentencepiece drops a whole sentence with U+2585: the words around it must be learned all the same."""
    texts = ["zebra \u2585 zebra\n"] * 50
    tokenizer = train(TokenizerConfig(vocab_size=270), texts)
    assert len(tokenizer.encode("zebra")) < 5


def test_long_lines_are_learned_too():
    tokenizer = train(TokenizerConfig(vocab_size=270), ["zebra " * 10_000])
    assert len(tokenizer.encode(" zebra")) < 3


@pytest.mark.parametrize("kind", SIZES)
def test_training_is_repeatable(tokenizers, kind):
    again = train(TokenizerConfig(kind=kind, vocab_size=SIZES[kind]), TEXTS)
    assert again.model == tokenizers[kind].model
    assert again.fingerprint == tokenizers[kind].fingerprint


@KINDS
def test_a_model_loads_again(tokenizers, kind, tmp_path):
    tokenizer = tokenizers[kind]
    tokenizer.save(tmp_path / "tokenizer.model")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]
    loaded = load((tmp_path / "tokenizer.model").read_bytes())
    assert type(loaded) is type(tokenizer)
    assert loaded.piece_bytes == tokenizer.piece_bytes
    assert loaded.fingerprint == tokenizer.fingerprint
    assert len({t.fingerprint for t in tokenizers.values()}) == 4


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_vocabulary_too_large_states_the_largest(kind):
    with pytest.raises(ConfigError, match=r"too large .* at most \d+") as caught:
        train(TokenizerConfig(kind=kind, vocab_size=5000), TEXTS)
    assert caught.value.path == "tokenizer.vocab_size"
    largest = int(caught.value.reason.split()[-1])
    assert train(TokenizerConfig(kind=kind, vocab_size=largest), TEXTS).vocab_size == largest


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_vocabulary_too_small_states_the_smallest(kind):
    with pytest.raises(ConfigError, match=r"too small .* at least \d+") as caught:
        train(TokenizerConfig(kind=kind, vocab_size=261), TEXTS)
    least = int(caught.value.reason.split()[-1])
    assert train(TokenizerConfig(kind=kind, vocab_size=least), TEXTS).vocab_size == least


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("texts", [[], [""], ["\n"], ["\u2581\u2581"], ["\0"]])
def test_texts_to_learn_nothing_from_are_refused_in_one_line(kind, texts):
    with pytest.raises(UserError) as caught:
        train(TokenizerConfig(kind=kind, vocab_size=300), texts)
    assert "\n" not in str(caught.value)


@KINDS
def test_lone_surrogates_are_refused(tokenizers, kind):
    for encode in (tokenizers[kind].encode, lambda text: tokenizers[kind].encode_batch([text])):
        with pytest.raises(UserError, match="character 2 is half of a surrogate pair"):
            encode("ab\ud800")


@KINDS
def test_ids_of_another_tokenizer_are_refused(tokenizers, kind):
    for bad in (-1, tokenizers[kind].vocab_size):
        with pytest.raises(UserError, match="outside"):
            tokenizers[kind].decode_bytes([5, bad])
    assert tokenizers[kind].decode_bytes([]) == b""


@KINDS
def test_bytes_that_are_no_text_decode_to_the_replacement_character(tokenizers, kind):
    tokenizer = tokenizers[kind]
    part = tokenizer.encode("\U0001f388")[:2]  # half of a character that no piece has
    assert tokenizer.decode_bytes(part) == "\U0001f388".encode()[:2]
    assert tokenizer.decode(part) == "\ufffd"


def test_damaged_and_foreign_models_are_refused(tokenizers, tmp_path):
    for model in (b"", b"garbage", tokenizers["bpe"].model[:300]):
        with pytest.raises(UserError, match="tokenizer"):
            load(model)
    prefix = str(tmp_path / "foreign")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world"] * 20),
        model_prefix=prefix,
        vocab_size=20,
        hard_vocab_limit=False,
        minloglevel=4,
    )
    with pytest.raises(UserError, match="does not give back"):
        load((tmp_path / "foreign.model").read_bytes())


def test_kinds_are_what_they_say(tokenizers):
    assert isinstance(tokenizers["byte"], ByteTokenizer)
    assert all(isinstance(tokenizers[kind], SentencePieceTokenizer) for kind in SIZES)
    assert tokenizers["byte"].encode("a\u00e9").tolist() == [97 + 3, 0xC3 + 3, 0xA9 + 3]
