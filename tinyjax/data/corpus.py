"""From a corpus as the user names it to a lazy stream of documents in a fixed order."""

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tinyjax.data import hub, readers, stdlib
from tinyjax.data.readers import Document
from tinyjax.errors import UserError, nearest


@dataclass(frozen=True)
class Source:
    """A corpus that was found but not yet read."""

    name: str  # as the user named it
    files: tuple[Path, ...]  # all files it reads; empty for a Hugging Face dataset
    skipped: Mapping[str, int]  # {suffix: files of a folder left out, for it is not known to hold text}
    documents: Callable[[], Iterator[Document]]  # reads everything anew, in the same order


def documents(spec: str, text_field: str) -> Iterator[Document]:
    """Yield the documents of `spec`, lazily and in a fixed order. Raises UserError as `find` and the readers do."""
    return find(spec, text_field).documents()


def find(spec: str, text_field: str) -> Source:
    """Return the source that `spec` names: "stdlib", a file, a folder, a glob, or hf:NAME[:CONFIG][@SPLIT].

    Folders are read recursively, known suffixes only, nothing hidden; a file or glob is read whatever its suffix.
    Raises UserError when there is nothing to read.
    """
    if spec == "stdlib":
        return Source(spec, tuple(stdlib.files().values()), {}, stdlib.documents)
    if spec.startswith("hf:"):
        return Source(spec, (), {}, lambda: hub.documents(spec, text_field))
    try:
        path = Path(spec).expanduser()
        is_folder, is_there = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # no permission, a name too long, an unknown user
        raise UserError(f"{spec}: cannot be looked up ({error}); check data.corpus") from None
    skipped: Counter[str] = Counter()
    if is_folder:
        files = _folder(path, skipped)
        if not files:
            left_out = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items()))
            raise UserError(
                f"{spec}: no text in this folder{f' (left out: {left_out})' if left_out else ''}; "
                f"expected files such as .txt, .md, .py, .jsonl or .parquet"
            )
    elif is_there:
        files = [path]
    elif glob.has_magic(spec):
        files = sorted({Path(match) for match in glob.iglob(str(path), recursive=True) if os.path.isfile(match)})
        if not files:
            raise UserError(f"{spec}: no file matches; check the pattern and the current folder")
    else:
        raise UserError(f"{spec}: no such file or folder{_near(path)}")
    return Source(spec, tuple(files), dict(skipped), lambda: _read(files, text_field))


def _read(files: list[Path], text_field: str) -> Iterator[Document]:
    for path in files:
        yield from readers.read(path, text_field)


def _folder(root: Path, skipped: Counter[str]) -> list[Path]:
    """Return the files to read, sorted by path; a folder reached twice through links is read once."""
    files: list[Path] = []
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_unreadable):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            kind = readers.suffix(path)
            if kind == ".txt" or kind in readers.WHOLE or kind in readers.ROWS:
                files.append(path)
            else:
                skipped[kind or "without suffix"] += 1
    return sorted(files)


def _unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror})")


def _near(path: Path) -> str:
    try:
        return nearest(path.name, [p.name for p in path.parent.iterdir()][:1000], f"in {path.parent}")[:200]
    except OSError:
        return f"; {path.parent} does not exist either"
