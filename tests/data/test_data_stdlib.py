"""The standard library as a corpus: sources, documentation and topics, without tests, other packages and tables."""

import sysconfig

import pytest

from tinyjax.data import stdlib
from tinyjax.data.corpus import find
from tinyjax.errors import UserError


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small library of our own in place of the real one."""
    root = tmp_path / "python3"
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root if name == "stdlib" else tmp_path / "plat"))

    def write(name, content):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    write("os.py", b"os = 1\n")
    return write


def test_the_real_library_is_there_in_order():
    documents = list(find("stdlib", "text").documents())
    names = [document.name for document in documents]
    assert "stdlib/ast.py" in names
    assert "stdlib/json/decoder.py" in names
    assert len(set(names)) == len(names) > 300
    assert not [name for name in names if "/test/" in name or "-packages/" in name or "/encodings/" in name]
    assert names == [document.name for document in find("stdlib", "text").documents()]
    assert sum(len(document.text) for document in documents) > 3_000_000


def test_sources_keep_their_declared_encoding(library):
    library("latin.py", "# -*- coding: latin-1 -*-\nname = '\u00e9'\n".encode("latin-1"))
    library("mark.py", b"\xef\xbb\xbfx = 1\n")
    assert {d.name: d.text for d in stdlib.documents()} == {
        "stdlib/os.py": "os = 1\n",
        "stdlib/latin.py": "# -*- coding: latin-1 -*-\nname = '\u00e9'\n",
        "stdlib/mark.py": "x = 1\n",
    }


def test_what_is_left_out(library):
    kept = ["a/b.py", "LICENSE.txt", "a/README.rst", "idlelib/NEWS.md"]
    left_out = [
        "test/a.py",
        "a/tests/b.py",
        "a/idle_test/c.py",
        "site-packages/d.py",
        "dist-packages/e.py",
        "a.so",
        "f.pyc",
    ]
    left_out += ["__pycache__/g.py", "encodings/h.py", "ensurepip/i.py", "lib2to3/j.py", "pydoc_data/__init__.py"]
    left_out += ["_sysconfigdata__linux.py", "Makefile"]
    for name in kept + left_out:
        library(name, b"x = 1\n")
    assert {document.name for document in stdlib.documents()} == {f"stdlib/{name}" for name in [*kept, "os.py"]}


def test_topics_are_read_and_not_executed(library, tmp_path):
    library(
        "pydoc_data/topics.py",
        f"open({str(tmp_path / 'ran')!r}, 'w')\ntopics = {{'if': 'The \"if\"\\n', 'for': 'F'}}\n".encode(),
    )
    found = [(d.name, d.text) for d in stdlib.documents() if "topics" in d.name]
    assert found == [("stdlib/pydoc_data/topics.py:for", "F"), ("stdlib/pydoc_data/topics.py:if", 'The "if"\n')]
    assert not (tmp_path / "ran").exists()


def test_a_library_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    with pytest.raises(UserError, match="no library sources"):
        find("stdlib", "text")


def test_a_broken_source_is_named(library):
    library("bad.py", b"x = '\xff'\n")
    with pytest.raises(UserError, match=r"bad\.py cannot be read"):
        list(stdlib.documents())
