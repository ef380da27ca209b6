"""How values read: numbers with the digits that matter, text without the characters that act."""

import math
import numbers
import re
from collections.abc import Sequence

from tinyjax.report.document import Cell

MISSING = "–"
_SIGNIFICANT = 4
_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
_NONCHARACTERS = "".join(f"{chr(plane << 16 | 0xFFFE)}{chr(plane << 16 | 0xFFFF)}" for plane in range(17))
# Control characters drive terminals, lone surrogates cannot be encoded, noncharacters are not valid HTML, and the
# bidirectional embeddings and overrides make the text that follows them read differently from what it is.
_ACTIVE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\u202a-\u202e\u2066-\u2069" + _NONCHARACTERS + "]"
)
_QUANTITY = re.compile(r"[-+−±~<>≤≥]?\s?\d[\d.,]*(e[-+]?\d+)?%?(\s*±\s*\d[\d.,]*%?)?")


def printable(text: str) -> str:
    """Return the text with one "�" for each character that could act on a page or a terminal; keeps tab and newline."""
    return _ACTIVE.sub("\ufffd", text.replace("\r\n", "\n"))


def is_numeric(column: Sequence[Cell]) -> bool:
    """Whether a column holds only quantities (numbers, or text such as "2.05 ± 0.01") and reads best aligned right."""
    known = [cell for cell in column if cell is not None]
    return bool(known) and all(
        _QUANTITY.fullmatch(cell) is not None if isinstance(cell, str) else not isinstance(cell, bool) for cell in known
    )


def read(column: Sequence[Cell]) -> list[str]:
    """Return the text of each cell of one column.

    None is an en dash and integers get thousands separators. Other numbers get at most four significant digits (more
    only in their integer part), and as many decimals as the column needs, so that decimal points line up.
    """
    decimals = max((_needed(cell) for cell in column if _is_fixed(cell)), default=0)
    return [_cell(cell, decimals) for cell in column]


def _cell(cell: Cell, decimals: int) -> str:
    if cell is None:
        return MISSING
    if isinstance(cell, str):
        return printable(cell)
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, numbers.Integral):
        text = f"{int(cell):,}"
    elif _is_fixed(cell):
        text = f"{float(cell) or 0.0:,.{min(decimals, _allowed(cell))}f}"
    elif math.isnan(cell):
        text = "NaN"
    elif math.isinf(cell):
        text = "∞" if cell > 0 else "-∞"
    else:
        mantissa, _, exponent = f"{float(cell):.{_SIGNIFICANT - 1}e}".partition("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}×10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    return text.replace("-", "−")


def _is_fixed(cell: Cell) -> bool:
    """Whether the cell is a non-integer number that reads better without a power of ten."""
    if cell is None or isinstance(cell, (str, numbers.Integral)):
        return False
    return cell == 0 or 1e-4 <= abs(cell) < 1e7


def _allowed(value: float) -> int:
    """Decimals that show the significant digits; the exponent is taken after rounding, which can carry (9.99996)."""
    exponent = int(f"{float(value):.{_SIGNIFICANT - 1}e}".partition("e")[2])
    return max(0, _SIGNIFICANT - 1 - exponent)


def _needed(value: float) -> int:
    """Decimals left when the trailing zeros of the significant digits are dropped."""
    return len(f"{float(value):.{_allowed(value)}f}".partition(".")[2].rstrip("0"))
