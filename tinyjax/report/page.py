"""The report as one HTML page that needs nothing else: no network, no script, its curves inside it and beside it."""

import base64
import html
import os
from collections.abc import Mapping
from pathlib import Path

from tinyjax.errors import UserError
from tinyjax.report.display import is_numeric, printable, read
from tinyjax.report.document import Claim, Plot, Report, Table, Text, verdict
from tinyjax.report.plots import render
from tinyjax.report.style import STYLE

PAGE = "report.html"
_MARKS = {"holds": "✓", "fails": "✗", "undecided": "?"}
# A second wall behind the escaping: a browser refuses scripts and every address outside the file.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write(report: Report, folder: Path) -> Path:
    """Write the page and one PNG per plot into `folder` (created if absent) and return the page's path.

    Everything is rendered before the first file is touched, and every file is replaced whole. Raises UserError when
    the folder cannot be written.
    """
    pictures = {item.name: render(item) for item in report.items if isinstance(item, Plot)}
    files = {f"{name}.png": png for name, png in pictures.items()} | {PAGE: page(report, pictures).encode()}
    waiting = {folder / f".{name}.{os.getpid()}.tmp": folder / name for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for temporary, content in zip(waiting, files.values(), strict=True):
            temporary.write_bytes(content)
        for temporary, final in waiting.items():
            os.replace(temporary, final)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write the report ({error.strerror or error}); choose a folder that can be written"
        ) from None
    finally:
        for temporary in waiting:
            _discard(temporary)
    return folder / PAGE


def _discard(temporary: Path) -> None:
    try:
        temporary.unlink()
    except OSError:  # renamed already, or never written: then the error that matters is the one being raised
        pass


def page(report: Report, pictures: Mapping[str, bytes]) -> str:
    """Return the HTML of the report; `pictures` holds the PNG of every plot by name."""
    parts = [_head(report), _claims(report.claims)]
    for item in report.items:
        match item:
            case Table():
                parts.append(_table(item))
            case Plot():
                parts.append(_plot(item, pictures[item.name]))
            case Text():
                parts.append(_text(item))
    parts += [_command(report.command), _provenance(report.provenance), "</main>\n</body>\n</html>\n"]
    return "\n".join(filter(None, parts))


def _safe(text: str) -> str:
    return html.escape(printable(text), quote=True)


def _unbroken(text: str) -> str:
    """Safe text in which no line ends at a plus-minus sign."""
    return _safe(text).replace(" ± ", "\u00a0±\u00a0")


def _element(tag: str, text: str, kind: str = "") -> str:
    """An element around plain text; nothing for empty text."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<{tag}{attribute}>{_safe(text)}</{tag}>" if text else ""


def _box(content: str, label: str, kind: str = "") -> str:
    """A box that scrolls by itself, also from the keyboard."""
    box = f'<div class="{f"scroll {kind}".strip()}" tabindex="0" role="region" aria-label="{_safe(label)}">'
    return f"{box}{content}</div>"


def _head(report: Report) -> str:
    source = _element("p", f"Source: {report.source}" if report.source else "", "source")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_safe(report.title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
{_element("h1", report.title)}
{_element("p", report.question, "question")}
{source}
</header>"""


def _badge(value: str, prefix: str = "") -> str:
    return f'<span class="badge {value}"><span aria-hidden="true">{_MARKS[value]}</span> {prefix}{value}</span>'


def _claims(claims: tuple[Claim, ...]) -> str:
    counts = {value: sum(claim.verdict == value for claim in claims) for value in _MARKS}
    tally = ", ".join(f"{n} {value}" for value, n in counts.items() if n) or "no claim was tested"
    items = "\n".join(
        f'<li class="{claim.verdict}">{_element("p", claim.sentence, "sentence")}'
        f'<p class="evidence">{_badge(claim.verdict)} {_unbroken(claim.evidence)}</p>'
        f"{_element('p', claim.source, 'source')}</li>"
        for claim in claims
    )
    listed = f'<ul class="claims">\n{items}\n</ul>' if claims else ""
    overall = f'{_badge(verdict(claims), "Verdict: ")}<span class="note">Claims: {tally}</span>'
    return f'<section>\n<div class="overall">{overall}</div>\n{listed}\n</section>'


def _table(table: Table) -> str:
    columns = [[row[i] for row in table.rows] for i in range(len(table.columns))]
    texts = [read(column) for column in columns]
    kinds = [_kind(is_numeric(column), shown) for column, shown in zip(columns, texts, strict=True)]
    header = "".join(
        f'<th scope="col" class="{kind}">{_safe(name)}</th>' for name, kind in zip(table.columns, kinds, strict=True)
    )
    rows = "\n".join(
        "<tr>" + "".join(f'<td class="{k}">{_safe(cell)}</td>' for cell, k in zip(row, kinds, strict=True)) + "</tr>"
        for row in zip(*texts, strict=True)
    )
    body = f"<table>\n<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
    caption = _element("figcaption", table.caption)
    return f"<section>\n{_element('h2', table.title)}\n<figure>{_box(body, table.title)}{caption}</figure>\n</section>"


def _kind(numeric: bool, shown: list[str]) -> str:
    """The classes of a column's cells; without a least width, a wide table squeezes long text to one word a line."""
    if numeric:
        return "number"
    return "text wordy" if max(map(len, shown), default=0) > 24 else "text"


def _plot(plot: Plot, png: bytes) -> str:
    described = _safe(f"{plot.title}: {plot.y_label} against {plot.x_label}")
    image = f'<img alt="{described}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    caption = _element("figcaption", plot.caption)
    return f'<section>\n<figure class="plot">{_box(image, plot.title)}{caption}</figure>\n</section>'


def _text(text: Text) -> str:
    # HTML drops a newline right after <pre>: giving it one keeps those of the text.
    body = (
        _box(f"<pre>\n{_safe(text.body)}</pre>", text.title, "long")
        if text.monospace
        else f'<div class="prose">{_safe(text.body)}</div>'
    )
    return f"<section>\n{_element('h2', text.title)}\n{body}\n</section>"


def _command(command: str) -> str:
    body = _box(f"<pre>\n{_safe(command)}</pre>", "Command")
    return f"<section>\n<h2>Command</h2>\n{body}\n</section>" if command else ""


def _provenance(provenance: Mapping[str, str]) -> str:
    rows = "\n".join(
        f'<tr><th scope="row">{_safe(name)}</th><td>{_safe(value)}</td></tr>' for name, value in provenance.items()
    )
    table = f'<table class="provenance"><tbody>\n{rows}\n</tbody></table>'
    return f"<section>\n<h2>Provenance</h2>\n{_box(table, 'Provenance')}\n</section>" if provenance else ""
