"""Finished measurements on disk, so that a tuner that was stopped goes on where it was."""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata

import jax

from kernels.aot import jobs, parent, tables


def folder() -> pathlib.Path:
    """Return where measurements are kept: below XDG_CACHE_HOME, or ~/.cache."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "tinyjax" / "kernels"


def traced(function: Callable, arguments: tuple) -> str:
    """Return the program as text that is the same in every process: two block sizes with one text are one program."""
    return re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(function)(*arguments)))


class Store:
    """Results by job, program text and versions of JAX and libtpu, one JSON line each.

    A line that a kill cut short is passed over.
    """

    def __init__(self, file: pathlib.Path):
        self.file = file
        self.known: dict[str, jobs.Result] = {}
        for line in file.read_text().splitlines() if file.is_file() else ():
            try:
                row = json.loads(line)
                self.known[row["key"]] = jobs.decode_result(json.dumps(row["result"]))
            except (ValueError, KeyError, TypeError):
                continue

    def run(self, wanted: Sequence[tuple[jobs.Job, str]]) -> Iterator[tuple[jobs.Job, jobs.Result]]:
        """Yield the result of each (job, program text), measuring those that are not known; order may change."""
        missing = {}
        for job, text in wanted:
            key = _key(job, text)
            if key in self.known:
                yield job, self.known[key]
            else:
                missing[job_key(job)] = key
        todo = [job for job, _ in wanted if job_key(job) in missing]
        for job, result in parent.run(todo):
            # A time-out says something about the machine, not about the program.
            if result.error not in ("timeout", "libtpu"):
                self._add(missing[job_key(job)], result)
            yield job, result

    def _add(self, key, result):
        self.known[key] = result
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a") as file:
            file.write(json.dumps({"key": key, "result": json.loads(jobs.encode(result))}) + "\n")


def job_key(job: jobs.Job) -> str:
    """Return the job as a string that can be looked up (its blocks are a dict)."""
    return jobs.encode(job)


def _key(job, text):
    parts = (job_key(job), text, metadata.version("jax"), tables.version())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
