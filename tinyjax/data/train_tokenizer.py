"""Fit a tokenizer on training documents, deterministically."""

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import sentencepiece

from tinyjax.data.config import BYTES, SPECIALS, TokenizerConfig
from tinyjax.data.tokenizer import SPACE, ByteTokenizer, SentencePieceTokenizer, Tokenizer
from tinyjax.errors import ConfigError, UserError

CHUNK_BYTES = 4096  # a longer "sentence" than sentencepiece's limit would be dropped without a word
RESERVED = re.compile(f"[{SPACE}\u2585\0]+")  # U+2585 marks unknown text: a sentence with one is dropped as a whole
SETTINGS = {
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "required_chars": SPACE,  # without a piece for it, a space would fall back to the bytes of U+2581
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "max_sentence_length": CHUNK_BYTES,
    "num_threads": 2,  # fixed: the unigram model's sums are grouped by thread
    "minloglevel": 4,  # nothing at all: failures come as exceptions
}


def train(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Return the tokenizer of `config` fitted on all `texts`; the same texts in the same order give the same model.

    Raises ConfigError with the largest or smallest possible size when `vocab_size` does not suit the texts.
    """
    if config.kind == "byte":
        return ByteTokenizer()
    chunks = _most_common(texts, config.vocab_size - SPECIALS - BYTES) if config.kind == "char" else _chunks(texts)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chunks,
            model_writer=model,
            model_type=config.kind,
            vocab_size=config.vocab_size,
            hard_vocab_limit=config.kind != "char",
            # The rarest 0.05% of characters are left to their bytes, as is sentencepiece's default.
            character_coverage=1.0 if config.kind == "char" else 0.9995,
            **SETTINGS,
        )
    except RuntimeError as error:
        raise _refusal(str(error), config) from None
    return SentencePieceTokenizer(model.getvalue())


def _refusal(message: str, config: TokenizerConfig) -> UserError:
    if most := re.search(r"too high .*<= (\d+)", message):
        return ConfigError(
            "tokenizer.vocab_size", f"{config.vocab_size} is too large for these texts: at most {most[1]}"
        )
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return ConfigError(
            "tokenizer.vocab_size", f"{config.vocab_size} is too small for these texts: at least {least[1]}"
        )
    if "sentences_.empty()" in message:
        return UserError("tokenizer: the training documents hold no characters to learn from; use tokenizer.kind=byte")
    return ConfigError("tokenizer", f"sentencepiece refused these texts ({message}); try another kind or vocab_size")


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts as sentences of at most CHUNK_BYTES, cut at line ends where possible.

    Line ends stay inside the sentences, so that pieces such as "):" + newline can be learned.
    """
    for text in texts:
        for part in RESERVED.split(text):
            lines, size = [], 0
            for line in _lines(part):
                length = len(line.encode())
                if size + length > CHUNK_BYTES:
                    yield "".join(lines)
                    lines, size = [], 0
                lines.append(line)
                size += length
            if lines:
                yield "".join(lines)


def _lines(text: str) -> Iterator[str]:
    step = CHUNK_BYTES // 4  # characters of at most 4 bytes
    for line in text.splitlines(keepends=True):
        yield from (line[i : i + step] for i in range(0, len(line), step))


def _most_common(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Yield the most common characters: a char model depends on nothing else, and this keeps `vocab_size` a limit.

    Line ends are left to their bytes, one token either way: sentencepiece cuts them off the end of a sentence.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    kept = [character for character in ranked if not RESERVED.match(character) and character not in " \r\n"]
    if kept:
        yield from [" ", *kept[: limit - 1]]
