import os
import platform
import shutil
import socket
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jax
import pytest

import tinyjax.report.provenance as room
from tinyjax.report.provenance import provenance

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@pytest.fixture
def checkout(tmp_path):
    """A fresh checkout with one commit."""
    root = tmp_path / "checkout"
    (root / "package").mkdir(parents=True)
    git(root, "init", "--quiet")
    (root / "package" / "code.py").write_text("x = 1\n")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "first")
    return root


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(root), *identity, *arguments], capture_output=True, check=True, text=True)
    return done.stdout.strip()


def test_what_is_recorded():
    found = provenance(None)
    names = "python jax jaxlib flax optax orbax-checkpoint grain sentencepiece numpy backend device devices"
    assert list(found) == [*names.split(), "cpu", "cpu cores", "os", "commit", "date"]
    assert all(isinstance(value, str) and value and "\n" not in value for value in found.values())
    assert found["python"] == platform.python_version()
    assert found["jax"] == jax.__version__
    assert found["backend"] == jax.default_backend()
    assert found["devices"] == str(jax.device_count())
    assert found["commit"] == "not a git checkout"


def test_the_date_is_now_in_utc():
    date = datetime.fromisoformat(provenance(None)["date"])
    assert date.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - date) < timedelta(minutes=5)


def test_the_machine_and_its_user_are_not_named(monkeypatch, checkout):
    monkeypatch.setattr(platform, "node", lambda: "secret-host")
    monkeypatch.setattr(socket, "gethostname", lambda: "secret-host")
    text = " ".join(provenance(checkout).values())
    assert "secret-host" not in text
    assert str(checkout) not in text
    node = os.uname().nodename
    if len(node) > 5:
        assert node not in text


def test_a_missing_package_is_said_to_be_missing(monkeypatch):
    monkeypatch.setattr(room, "_PACKAGES", ("numpy", "no-such-package"))
    assert provenance(None)["no-such-package"] == "not installed"


def test_a_missing_accelerator_does_not_lose_the_report(monkeypatch):
    def unavailable():
        raise RuntimeError("no TPU")

    monkeypatch.setattr(jax, "devices", unavailable)
    assert provenance(None)["backend"] == "not available"


@needs_git
def test_a_clean_checkout_gives_its_commit(checkout):
    head = git(checkout, "rev-parse", "HEAD")
    assert provenance(checkout)["commit"] == f"{head} (clean)"
    assert provenance(checkout / "package")["commit"] == f"{head} (clean)"


@needs_git
def test_changed_and_untracked_files_are_counted(checkout):
    (checkout / "package" / "code.py").write_text("x = 2\n")
    assert provenance(checkout)["commit"].endswith("(1 changed or untracked)")
    (checkout / "new #.py").write_text("")
    assert provenance(checkout)["commit"].endswith("(2 changed or untracked)")


@needs_git
def test_a_package_in_an_ignored_folder_is_not_the_surrounding_checkout(checkout):
    (checkout / ".gitignore").write_text(".venv/\n")
    (checkout / ".venv" / "site-packages").mkdir(parents=True)
    assert provenance(checkout / ".venv" / "site-packages")["commit"] == "not a git checkout"


@needs_git
def test_a_checkout_without_a_commit(tmp_path):
    git(tmp_path, "init", "--quiet")
    assert provenance(tmp_path)["commit"] == "no commit yet (clean)"


@pytest.mark.parametrize("name", ["missing", "with\0null", "-C"])
def test_a_folder_that_is_no_checkout(name, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance(tmp_path / name)["commit"] == "not a git checkout"
    assert provenance(tmp_path)["commit"] == "not a git checkout"


def test_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance(tmp_path)["commit"] == "not a git checkout"


def test_git_that_does_not_answer(tmp_path, monkeypatch):
    def late(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", late)
    assert provenance(tmp_path)["commit"] == "not a git checkout"


@needs_git
def test_asking_writes_nothing_into_the_checkout(checkout):
    # A newer time on an unchanged file is what makes a plain `git status` rewrite the index.
    os.utime(checkout / "package" / "code.py", (2_000_000_000, 2_000_000_000))
    index = checkout / ".git" / "index"
    before = (index.read_bytes(), index.stat().st_mtime_ns)
    provenance(checkout)
    assert (index.read_bytes(), index.stat().st_mtime_ns) == before
