"""Small corpora, in memory and on disk."""

import hashlib
import itertools

import numpy as np
import pytest

from tinyjax.data.config import DataConfig, TokenizerConfig
from tinyjax.data.prepare import Corpus, Prepared, prepare
from tinyjax.data.store import Split

BYTE = TokenizerConfig(kind="byte", vocab_size=259)


@pytest.fixture(scope="session")
def split_of():
    """Return a function (stored lengths, first token) -> Split in which no two tokens are equal."""

    def build(stored, first=0):
        offsets = np.cumsum([0, *stored])
        digests = [np.frombuffer(hashlib.blake2b(bytes([n % 256, n // 256]), digest_size=16).digest(), np.uint8)
                   for n in range(len(stored))]  # fmt: skip
        return Split(
            np.arange(first, first + offsets[-1], dtype=np.uint32),
            offsets.astype(np.int64),
            np.array(stored, np.int64),
            np.array(digests),
            None,
        )

    return build


@pytest.fixture(scope="session")
def prepared_of(split_of):
    """Return a function (stored lengths of each corpus) -> Prepared without a tokenizer."""

    def build(*corpora):
        firsts = itertools.accumulate([0, *map(sum, corpora)])
        splits = [split_of(stored, first) for stored, first in zip(corpora, firsts, strict=False)]
        return Prepared(None, tuple(Corpus(str(i), split, split) for i, split in enumerate(splits)), {})

    return build


@pytest.fixture
def corpus_file(tmp_path):
    """Return a function (texts) -> path of a jsonl file with these documents."""
    import json

    def write(texts, name="corpus.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return path

    return write


@pytest.fixture
def prepared(corpus_file, tmp_path):
    """A tiny corpus of bytes, prepared on disk."""
    path = corpus_file([f"document {i} " + "ab\u00e9\U0001f600 " * (i % 5) for i in range(40)])
    return prepare(DataConfig(corpus=str(path), heldout=0.3), BYTE, tmp_path / "cache")
