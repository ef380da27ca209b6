"""How far the preparation of data has come: events that drive a progress bar, or print as lines."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

TICK_BYTES = 4 << 20


@dataclass(frozen=True)
class Progress:
    """One event of a stage, which begins and ends with one; the last has done == True."""

    stage: Literal["read", "fit", "tokenise"]
    corpus: str
    documents: int  # so far
    total: int | None  # documents in all, where that is known
    bytes: int  # of raw text, so far
    done: bool

    def __str__(self) -> str:
        of = f" of {self.total}" if self.total and not self.done else ""
        what = {"read": "read", "fit": "tokenizer fitted on" if self.done else "fitting the tokenizer on"}
        return f"{self.corpus}: {what.get(self.stage, 'tokenised')} {self.documents}{of} documents, {self.bytes} bytes"


def silent(progress: Progress) -> None:
    """Report nothing."""
    del progress


class Ticker:
    """Count documents and bytes of a stage, and report every TICK_BYTES."""

    def __init__(self, stage: str, corpus: str, total: int | None, report: Callable[[Progress], None]):
        self._stage, self._corpus, self._total, self._report = stage, corpus, total, report
        self._documents = self._bytes = self._reported = 0
        self._send(done=False)

    def add(self, documents: int, size: int) -> None:
        """Count `documents` more, of `size` bytes together."""
        self._documents += documents
        self._bytes += size
        if self._bytes - self._reported >= TICK_BYTES:
            self._reported = self._bytes
            self._send(done=False)

    def close(self) -> None:
        """Report the end of the stage."""
        self._send(done=True)

    def _send(self, done: bool) -> None:
        self._report(Progress(self._stage, self._corpus, self._documents, self._total, self._bytes, done))
