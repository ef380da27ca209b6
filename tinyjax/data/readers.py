"""Documents out of files: plain text, source code, JSON lines and Parquet, streamed and strictly checked."""

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tinyjax.errors import UserError

PIECE_BYTES = 8 << 10  # a plain text file of 1 MB must give enough documents for a split by hash; most rows are shorter
MARK = b"<|endoftext|>"  # the usual line between documents of a plain text corpus (TinyStories, OpenWebText)
PLAIN = frozenset({".txt", ""})
MARKUP = (".md", ".rst", ".tex", ".html", ".htm", ".xml")
COMPILED = (".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".go", ".hs", ".java", ".kt", ".ml", ".rs", ".scala", ".swift")
SCRIPTS = (".jl", ".js", ".lisp", ".lua", ".php", ".pl", ".py", ".pyi", ".r", ".rb", ".sh", ".sql", ".ts")
WHOLE = frozenset(MARKUP + COMPILED + SCRIPTS)  # one file is one document
ROWS = frozenset({".jsonl", ".parquet"})
JSON_TYPES = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number", str: "text"}


@dataclass(frozen=True)
class Document:
    """One text and where it came from (`path`, `path:line` or `path:row`), for messages."""

    text: str
    name: str


def suffix(path: Path) -> str:
    """Return the file's suffix in lower case, without a trailing .gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read(path: Path, text_field: str) -> Iterator[Document]:
    """Yield the documents of one file, by its suffix; an unknown suffix is read as one text.

    Raises UserError naming the file, and the row or byte, for anything that is not what the suffix promises.
    """
    kind = suffix(path)
    if kind == ".jsonl":
        return _jsonl(path, text_field)
    if kind == ".parquet":
        return _parquet(path, text_field)
    return _pieces(path) if kind in PLAIN else _whole(path)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb") as stream:
            yield stream
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: truncated or damaged gzip ({error}); fetch or compress it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _decoded(data: bytes, where: str | Path, offset: int) -> str:
    """Return UTF-8 `data` that starts at byte `offset` of its file, without a byte order mark."""
    if (nul := data.find(0)) >= 0:
        raise UserError(f"{where}: byte {offset + nul} is NUL, so this is no text file; leave it out of the corpus")
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        # The utf-8-sig codec counts from behind the mark, utf-8 from the first byte.
        skipped = len(data) - len(error.object)
        raise UserError(
            f"{where}: byte {offset + skipped + error.start} is not UTF-8; convert the file (iconv -t utf-8)"
        ) from None


def _whole(path: Path) -> Iterator[Document]:
    with _opened(path) as stream:
        yield Document(_decoded(stream.read(), path, 0), str(path))


def _pieces(path: Path) -> Iterator[Document]:
    """Cut plain text at the first blank line after every PIECE_BYTES, or at a line end after four times as many.

    The pieces joined give the file's text again, but for its byte order mark and lines that are only MARK: these end a
    document and belong to none.
    """
    with _opened(path) as stream:
        lines: list[str] = []
        first, size, offset, after_blank = 1, 0, 0, False
        for number, line in enumerate(stream, 1):
            marked, blank = line.strip() == MARK, not line.strip()
            full = (size >= PIECE_BYTES and after_blank and not blank) or size >= 4 * PIECE_BYTES
            if lines and (marked or full):
                yield Document("".join(lines), f"{path}:{first}")
                lines, size = [], 0
            if not marked:
                first = first if lines else number
                lines.append(_decoded(line, path, offset))
                size += len(line)
            offset += len(line)
            after_blank = blank
        yield Document("".join(lines), f"{path}:{first}")


def _jsonl(path: Path, text_field: str) -> Iterator[Document]:
    with _opened(path) as stream:
        offset = 0
        for number, line in enumerate(stream, 1):
            where = f"{path}:{number}"
            if line.strip():
                try:
                    row = json.loads(_decoded(line, where, offset))
                except (ValueError, RecursionError) as error:
                    detail = error.msg if isinstance(error, json.JSONDecodeError) else error
                    raise UserError(f"{where}: not valid JSON ({detail}); repair or delete the row") from None
                yield Document(row_text(row, text_field, where), where)
            offset += len(line)


def row_text(row: Any, text_field: str, where: str) -> str:
    """Return the text of a row. Raises UserError that names the fields that are there."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with the field {text_field!r}, got {_kind(row)}")
    if text_field not in row:
        raise UserError(f"{where}: no field {text_field!r}; {_there(row)}")
    return checked_text(row[text_field], text_field, where, row)


def checked_text(value: Any, text_field: str, where: str, fields: Iterable[str]) -> str:
    """Return `value`, found in the column `text_field`, if it is text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise UserError(f"{where}: field {text_field!r} is {_kind(value)}, not text; {_there(fields)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: character {error.start} of {text_field!r} is half of a surrogate pair "
            f"(\\u{ord(value[error.start]):04x}), which is no text; repair or delete the row"
        ) from None
    return value


def _there(fields: Iterable[str]) -> str:
    return f"the row has {', '.join(map(str, fields)) or 'no fields'}; set data.text_field or repair the row"


def _kind(value: Any) -> str:
    return "null" if value is None else JSON_TYPES.get(type(value), type(value).__name__)


def _parquet(path: Path, text_field: str) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow; pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                raise UserError(f"{path}: no column {text_field!r}; it has {', '.join(names)}; set data.text_field")
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                for value in batch.column(0):
                    number += 1
                    where = f"{path}:{number}"
                    yield Document(checked_text(value.as_py(), text_field, where, names), where)
    except UnicodeDecodeError:
        raise UserError(f"{path}: column {text_field!r} holds bytes that are not UTF-8 after row {number}") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
