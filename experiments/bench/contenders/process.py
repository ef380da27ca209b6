"""The benchmark's side of the conversation with a contender."""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import tempfile
from typing import Any

from experiments.bench.contenders.workload import Workload
from tinyjax.errors import UserError

ROOT = pathlib.Path(__file__).parents[3]
HUGE_PAGES = "glibc.malloc.hugetlb=1"  # glibc 2.35 or later asks for them with madvise; elsewhere it is ignored


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute the workload; `module` is a file of this folder."""

    name: str
    module: str
    options: dict[str, Any]
    huge_pages: bool = True


class Running:
    """A contender's process, started and warm. Use as a context manager: leaving it ends the process."""

    def __init__(self, contender: Contender, work: Workload, python: str):
        """Start it and wait until its first step is done. Raises UserError with the last line it wrote if it dies."""
        self.contender = contender
        environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
        environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        if contender.huge_pages:
            environment["GLIBC_TUNABLES"] = HUGE_PAGES
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (see close)
        self._process = subprocess.Popen(
            [python, "-m", f"experiments.bench.contenders.{contender.module}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        try:
            reply = self._ask({"work": dataclasses.asdict(work), "options": contender.options})
        except BaseException:
            self.close()
            raise
        self.first_loss: float = reply["loss"]

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def steps(self, count: int) -> dict[str, Any]:
        """Take `count` steps; return {"wall" and "cpu": seconds of each, "loss": of the last}."""
        return self._ask({"steps": count})

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _ask(self, request: dict) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # it has died: the reply is missing too, and that is said below
            print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            last = self._errors.read().strip().rpartition("\n")[2] or "it wrote nothing"
            raise UserError(f"{self.contender.name} stopped with status {status}: {last}")
        return json.loads(line)
