"""A first pass over a corpus: what it holds, and the sample of it that a tokenizer is fitted on."""

import dataclasses
import hashlib
import heapq
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tinyjax.data import cache
from tinyjax.data.corpus import Source
from tinyjax.data.progress import Progress, Ticker
from tinyjax.data.split import digest, digest_is_heldout
from tinyjax.errors import UserError

SETTLED_NS = 2_000_000_000  # file systems and clocks are coarse: a file this fresh may change without a new time


@dataclass(frozen=True)
class Survey:
    """What a corpus holds."""

    fingerprint: str  # 32 hex digits over the bytes of all documents, in order
    train: int  # documents
    heldout: int  # documents
    empty: int  # documents without a character, left out


class Fingerprint:
    """A hash of documents in order, from their content hashes and lengths."""

    def __init__(self):
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, content: bytes, size: int) -> None:
        """Take in the next document: its content hash and its bytes."""
        self._hash.update(content + size.to_bytes(8, "big"))

    def hexdigest(self) -> str:
        """Return the hash of what was added so far."""
        return self._hash.hexdigest()


class Sample:
    """The documents with the smallest content hashes, `limit` bytes of them, whatever order they come in."""

    def __init__(self, limit: int):
        self._limit, self._size = limit, 0
        self._heap: list[tuple[int, bytes]] = []  # largest hash first

    def add(self, content: bytes, text: bytes) -> None:
        """Offer a document; memory stays at the limit plus one document."""
        heapq.heappush(self._heap, (-int.from_bytes(content, "big"), text))
        self._size += len(text)
        while self._heap and self._size - len(self._heap[0][1]) >= self._limit:
            self._size -= len(heapq.heappop(self._heap)[1])

    def texts(self) -> list[str]:
        """Return the documents in order of their hash, the last one cut at the limit."""
        texts = [text for _, text in sorted(self._heap, reverse=True)]
        if (surplus := self._size - self._limit) > 0:
            texts[-1] = texts[-1][:-surplus]
        return [text.decode(errors="ignore") for text in texts]


def take(source: Source, share: float, limit: int, report: Callable[[Progress], None]) -> tuple[Survey, list[str]]:
    """Read all of `source` once; return its survey and up to `limit` bytes of its training documents.

    Raises UserError when no document remains, or when all of them fall on one side of the split.
    """
    fingerprint, sample = Fingerprint(), Sample(limit)
    train = heldout = empty = 0
    ticker = Ticker("read", source.name, None, report)
    for document in source.documents():
        if not document.text:
            empty += 1
            continue
        text = document.text.encode()
        content = digest(text)
        fingerprint.add(content, len(text))
        if digest_is_heldout(content, share):
            heldout += 1
        else:
            train += 1
            sample.add(content, text)
        ticker.add(1, len(text))
    ticker.close()
    survey = Survey(fingerprint.hexdigest(), train, heldout, empty)
    if not train + heldout:
        raise UserError(f"{source.name}: no text in it ({empty} empty documents)")
    if not heldout:
        raise UserError(
            f"{source.name}: none of its {train} documents is held out at data.heldout={share}; raise data.heldout or "
            "give more documents"
        )
    if not train:
        raise UserError(
            f"{source.name}: all of its {heldout} documents are held out at data.heldout={share}; lower data.heldout "
            "or give more documents"
        )
    return survey, sample.texts()


class Memory:
    """Surveys remembered by the paths, sizes and times of a corpus' files, to spare reading them on every run."""

    def __init__(self, folder: Path, source: Source, text_field: str, share: float):
        self._source = source
        self._signature = _signature(source)
        key = cache.key(source.name == "stdlib", text_field, share, self._signature)
        self._path = folder / f"{key}.json" if self._signature else None

    def recall(self) -> Survey | None:
        """Return the survey of these very files, if there was one."""
        if self._path is None or not self._path.exists():
            return None
        try:
            return Survey(**json.loads(self._path.read_bytes()))
        except (ValueError, TypeError):
            return None  # a damaged entry costs one more reading of the corpus

    def keep(self, survey: Survey) -> None:
        """Remember the survey, unless a file has changed since before it was taken."""
        if self._path is not None and _signature(self._source) == self._signature:
            cache.write(self._path, json.dumps(dataclasses.asdict(survey)).encode())


def _signature(source: Source) -> list[list] | None:
    """Return path, size and time of every file; None when these say nothing lasting about the content."""
    if not source.files:
        return None  # a Hugging Face dataset lies in files that only its library knows
    now = time.time_ns()
    try:
        stats = [(str(path.resolve()), path.stat()) for path in source.files]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    if any(stat.st_mtime_ns > now - SETTLED_NS for _, stat in stats):
        return None
    return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]
