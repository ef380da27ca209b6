"""Settings of the process that runs experiments: decided once, announced, switchable; nothing a result depends on."""

import logging
import os
import platform
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb=1"
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def with_huge_pages(environ: dict[str, str]) -> tuple[str, dict[str, str]] | None:
    """Return (announcement, environment) for a restart that lets malloc use huge pages, or None where that is no use.

    XLA:CPU allocates every temporary anew and spends much of a step on page faults; with 2 MiB pages a training step of
    a 9M model took 15 to 20 % less time. glibc reads the variable before Python starts, hence the restart.
    """
    tunables = environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb" in tunables or platform.libc_ver()[0] != "glibc" or not HUGE_PAGES.exists():
        return None
    if "[never]" in HUGE_PAGES.read_text():
        return None
    joined = f"{tunables}:{TUNABLE}" if tunables else TUNABLE
    return f"restarting with GLIBC_TUNABLES={joined} (huge pages; off: --no_huge_pages)", {
        **environ,
        "GLIBC_TUNABLES": joined,
    }


def restart(environ: dict[str, str]) -> None:
    """Replace this process by the same command in another environment."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environ)


def default_cache() -> Path:
    """Return where tokenised corpora and compiled programs are kept between runs."""
    if found := os.environ.get("TINYJAX_CACHE"):
        return Path(found)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tinyjax"


def set_up(cache: Path) -> None:
    """Turn on JAX's cache of compiled programs, and turn off the chatter of libraries."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    for name in ("absl", "orbax", "jax"):
        logging.getLogger(name).setLevel(logging.ERROR)
