"""What produced a report: versions, hardware, code and date. Nothing that names the machine or its user."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "numpy")
_TIMEOUT = 20.0  # seconds; a large checkout on a network disk answers slowly
_NO_CHECKOUT = "not a git checkout"


def provenance(root: Path | None) -> dict[str, str]:
    """Return labels and values: versions, backend, devices, CPU, OS, commit of the checkout at `root`, date (UTC).

    `root` None means that the code is in no checkout. Whatever cannot be found out says so; nothing raises.
    """
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        **_devices(),
        "cpu": _cpu_model(),
        "cpu cores": _cores(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "commit": _commit(root) if root is not None else _NO_CHECKOUT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    try:
        devices = jax.devices()
    except RuntimeError:
        return {"backend": "not available", "device": "none", "devices": "0"}
    kinds = sorted({device.device_kind for device in devices})
    return {"backend": jax.default_backend(), "device": ", ".join(kinds), "devices": str(len(devices))}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or _answer(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.machine() or "unknown"


def _cores() -> str:
    """Cores of the machine, and how many of them this process may use where the system says."""
    total = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    return str(total) if usable == total else f"{usable} of {total}"


def _commit(root: Path) -> str:
    git = ["git", "-C", str(root)]
    status = _answer([*git, "status", "--porcelain=v2", "--branch"])
    # A package installed in an ignored folder (.venv) of some other checkout is not that checkout's code.
    if not status or _answer([*git, "check-ignore", "."]):
        return _NO_CHECKOUT
    lines = status.splitlines()
    oid = next((line.split()[-1] for line in lines if line.startswith("# branch.oid ")), "unknown")
    changed = sum(not line.startswith("#") for line in lines)
    commit = "no commit yet" if oid == "(initial)" else oid
    return f"{commit} ({f'{changed} changed or untracked' if changed else 'clean'})"


def _answer(command: list[str]) -> str:
    """Return what a command prints, stripped; empty when it is missing, fails or takes too long."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=_TIMEOUT,
            # Asking for the status must not take the lock that a commit in another terminal needs.
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return ""
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else ""
