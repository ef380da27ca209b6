"""The Python standard library as a corpus: text that every machine has, without a download."""

import ast
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tinyjax.data.readers import Document
from tinyjax.errors import UserError

ELSEWHERE = ("site-packages", "dist-packages", "__pycache__")  # other people's packages, and compiled copies
TESTS = ("test", "tests", "idle_test")  # repetitive, broken on purpose in places, and packaged apart by many systems
TABLES = ("encodings", "ensurepip", "lib2to3")  # generated tables, bundled wheels, and a package of old versions only
LEFT_OUT = frozenset(ELSEWHERE + TESTS + TABLES)
PROSE = (".txt", ".rst", ".md")
TOPICS = "pydoc_data/topics.py"


def files() -> dict[str, Path]:
    """Return {path below the library, with slashes: file} of all sources and documentation, sorted."""
    found: dict[str, Path] = {}
    for root in dict.fromkeys(os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")):
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(set(folders) - LEFT_OUT)
            for name in names:
                path = Path(folder, name)
                relative = path.relative_to(root).as_posix()
                if _wanted(relative) and path.is_file():
                    found.setdefault(relative, path)
    if not found:
        raise UserError("stdlib: this Python has no library sources on disk; give data.corpus a file or a folder")
    return dict(sorted(found.items()))


def _wanted(relative: str) -> bool:
    name = relative.rpartition("/")[2]
    if name.startswith("_sysconfigdata"):
        return False  # the build settings of this one machine
    # The sources in pydoc_data are one huge literal of escaped text: its topics are read as the prose they are.
    return relative == TOPICS or (name.endswith((".py", *PROSE)) and not relative.startswith("pydoc_data/"))


def documents() -> Iterator[Document]:
    """Yield one document per source, documentation file and help topic."""
    for relative, path in files().items():
        if relative == TOPICS:
            yield from _topics(path)
        else:
            yield Document(_source(path) if relative.endswith(".py") else _prose(path), f"stdlib/{relative}")


def _source(path: Path) -> str:
    try:
        with tokenize.open(path) as stream:  # honours the encoding cookie of PEP 263
            return stream.read()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"stdlib: {path} cannot be read ({error}); give data.corpus a file or a folder") from None


def _prose(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"stdlib: {path} cannot be read ({error}); give data.corpus a file or a folder") from None


def _topics(path: Path) -> Iterator[Document]:
    """Yield the topics of Python's help(), read from the parsed assignment: importing it would execute a data file."""
    for statement in ast.parse(_source(path)).body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == "topics":
            for name, text in sorted(ast.literal_eval(statement.value).items()):
                yield Document(text, f"stdlib/{TOPICS}:{name}")
