import base64
import os
from html.parser import HTMLParser

import pytest

import tinyjax.report.page as page_module
from tinyjax.errors import UserError
from tinyjax.report.document import Claim, Plot, Report, Series, Table, Text
from tinyjax.report.page import page, write
from tinyjax.report.plots import render

VOID = {"meta", "link", "img", "br", "hr"}
HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></style></title><script src=https://example.org/x.js></script>",
    '" onmouseover="alert(1)" x=\'',
    "<img src=x onerror=alert(1)>",
    "javascript:alert(1)",
    "--><!-- <![CDATA[ ]]> <!doctype>",
    "&lt;script&gt; &amp; &#60;b&#62;",
    "\x00\x1b[2J\ud800\ufffe\U0010ffff\u202e",
    "{} %s {0} \\ $x$ {report}",
]


class Reader(HTMLParser):
    """Reads a page strictly: every element closed in order, and what each of them holds."""

    def __init__(self, source: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(source)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_comment(self, data):
        raise AssertionError(f"comment: {data}")

    def handle_data(self, data):
        self.texts.append((tuple(self.open), data))

    def text(self, *within: str) -> str:
        return "".join(data for path, data in self.texts if set(within) <= set(path))

    def assert_inert(self):
        assert not set(self.tags) & {"script", "iframe", "object", "embed", "form", "base", "svg"}
        for tag, name, value in self.attributes:
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "action", "data"):
                assert value.startswith("data:"), (tag, name, value[:60])
        styles = self.text("style")
        assert "@import" not in styles
        assert "url(" not in styles


def report_of(text: str, **changes) -> Report:
    items = (
        Table(text, (text, "n"), ((text, 1234567), (None, 2.0512)), caption=text),
        Plot("curve", text, text, text, (Series(text, [1, 2], [1, 2]),), caption=text),
        Text(text, text),
        Text(text, text, monospace=True),
    )
    fields = {
        "title": text,
        "question": text,
        "source": text,
        "command": text,
        "claims": (Claim(text, "holds", text, text), Claim("other", "undecided", "too few seeds")),
        "items": items,
        "provenance": {text: text, "commit": "abc"},
    }
    return Report(**(fields | changes))


def text_of(source: str) -> str:
    return Reader(source).text("body")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_only_text(text, tmp_path):
    source = write(report_of(text), tmp_path).read_text(encoding="utf-8")
    reader = Reader(source)
    reader.assert_inert()
    assert reader.tags.count("title") == reader.tags.count("style") == 1
    if text.isprintable():
        assert reader.text("h1") == reader.text("title") == text
        assert text in reader.text("td")
        assert text in reader.text("pre")


def test_the_reader_rejects_a_page_that_forgets_to_escape(monkeypatch):
    monkeypatch.setattr(page_module, "_safe", lambda text: text)
    report = report_of(HOSTILE[0])
    with pytest.raises(AssertionError):
        Reader(page(report, {"curve": b""})).assert_inert()


def test_quotes_cannot_leave_an_attribute():
    report = report_of('" onload="alert(1)')
    alts = [value for tag, name, value in Reader(page(report, {"curve": b""})).attributes if name == "alt"]
    assert alts == ['" onload="alert(1): " onload="alert(1) against " onload="alert(1)']


def test_the_page_forbids_scripts_and_the_network():
    policy = dict(
        pair.split(" ", 1)
        for tag, name, value in Reader(page(report_of("x"), {"curve": b""})).attributes
        if name == "content" and "default-src" in value
        for pair in value.split("; ")
    )
    assert policy["default-src"] == "'none'"
    assert policy["img-src"] == "data:"
    assert "script-src" not in policy


def test_images_are_in_the_page_and_beside_it(tmp_path):
    report = report_of("x")
    path = write(report, tmp_path / "new" / "folder")
    png = render(report.items[1])
    assert path == tmp_path / "new" / "folder" / "report.html"
    assert sorted(p.name for p in path.parent.iterdir()) == ["curve.png", "report.html"]
    assert (path.parent / "curve.png").read_bytes() == png
    assert f'src="data:image/png;base64,{base64.b64encode(png).decode()}"' in path.read_text(encoding="utf-8")


def test_order_and_content():
    report = report_of(
        "x",
        items=(Text("first", "one"), Table("second", ("a",), ((1,),)), Text("third", "three")),
        command="python -m experiments.run NAME",
        claims=(Claim("It helps.", "fails", "2.05 ± 0.01 against 1.96", "Table 2"),),
    )
    text = text_of(page(report, {}))
    order = ["Verdict: fails", "It helps.", "2.05\u00a0±\u00a00.01 against 1.96", "Table 2", "first", "second", "third"]
    order += ["python -m experiments.run NAME", "Provenance", "abc"]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)


def test_a_report_without_anything_says_so():
    reader = Reader(page(Report("t", "", "", "", (), ()), {}))
    reader.assert_inert()
    assert "undecided" in reader.text("body")
    assert "no claim was tested" in reader.text("body")
    assert not {"table", "pre", "img", "li"} & set(reader.tags)


def test_numbers_are_aligned_right_under_their_header():
    table = Table("t", ("name", "loss", "± text"), (("a", 2.0512, "1.9 ± 0.1"), ("b", None, "2.0 ± 0.1")))
    reader = Reader(page(report_of("x", items=(table,), provenance={}), {}))
    kinds = [value for tag, name, value in reader.attributes if tag in ("th", "td") and name == "class"]
    assert kinds == ["text", "number", "number"] * 3


def test_long_text_gets_a_column_of_its_width():
    table = Table("t", ("note",), (("a sentence that says what happened",),))
    assert '<td class="text wordy">' in page(report_of("x", items=(table,)), {})


@pytest.mark.parametrize("body", ["\n\nafter two newlines", "  indented\n\ttab", "one", ""])
def test_monospace_text_keeps_its_newlines(body):
    report = report_of("x", items=(Text("t", body, monospace=True),), command="")
    # As a browser does, drop the one newline after <pre>.
    assert Reader(page(report, {})).text("pre").removeprefix("\n") == body


def test_a_failing_render_leaves_the_old_page(tmp_path, monkeypatch):
    path = write(report_of("old"), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def failing(plot):
        raise RuntimeError("out of ink")

    monkeypatch.setattr(page_module, "render", failing)
    with pytest.raises(RuntimeError, match="out of ink"):
        write(report_of("new"), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert b"old" in path.read_bytes()


def test_a_full_disk_leaves_the_old_page_and_one_clear_line(tmp_path, monkeypatch):
    write(report_of("old"), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    real = type(tmp_path).write_bytes

    def full(path, content):
        real(path, content[:10])
        if "report.html" in path.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
    with pytest.raises(UserError, match=r"cannot write the report .No space left on device.") as caught:
        write(report_of("new"), tmp_path)
    assert "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_no_file_is_replaced_before_all_are_written(tmp_path, monkeypatch):
    seen = []
    real = os.replace

    def watched(source, target):
        if not seen:
            seen.extend(sorted(p.name for p in tmp_path.iterdir()))
        real(source, target)

    monkeypatch.setattr(page_module.os, "replace", watched)
    write(report_of("x"), tmp_path)
    assert len(seen) == 2
    assert all(name.startswith(".") for name in seen)


def test_a_file_in_place_of_the_folder_is_one_clear_line(tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(UserError, match="taken: cannot write the report"):
        write(report_of("x"), tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "x"


def test_two_writes_give_the_same_bytes(tmp_path):
    one, two = write(report_of("x"), tmp_path / "1"), write(report_of("x"), tmp_path / "2")
    assert one.read_bytes() == two.read_bytes()
