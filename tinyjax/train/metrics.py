"""What a run writes down while it goes: rows of JSON, which are the truth, and TensorBoard events made from them."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from tinyjax.errors import UserError

FILE = "metrics.jsonl"


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the rows written so far; a last line that was cut off by a crash is left out."""
    return list(_rows(folder / FILE))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line else None
        except json.JSONDecodeError:
            if number == len(lines):  # not ended by a newline: the write was interrupted
                return
            raise UserError(f"{path}:{number}: not JSON; restore the file or start in a new --workdir") from None
        if row is not None:
            yield row


class Writer:
    """Appends rows {"kind", "step", ...}; on opening, rows after `step` (of a run that went on and was lost) go."""

    def __init__(self, folder: Path, step: int):
        self._path = folder / FILE
        self.rows = [row for row in _rows(self._path) if row["step"] <= step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(_line(row) for row in self.rows), encoding="utf-8")
        os.replace(temporary, self._path)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115  (closed by `close`)
        # TensorBoard hides what lies beyond the step at which a continued run starts again.
        self._events = SummaryWriter(str(folder / "events"), purge_step=step + 1)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append one row and flush it. Numbers that are not finite are written as null."""
        row = {"kind": kind, "step": step} | {k: _finite(v) for k, v in values.items()}
        self.rows.append(row)
        self._file.write(_line(row))
        self._file.flush()
        for name, value in row.items():
            if isinstance(value, float):
                self._events.add_scalar(f"{kind}/{name}", value, step)
            elif isinstance(value, str) and kind == "sample":
                self._events.add_text(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        self._events.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
