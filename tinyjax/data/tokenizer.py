"""Tokenizers that give back exactly the bytes they were given: sentencepiece models and plain bytes."""

import functools
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from tinyjax.data import cache
from tinyjax.data.config import BYTES, SPECIALS
from tinyjax.errors import UserError

SPACE = "\u2581"  # sentencepiece writes a space as this character, so it cannot represent the character itself
BYTE_MODEL = b"tinyjax byte tokenizer\n"
PROBE = f" a  b{SPACE}\n\t\0<s><0x0A>\u00e9\U0001f600 "  # what foreign models (normalising, prefixing) do not give back


class Tokenizer(ABC):
    """Text <-> ids 0..vocab_size-1. Ids 0, 1, 2 are unk, bos, eos; unk never occurs in text and serves as padding."""

    pad_id = 0
    bos_id = 1
    eos_id = 2

    def __init__(self, model: bytes, piece_bytes: tuple[bytes, ...]):
        self.model = model  # all there is to it: `load` makes the same tokenizer from these bytes
        self.piece_bytes = piece_bytes  # raw bytes of every id; empty for the specials

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self.piece_bytes)

    @functools.cached_property
    def fingerprint(self) -> str:
        """32 hex digits of the model's content."""
        return hashlib.blake2b(self.model, digest_size=16).hexdigest()

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, int32 [n], without bos and eos. Raises UserError for a lone surrogate."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return `encode` of every text."""
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids) -> bytes:
        """Return the bytes of integers `ids`: exactly `text.encode()` for the ids of a text. Specials give nothing."""
        ids = np.asarray(ids, np.int64).reshape(-1)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise UserError(f"token id outside 0..{self.vocab_size - 1}: not from this tokenizer")
        return b"".join(map(self.piece_bytes.__getitem__, ids.tolist()))

    def decode(self, ids) -> str:
        """Return the text of integers `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def save(self, path: Path) -> None:
        """Write the model to a file that `load` of its bytes understands."""
        cache.write(path, self.model)


class ByteTokenizer(Tokenizer):
    """One id per byte."""

    def __init__(self):
        super().__init__(BYTE_MODEL, (b"",) * SPECIALS + tuple(bytes([value]) for value in range(BYTES)))

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of the text's UTF-8 bytes, int32 [bytes]."""
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32) + SPECIALS


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model with byte fallback, made exact for the one character that it confuses with a space."""

    def __init__(self, model: bytes):
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise UserError("tokenizer: not a sentencepiece model, or a damaged one; train it again") from None
        self._processor = processor
        super().__init__(model, tuple(_bytes_of(processor, id_) for id_ in range(processor.vocab_size())))
        specials = (processor.unk_id(), processor.bos_id(), processor.eos_id())
        self._space_ids = np.array([processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()], np.int32)
        if (
            specials != (self.pad_id, self.bos_id, self.eos_id)
            or self.decode_bytes(self.encode(PROBE)) != PROBE.encode()
        ):
            raise UserError("tokenizer: this sentencepiece model does not give back its input; train one with tinyjax")

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, int32 [n]."""
        _utf8(text)
        parts = text.split(SPACE)
        ids = [self._processor.encode(part, return_type="numpy") for part in parts]
        return (
            ids[0] if len(ids) == 1 else np.concatenate([ids[0], *(x for i in ids[1:] for x in (self._space_ids, i))])
        )

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return `encode` of every text, on all cores: ids do not depend on the number of threads."""
        whole = [i for i, text in enumerate(texts) if SPACE not in text]
        for i in whole:
            _utf8(texts[i])
        ids = self._processor.encode([texts[i] for i in whole], return_type="numpy", num_threads=os.cpu_count() or 1)
        found = dict(zip(whole, ids, strict=True))
        return [found[i] if i in found else self.encode(text) for i, text in enumerate(texts)]


def load(model: bytes) -> Tokenizer:
    """Return the tokenizer whose `model` these bytes are. Raises UserError when they are damaged or foreign."""
    return ByteTokenizer() if model == BYTE_MODEL else SentencePieceTokenizer(model)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"text: character {error.start} is half of a surrogate pair, which cannot be encoded") from None


def _bytes_of(processor: sentencepiece.SentencePieceProcessor, id_: int) -> bytes:
    if processor.is_control(id_) or processor.is_unknown(id_):
        return b""
    piece = processor.id_to_piece(id_)
    return bytes([int(piece[3:5], 16)]) if processor.is_byte(id_) else piece.replace(SPACE, " ").encode()
