"""Tokenised documents on disk: flat arrays, written as a stream and opened memory-mapped."""

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from tinyjax.data.split import DIGEST_BYTES
from tinyjax.errors import UserError

TEXT = "heldout.txt"


@dataclass(frozen=True)
class Split:
    """One side of a corpus: document i is tokens[offsets[i]:offsets[i + 1]] = bos, its text, eos."""

    tokens: np.ndarray  # uint16 or uint32 [tokens], memory-mapped
    offsets: np.ndarray  # int64 [documents + 1], in tokens
    byte_counts: np.ndarray  # int64 [documents], UTF-8 bytes of the raw text
    digests: np.ndarray  # uint8 [documents, 16], content hashes; ascending for held-out documents
    text: Path | None  # raw text of all documents end to end; held-out side only

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.byte_counts)

    @property
    def positions(self) -> int:
        """Number of next-token predictions: one less than its stored tokens for every document."""
        return len(self.tokens) - self.documents

    @functools.cached_property
    def bytes(self) -> int:
        """UTF-8 bytes of the raw text."""
        return int(self.byte_counts.sum())

    @property
    def lengths(self) -> np.ndarray:
        """Predictions of each document, int64 [documents]."""
        return np.diff(self.offsets) - 1


def token_dtype(vocab_size: int) -> type:
    """Return the smallest unsigned type that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


class ArrayWriter:
    """Append to the first axis of an .npy file whose length is known only at the end; use it in a `with`."""

    def __init__(self, path: Path, dtype, row_shape: tuple[int, ...] = ()):
        self._dtype, self._row_shape, self._rows = np.dtype(dtype), row_shape, 0
        self._file = open(path, "wb")  # noqa: SIM115 -- closed by __exit__
        self._header()

    def _header(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._rows, *self._row_shape),
        }
        # NumPy pads the header so that the first axis may grow to any length in place.
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, rows) -> None:
        """Write `rows` [n, *row_shape] behind those that are there."""
        rows = np.ascontiguousarray(rows, self._dtype)
        self._rows += len(rows)
        self._file.write(rows.tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        """Write the final length into the header."""
        with self._file:
            self._file.seek(0)
            self._header()


class SplitWriter:
    """Write one side of a corpus, document by document, into a new folder; use it in a `with`."""

    def __init__(self, folder: Path, dtype, keep_text: bool):
        folder.mkdir()
        self._open = contextlib.ExitStack()
        self._tokens = self._array(folder / "tokens.npy", dtype)
        self._offsets = self._array(folder / "offsets.npy", np.int64)
        self._byte_counts = self._array(folder / "byte_counts.npy", np.int64)
        self._digests = self._array(folder / "digests.npy", np.uint8, (DIGEST_BYTES,))
        self._text = None
        if keep_text:
            self._text = self._open.enter_context(open(folder / TEXT, "wb"))  # noqa: SIM115 -- closed by __exit__
        self._end = 0
        self._offsets.append([0])

    def _array(self, *description) -> ArrayWriter:
        return self._open.enter_context(ArrayWriter(*description))

    def append(self, tokens, text: bytes, digest: bytes) -> None:
        """Add a document: its tokens with bos and eos, its raw bytes, its content hash."""
        self._end += len(tokens)
        self._tokens.append(tokens)
        self._offsets.append([self._end])
        self._byte_counts.append([len(text)])
        self._digests.append(np.frombuffer(digest, np.uint8)[None])
        if self._text:
            self._text.write(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        self._open.close()


def sort_by_digest(source: Path, target: Path) -> None:
    """Write the documents of the folder `source` to the new folder `target` in order of their content hash.

    So any number of held-out documents from the start is a random sample, and the same one for every tokenizer.
    """
    split = open_split(source, keep_text=True)
    high, low = split.digests.reshape(-1).view(">u8").reshape(-1, 2).T
    ends = np.cumsum(split.byte_counts)
    with open(split.text, "rb") as text, SplitWriter(target, split.tokens.dtype, keep_text=True) as writer:
        for i in np.lexsort((low, high)).tolist():
            size = int(split.byte_counts[i])
            text.seek(int(ends[i]) - size)
            writer.append(
                split.tokens[split.offsets[i] : split.offsets[i + 1]], text.read(size), split.digests[i].tobytes()
            )


def open_split(folder: Path, keep_text: bool) -> Split:
    """Open what SplitWriter wrote. Raises UserError when files are missing or do not fit each other."""
    text = folder / TEXT if keep_text else None
    try:
        names = ("tokens", "offsets", "byte_counts", "digests")
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
        split = Split(**arrays, text=text)
        rows = split.documents
        whole = (
            len(split.offsets) == rows + 1
            and split.digests.shape == (rows, DIGEST_BYTES)
            and split.offsets[-1] == len(split.tokens)
            and (text is None or text.stat().st_size == split.bytes)
        )
    except (OSError, ValueError, EOFError, IndexError):
        whole = False
    if not whole:
        raise UserError(f"{folder.parent}: damaged cache entry; delete this folder and run again")
    return split
