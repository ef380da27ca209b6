"""Run jobs in child processes: one for many jobs, a fresh one after each that a job brought down."""

import collections
import contextlib
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator

from kernels.aot import jobs

# Without these libtpu asks the cloud's metadata server, complains that it is not on a TPU host, writes log files and
# lets only one process at a time load it.
QUIET = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Options of libtpu by what is wanted; without the pattern it dumps 35 MB per kernel.
OPTIONS = {
    "memory": "",
    "bundles": "--xla_jf_dump_to={0} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_.*",
    "cycles": "--xla_jf_dump_static_llo_profile_to={0}",
}


def run(wanted: Iterable[jobs.Job], timeout: float = 600.0) -> Iterator[tuple[jobs.Job, jobs.Result]]:
    """Yield (job, result) for every job, those of one kind of figure together; `timeout` is seconds per job."""
    groups = collections.defaultdict(collections.deque)
    for job in wanted:
        groups[job.want].append(job)
    for want, queue in groups.items():
        while queue:
            with _child(want) as child:
                yield from _serve(child, queue, timeout)


def one(job: jobs.Job, timeout: float = 600.0) -> jobs.Result:
    """Return the result of a single job."""
    return next(result for _, result in run([job], timeout))


def _serve(child, queue, timeout):
    """Give the child jobs from the queue until it is empty or the child is gone."""
    while queue:
        job = queue.popleft()
        try:
            child.stdin.write(jobs.encode(job) + "\n")
            child.stdin.flush()
            line = _read_line(child.stdout, timeout)
        except BrokenPipeError:
            line = ""
        if line is None:
            yield job, jobs.Result("timeout", f"no result after {timeout:.0f} s")
            return
        if not line:
            yield job, jobs.Result("died", _death(child))
            return
        yield job, jobs.decode_result(line)


def _read_line(stream, timeout):
    """Return a line, "" at the end of the stream, None when nothing came in time. A child writes whole lines."""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        return stream.readline() if selector.select(timeout) else None


def _death(child):
    code = child.wait()
    lines = pathlib.Path(child.errors).read_text(errors="replace").strip().splitlines()
    fatal = [line for line in lines if " F" in line[:40] or "Error" in line or "Check failed" in line]
    how = signal.Signals(-code).name if code < 0 else f"exit {code}"
    return f"{how}: {(fatal or lines or ['nothing said'])[-1].strip()[:300]}"


@contextlib.contextmanager
def _child(want):
    with tempfile.TemporaryDirectory(prefix="kernels-aot-") as folder:
        dumps = pathlib.Path(folder) / "dumps"
        dumps.mkdir()
        environment = os.environ | QUIET | {"LIBTPU_INIT_ARGS": OPTIONS[want].format(dumps)}
        # What this process can import the child can too. Flags for the CPU backend are not meant for it.
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "XLA_FLAGS": ""}
        with open(pathlib.Path(folder) / "stderr", "w") as errors:
            child = subprocess.Popen(
                [sys.executable, "-m", "kernels.aot.child", str(dumps)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
                bufsize=1,
            )
            child.errors = errors.name
            try:
                yield child
            finally:
                child.kill()
                child.communicate()
