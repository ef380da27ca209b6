"""The report as data: claims, tables, plots and texts. Nothing here knows how it will be shown."""

import numbers
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

Verdict = Literal["holds", "fails", "undecided"]
Style = Literal["line", "points", "both"]
Cell = str | int | float | None


def _check_choice(what: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{what}: {value!r} is not one of {', '.join(get_args(choices))}")


@dataclass(frozen=True)
class Claim:
    """One sentence that the experiment tested, and the statistic (with numbers) that decides it."""

    sentence: str
    verdict: Verdict
    evidence: str
    source: str = ""

    def __post_init__(self) -> None:
        _check_choice(f"claim {self.sentence!r}", self.verdict, Verdict)


@dataclass(frozen=True)
class Table:
    """Rows of cells: text, numbers, or None for "not measured". Raises ValueError on a ragged row or another type."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""

    def __post_init__(self) -> None:
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.title!r}, row {i}: {len(row)} cells for {len(self.columns)} columns; None fills a gap"
                )
            for name, cell in zip(self.columns, row, strict=True):
                if not (cell is None or isinstance(cell, (str, numbers.Real))):
                    raise ValueError(
                        f"table {self.title!r}, row {i}, column {name!r}: {type(cell).__name__} is not text, a number "
                        "or None; convert it with float() or str()"
                    )


@dataclass(frozen=True)
class Series:
    """One curve or cloud. `x`, `y` and `error` (half the height of the interval around y) are of equal length.

    Any one-dimensional numbers are accepted and kept as tuples of floats, so that equal series compare equal. NaN and
    infinity are gaps. Raises ValueError for unequal lengths, more axes or a negative error.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    style: Style = "line"

    def __post_init__(self) -> None:
        what = f"series {self.label!r}"
        _check_choice(what, self.style, Style)
        for name in ("x", "y") if self.error is None else ("x", "y", "error"):
            values = np.asarray(getattr(self, name), np.float64)
            if values.ndim != 1:
                raise ValueError(f"{what}: {name} has {values.ndim} axes, expected 1")
            if name == "error" and (values < 0).any():
                raise ValueError(f"{what}: negative error at point {int(np.argmax(values < 0))}; give half-widths")
            object.__setattr__(self, name, tuple(values.tolist()))
            if len(getattr(self, name)) != len(self.x):
                raise ValueError(f"{what}: {len(getattr(self, name))} values of {name} for {len(self.x)} of x")


@dataclass(frozen=True)
class Plot:
    """Series on common axes; `name` is the file stem of its PNG, `references` are labelled horizontal lines.

    Raises ValueError when `name` is not a plain file stem.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False
    references: tuple[tuple[str, float], ...] = ()
    caption: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name):
            raise ValueError(f"plot name {self.name!r}: use letters, digits, '.', '_' and '-'; it names a file")


@dataclass(frozen=True)
class Text:
    """A passage shown as it is: a sample, an explanation, a config."""

    title: str
    body: str
    monospace: bool = False


@dataclass(frozen=True)
class Report:
    """Everything that one experiment found. Raises ValueError when two plots would be written to one file."""

    title: str
    question: str
    source: str
    command: str
    claims: tuple[Claim, ...]
    items: tuple[Table | Plot | Text, ...]
    provenance: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Compared without case: some file systems do not tell Loss.png from loss.png.
        stems = [item.name.lower() for item in self.items if isinstance(item, Plot)]
        if repeated := sorted({stem for stem in stems if stems.count(stem) > 1}):
            raise ValueError(
                f"report {self.title!r}: several plots are named {', '.join(repeated)}; rename all but one"
            )


def verdict(claims: Sequence[Claim]) -> Verdict:
    """Return the verdict of the whole: fails if any claim fails, holds if all (at least one) hold, else undecided."""
    found = {claim.verdict for claim in claims}
    if "fails" in found:
        return "fails"
    return "holds" if found == {"holds"} else "undecided"
