"""Continuing a run takes no more memory than beginning it: the checkpoint is read straight into its place."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import write_corpus

# About 19M parameters, so that one copy of the state (217 MiB) stands out from the interpreter and its libraries.
PROGRAM = """
import resource, sys
from pathlib import Path
from tinyjax.config import override
from tinyjax.train.loop import Run
from tinyjax.train.progress import Silent
from tinyjax.train.run_config import Config
folder, corpus = Path(sys.argv[1]), sys.argv[2]
config = override(Config(), [
    f"data.corpus={corpus}", "data.heldout=0.3", "data.sequence=8", "data.batch=1", "tokenizer.vocab_size=300",
    "model.width=512", "model.depth=6", "model.attention.heads=8", "train.steps=4", "checkpoint.every=2",
    "evaluation.samples=0", "evaluation.positions=100",
])
Run(config, folder / "run", folder / "cache", Silent()).train()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(folder: Path, corpus: Path) -> int:
    """Return the largest resident size, KiB, of a process that takes the run in `folder` to its end."""
    root = Path(__file__).parents[2]
    environ = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root), "PATH": "", "HOME": str(folder)}
    command = [sys.executable, "-c", PROGRAM, str(folder), str(corpus)]
    done = subprocess.run(command, env=environ, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


@pytest.mark.slow
def test_peak_memory_of_a_continued_run(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    fresh = peak(tmp_path, corpus)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    (tmp_path / "run" / "result.json").unlink()
    continued = peak(tmp_path, corpus)
    print(f"peak memory: begun {fresh >> 10} MiB, continued {continued >> 10} MiB")
    assert continued <= fresh
