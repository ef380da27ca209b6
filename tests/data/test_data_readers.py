"""Every kind of file gives its documents, and every kind of bad file one clear line."""

import gzip
import json
import os
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyjax.data import readers
from tinyjax.data.corpus import documents, find
from tinyjax.data.readers import PIECE_BYTES
from tinyjax.errors import UserError


def texts_of(spec, text_field="text"):
    return [document.text for document in documents(str(spec), text_field)]


def refusal(spec, text_field="text"):
    with pytest.raises(UserError) as caught:
        texts_of(spec, text_field)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def rows(*values):
    return "".join(json.dumps(value) + "\n" for value in values)


# Plain text and source code


def test_a_short_text_is_one_document_and_its_byte_order_mark_is_gone(tmp_path):
    text = "a\r\nb\u2028c \u00e9"
    assert texts_of(write(tmp_path / "a.txt", text)) == [text]
    assert texts_of(write(tmp_path / "b.txt", b"\xef\xbb\xbf" + text.encode())) == [text]
    assert texts_of(write(tmp_path / "c.md", b"\xef\xbb\xbf" + text.encode())) == [text]
    assert texts_of(write(tmp_path / "d.txt.gz", text)) == [text]
    assert texts_of(write(tmp_path / "e.log", text)) == [text]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(["\n", " \n", "\r\n", "word " * 400 + "\n", "\u00e9" * 900 + "\n", "x", "\u2028", "y" * 9000])
    )
)
def test_pieces_joined_are_the_text(tmp_path_factory, parts):
    text = "".join(parts)
    pieces = texts_of(write(tmp_path_factory.mktemp("text") / "a.txt", text))
    assert "".join(pieces) == text
    longest = max(map(len, text.encode().split(b"\n")))
    for piece in pieces:
        assert len(piece.encode()) <= 4 * PIECE_BYTES + longest + 1
    assert all(len(piece.encode()) >= PIECE_BYTES for piece in pieces[:-1])


def test_plain_text_is_cut_at_blank_lines(tmp_path):
    paragraph = "a line of forty characters, more or less\n" * 60 + "\n"
    names = [document.name for document in documents(str(write(tmp_path / "a.txt", paragraph * 40)), "text")]
    pieces = texts_of(tmp_path / "a.txt")
    assert len(pieces) > 8
    assert all(piece.startswith("a line") and piece.endswith("\n\n") for piece in pieces)
    spaced = texts_of(write(tmp_path / "b.txt", (paragraph + " \n\r\n") * 40))
    assert all(piece.startswith("a line") and piece.endswith("\n\n \n\r\n") for piece in spaced), "white stays behind"
    assert names[:2] == [f"{tmp_path / 'a.txt'}:1", f"{tmp_path / 'a.txt'}:{1 + pieces[0].count(chr(10))}"]


def test_source_code_is_never_cut(tmp_path):
    code = "x = 1\n\n" * PIECE_BYTES
    assert texts_of(write(tmp_path / "a.py", code)) == [code]


def test_document_marks_end_documents_and_are_dropped(tmp_path):
    path = write(
        tmp_path / "a.txt", "one\ntwo\n<|endoftext|>\nthree\n <|endoftext|> \n<|endoftext|>\nfour <|endoftext|> five"
    )
    assert texts_of(path) == ["one\ntwo\n", "three\n", "four <|endoftext|> five"]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "a.csv"])
def test_text_that_is_none_names_file_and_byte(tmp_path, name):
    bad = write(tmp_path / name, b"ok\n\xef\xbb\xbffine\nab\xffcd\n")
    assert "byte 13 is not UTF-8" in refusal(bad)
    assert str(bad) in refusal(bad)
    assert "byte 5 is not UTF-8" in refusal(write(tmp_path / name, b"\xef\xbb\xbfab\xff"))
    assert "byte 4 is NUL" in refusal(write(tmp_path / name, b"abc\n\0\n"))
    assert "is NUL" in refusal(write(tmp_path / name, "utf-16".encode("utf-16")))


# Rows


def test_jsonl_gives_its_rows(tmp_path):
    content = rows({"text": "a\nb", "id": 1}, {"id": 2, "text": ""}) + "\n  \n" + json.dumps({"text": "\0\u2028"})
    for name in ("a.jsonl", "a.JSONL", "a.jsonl.gz"):
        path = write(tmp_path / name, content)
        assert texts_of(path) == ["a\nb", "", "\0\u2028"]
        assert [d.name for d in documents(str(path), "text")] == [f"{path}:1", f"{path}:2", f"{path}:5"]
    assert texts_of(write(tmp_path / "b.jsonl", b"\xef\xbb\xbf" + content.encode()))[0] == "a\nb"
    assert texts_of(write(tmp_path / "c.jsonl", rows({"story": "x"})), "story") == ["x"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{bad", "not valid JSON"),
        ('{"text": "a"} x', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"text": ' + "1" * 5000 + "}", "not valid JSON"),
        ('{"body": "x", "id": 1}', "no field 'text'; the row has body, id"),
        ("{}", "no field 'text'; the row has no fields"),
        ('{"text": 3, "body": "x"}', "field 'text' is a number, not text; the row has text, body"),
        ('{"text": null}', "field 'text' is null"),
        ('{"text": ["a"]}', "field 'text' is a list"),
        ("[1]", "expected an object with the field 'text', got a list"),
        ('"text"', "got text"),
        (r'{"text": "ab\ud800c"}', r"character 2 of 'text' is half of a surrogate pair (\ud800)"),
    ],
    ids=range(12),
)
def test_bad_rows_are_named(tmp_path, row, says):
    path = write(tmp_path / "a.jsonl", rows({"text": "fine"}) + row + "\n")
    message = refusal(path)
    assert message.startswith(f"{path}:2: ")
    assert says in message


def test_rows_that_are_not_utf8_are_named(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n')
    assert refusal(path).startswith(f"{path}:2: byte 24 is not UTF-8")


def test_damaged_gzip_is_named(tmp_path):
    whole = gzip.compress(rows(*({"text": str(i) * 50} for i in range(2000))).encode())
    for name, data in {
        "cut": whole[:-200],
        "cut trailer": whole[:-4],
        "none": b"plain text",
        "flipped": whole[:50] + whole[:99],
    }.items():
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(data)
        assert refusal(path).startswith(f"{path}: truncated or damaged gzip")


def test_parquet_gives_its_rows(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    values = [f"row {i}" for i in range(2500)]
    columns = {
        "plain": pa.array(values),
        "large": pa.array(values, pa.large_string()),
        "dictionary": pa.array(values).dictionary_encode(),
        "number": pa.array(range(2500)),
        "holes": pa.array([*values[:-1], None]),
    }
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table(columns), path)
    for name in ("plain", "large", "dictionary"):
        assert texts_of(path, name) == values
    assert "field 'number' is a number" in refusal(path, "number")
    assert refusal(path, "holes").startswith(f"{path}:2500: field 'holes' is null")
    assert "no column 'text'; it has plain, large" in refusal(path)


def test_bad_parquet_is_named(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["a" * 100] * 100}), path)
    data = path.read_bytes()
    for bad in (b"", b"PAR1", data[:-20], data[: len(data) // 2]):
        path.write_bytes(bad)
        assert refusal(path).startswith(f"{path}: not a readable Parquet file")
    invalid = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff"))
    parquet.write_table(pa.table({"text": invalid}), path)
    assert "not UTF-8" in refusal(path)


# Folders, globs, names


def test_folders_are_read_in_order_and_what_is_left_out_is_counted(tmp_path):
    write(tmp_path / "b.txt", "b")
    write(tmp_path / "a" / "z.md", "z")
    write(tmp_path / "a" / "deep" / "y.jsonl.gz", rows({"text": "y1"}, {"text": "y2"}))
    write(tmp_path / "A.PY", "A")
    for left_out in ("x.csv", "a/x.csv", "config.json", "a/logo.png", "README", "a/w.tar.gz"):
        write(tmp_path / left_out, b"\0\0")
    for hidden in (".hidden.txt", ".git/config.txt", "a/.cache/b.txt"):
        write(tmp_path / hidden, b"\0")
    source = find(str(tmp_path), "text")
    assert [document.text for document in source.documents()] == ["A", "y1", "y2", "z", "b"]
    assert source.skipped == {".csv": 2, ".json": 1, ".png": 1, "without suffix": 1, ".tar": 1}
    assert [document.text for document in source.documents()] == ["A", "y1", "y2", "z", "b"], "as often as wanted"


def test_link_loops_end_and_linked_folders_are_read_once(tmp_path):
    write(tmp_path / "corpus" / "a.txt", "a")
    write(tmp_path / "elsewhere" / "b.txt", "b")
    os.symlink(tmp_path / "corpus", tmp_path / "corpus" / "loop")
    os.symlink(tmp_path / "elsewhere", tmp_path / "corpus" / "link")
    os.symlink(tmp_path / "elsewhere", tmp_path / "corpus" / "link2")
    assert sorted(texts_of(tmp_path / "corpus")) == ["a", "b"]


def test_globs_read_what_matches_whatever_its_suffix(tmp_path):
    write(tmp_path / "b.log", "b")
    write(tmp_path / "a.log", "a")
    write(tmp_path / "sub.log" / "c.log", "c")
    assert texts_of(tmp_path / "*.log") == ["a", "b"]
    assert texts_of(tmp_path / "**" / "*.log") == ["a", "b", "c"]
    write(tmp_path / "odd[1].txt", "odd")
    assert texts_of(tmp_path / "odd[1].txt") == ["odd"], "a file that is there is no pattern"


def test_nothing_to_read_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "images" / "a.png", b"\0")
    write(tmp_path / "images" / "b.png", b"\0")
    write(tmp_path / "corpus.txt", "x")
    assert "no text in this folder;" in refusal(tmp_path / "empty")
    assert "left out: 2 .png" in refusal(tmp_path / "images")
    assert "no file matches" in refusal(tmp_path / "*.jsonl")
    assert "did you mean corpus.txt?" in refusal(tmp_path / "corpsu.txt")
    assert "does not exist either" in refusal(tmp_path / "no" / "such.txt")
    (tmp_path / "dead.txt").symlink_to(tmp_path / "gone.txt")
    assert "dead.txt: cannot be read" in refusal(tmp_path)
    assert "cannot be looked up" in refusal("x" * 5000)
    assert "cannot be looked up" in refusal("~no such user/corpus.txt")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_are_named(tmp_path):
    path = write(tmp_path / "a.txt", "a")
    path.chmod(0)
    assert f"{path}: cannot be read (Permission denied)" in refusal(path)


# Hugging Face


class FakeDataset:
    column_names = ("text", "id")

    def __init__(self, rows):
        self._rows = rows

    def select_columns(self, names):
        return [{name: row[name] for name in names} for row in self._rows]


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the datasets library that notes what it was asked for."""
    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        if name == "gone":
            raise RuntimeError("Dataset 'gone' doesn't exist\non the Hub")
        return FakeDataset([{"text": "one", "id": 1}, {"text": None if name == "holes" else "two", "id": 2}])

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_hugging_face_names_have_config_and_split(hub):
    for spec in ("hf:org/name", "hf:org/name:en", "hf:org/name@test", "hf:org/name:en@test[:1%]"):
        assert texts_of(spec) == ["one", "two"]
    assert hub == [
        ("org/name", None, "train"),
        ("org/name", "en", "train"),
        ("org/name", None, "test"),
        ("org/name", "en", "test[:1%]"),
    ]


def test_hugging_face_failures_are_one_line(hub):
    assert "Dataset 'gone' doesn't exist" in refusal("hf:gone")
    assert refusal("hf:holes").startswith("hf:holes:2: field 'text' is null")
    assert "no column 'body'; it has text, id" in refusal("hf:x", "body")
    for spec in ("hf:", "hf:a:b:c", "hf:a@", "hf::b"):
        assert "expected hf:NAME" in refusal(spec)


def test_the_extra_is_named_when_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'tinyjax[hf]'" in refusal("hf:x")


def test_suffixes_look_through_gzip(tmp_path):
    assert readers.suffix(tmp_path / "A.Txt.GZ") == ".txt"
    assert readers.suffix(tmp_path / "README") == ""
