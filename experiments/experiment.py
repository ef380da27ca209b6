"""What an experiment is, and how it is found: a module here with `PRESETS`, `trials` and `analyse`."""

import dataclasses
import importlib
import importlib.util
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

import experiments
from tinyjax.errors import UserError, nearest
from tinyjax.train.run_config import Config


@dataclasses.dataclass(frozen=True)
class Trial:
    """One finished run as analyses see it: stored data only."""

    config: Config
    result: dict[str, Any]
    rows: list[dict[str, Any]]  # of metrics.jsonl
    measured: dict[str, Any]  # what the experiment's own `measure` returned

    def curve(self, kind: str, value: str, name: str | None = None) -> tuple[list[int], list[float]]:
        """Return (steps, values) of one kind of row, for one corpus if `name` is given; null becomes nan."""
        rows = [r for r in self.rows if r["kind"] == kind and (name is None or r["name"] == name)]
        return [r["step"] for r in rows], [float("nan") if r[value] is None else r[value] for r in rows]


def names() -> list[str]:
    """Return the names of all experiments."""
    found = []
    for module in pkgutil.iter_modules(experiments.__path__):
        source = Path(importlib.util.find_spec(f"experiments.{module.name}").origin)
        # Read, not imported: listing must not load what an experiment needs.
        if not module.ispkg and "\ndef analyse(" in source.read_text(encoding="utf-8"):
            found.append(module.name)
    return found


def load(name: str) -> ModuleType:
    """Return the experiment's module. UserError with the nearest name when there is none."""
    known = names()
    if name not in known:
        raise UserError(f"unknown experiment {name!r}{nearest(name, known)}")
    return importlib.import_module(f"experiments.{name}")


def trials(module: ModuleType, preset: str) -> list[Config]:
    """Return the experiment's trials at a preset. UserError with the nearest preset when it has none of that name."""
    if preset not in module.PRESETS:
        raise UserError(f"--preset={preset}: no such preset{nearest(preset, module.PRESETS)}")
    return module.trials(preset)
