"""The folder of one run: whose it is, that nobody else writes to it, and whether it is finished."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinyjax.config import differences, identity, to_json
from tinyjax.errors import UserError
from tinyjax.train.run_config import Config

CONFIG, RESULT, LOCK = "config.json", "result.json", "lock"


def write_json(path: Path, data: Any) -> None:
    """Write JSON whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """Return the file's JSON. UserError names a file that is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path}: not JSON; restore the file or choose another --workdir") from None


def inspect(folder: Path, config: Config) -> None:
    """Raise UserError when `folder` holds a run of another config or cannot be one. Writes nothing."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{folder}: cannot be written ({existing} is no writable folder); choose another --workdir")
    if not (folder / CONFIG).exists():
        return
    theirs = read_json(folder / CONFIG)
    if not isinstance(theirs, dict) or theirs.get("identity") != identity(config):
        held = theirs.get("config") if isinstance(theirs, dict) else None
        changed = "; ".join(differences(held, to_json(config))[:3])
        raise UserError(f"{folder}: holds a run of another config ({changed}); choose another --workdir")


@contextlib.contextmanager
def claimed(folder: Path, config: Config) -> Iterator[None]:
    """Make `folder` the run's own and hold a lock on it; the system drops the lock of a process that was killed.

    Raises UserError when it cannot be written, holds a run of another config, or another process is running in it.
    """
    inspect(folder, config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --workdir") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is running here; wait for it or choose another --workdir"
            ) from None
        if not (folder / CONFIG).exists():
            write_json(folder / CONFIG, {"identity": identity(config), "config": to_json(config)})
        yield
    finally:
        os.close(lock)


def result(folder: Path) -> dict[str, Any] | None:
    """Return the result of a finished run, or None."""
    return read_json(folder / RESULT) if (folder / RESULT).exists() else None
