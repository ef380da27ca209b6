"""Files and folders that are there in full or not at all, however many processes write them at once."""

import contextlib
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyjax.config import canonical
from tinyjax.errors import UserError

FORMAT = 1  # raise when the same input would be stored differently: old entries are then not found any more
STALE_SECONDS = 24 * 3600  # a temporary untouched for so long belongs to a process that was killed


def key(*parts: Any) -> str:
    """Return 32 hex digits that identify JSON data; part of the name of every entry."""
    return hashlib.blake2b(canonical([FORMAT, *parts]).encode(), digest_size=16).hexdigest()


def publish(final: Path, build: Callable[[Path], None]) -> None:
    """Let `build` fill a temporary sibling of the folder `final`, then rename it; nothing happens if `final` is there.

    When two processes build the same entry, the first to finish wins and the other's work is dropped.
    Raises UserError when the folder cannot be written.
    """
    if final.exists():
        return
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(final.parent)
        temporary = _temporary(final)
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"{final.parent}: cannot be written ({error.strerror}); choose another cache folder") from None
    try:
        build(temporary)
        temporary.rename(final)
    except OSError as error:
        if not final.exists():
            raise UserError(f"{final}: cannot be written ({error.strerror}); free space or choose another") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write(path: Path, data: bytes) -> None:
    """Write a file through a temporary sibling. Raises UserError when that is not possible."""
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another cache folder") from None
    finally:
        with contextlib.suppress(OSError):  # gone after the rename, and out of reach where nothing could be written
            temporary.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")


def _remove_stale(folder: Path) -> None:
    now = time.time()
    for temporary in folder.glob(".tmp-*"):
        try:
            newest = max(p.stat().st_mtime for p in (temporary, *temporary.rglob("*")))
        except FileNotFoundError:
            continue  # its owner has just finished
        if now - newest > STALE_SECONDS:
            shutil.rmtree(temporary, ignore_errors=True)
