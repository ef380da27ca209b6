"""Interrupted equals uninterrupted, bit for bit, from the user's command and for every kind of run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.support import write_corpus
from tinyjax.config import override
from tinyjax.data.packing import rows_per_epoch
from tinyjax.train import metrics, workdir
from tinyjax.train.checkpoint import Checkpoints
from tinyjax.train.loop import Run
from tinyjax.train.progress import Silent
from tinyjax.train.run_config import Config

TINY = (
    "data.heldout=0.2",
    "data.sequence=16",
    "data.batch=4",
    "tokenizer.vocab_size=300",
    "model.depth=2",
    "model.width=16",
    "model.attention.heads=2",
    "train.steps=60",
    "train.log_every=1",
    "evaluation.every=25",
    "evaluation.samples=1",
    "evaluation.sample_tokens=8",
    "checkpoint.every=7",
)
ONE = jax.devices()[:1]
TIMES = ("seconds", "tokens_per_second")


def rows(folder: Path) -> list[dict]:
    """Return everything a run wrote down, without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in metrics.read(folder)]


def arrays(folder: Path) -> dict[str, bytes]:
    """Return every array of the newest checkpoint as bytes, read without any spec."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        found = manager.restore(manager.latest_step(), args=ocp.args.Composite(state=ocp.args.StandardRestore())).state
    return {jax.tree_util.keystr(p): np.asarray(x).tobytes() for p, x in jax.tree_util.tree_leaves_with_path(found)}


def command(tmp_path: Path, name: str, corpus: Path) -> list[str]:
    given = [*TINY, f"data.corpus={corpus}", "data.batch=16"]  # an epoch is about 30 steps
    return [
        *(sys.executable, "-m", "experiments.run", "quickstart", "--preset=smoke", "--no_huge_pages"),
        *(f"--workdir={tmp_path / name}", f"--cache_dir={tmp_path / 'cache'}", "--set", *given),
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}


def trial(folder: Path) -> Path:
    (only,) = (folder / "trials").iterdir()
    return only


def kill_when(arguments: list[str], seen, log: Path) -> bool:
    """Start the command and kill -9 it as soon as `seen()`; return whether it was killed before it ended."""
    with open(log, "ab") as out:
        process = subprocess.Popen(arguments, env=environment(), stdout=out, stderr=out)
    try:
        while process.poll() is None:
            if seen():
                process.send_signal(signal.SIGKILL)
                return process.wait() == -signal.SIGKILL
            time.sleep(0.002)  # between looks; nothing depends on its length
        return False
    finally:
        process.kill()
        process.wait()


def test_kill_9_from_the_command_line(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    subprocess.run(command(tmp_path, "straight", corpus), env=environment(), check=True, capture_output=True)
    straight = trial(tmp_path / "straight")
    killed = tmp_path / "killed"
    place = killed / "trials" / straight.name

    def reached(step):
        return lambda: (
            (place / "metrics.jsonl").exists() and f'"step": {step},' in (place / "metrics.jsonl").read_text()
        )

    def saving():
        return any(place.glob("checkpoints/*tmp*"))

    steps = sorted(random.Random(7).sample(range(2, 59), 5))
    points = [(f"step {k}", reached(k)) for k in steps]
    points.insert(2, ("while a checkpoint is being written", saving))
    points.insert(0, ("as soon as the folder is there", place.exists))
    done = [name for name, seen in points if kill_when(command(tmp_path, "killed", corpus), seen, tmp_path / "log")]
    assert len(done) >= 5, f"only killed {done}; log: {(tmp_path / 'log').read_text()[-2000:]}"
    subprocess.run(command(tmp_path, "killed", corpus), env=environment(), check=True, capture_output=True)

    assert arrays(place) == arrays(straight)
    assert rows(place) == rows(straight)
    final = [{k: v for k, v in workdir.result(f).items() if k not in TIMES} for f in (place, straight)]
    assert json.dumps(final[0]) == json.dumps(final[1])
    assert not list(place.glob("checkpoints/*tmp*")), "left-overs of interrupted writes"
    predictions = workdir.result(place)["manifest"]["corpora"][0]["train"]["positions"]
    assert predictions < 40 * 16 * 16, "the run must cross an epoch border, and be killed behind it"
    assert max(steps) > 40


class Stop(Silent):
    """Interrupts the run when its curve reaches a step."""

    def __init__(self, at: int):
        self.at = at

    def advance(self, step, line):
        if step >= self.at:
            raise KeyboardInterrupt


KINDS = {
    "dropout": ("model.dropout=0.1",),
    "muon": ("optimizer=muon",),
    "microbatches": ("train.microbatches=2",),
    "several steps a call": ("train.steps_per_dispatch=5",),
    "unrolled, bfloat16": ("model.layers=unroll", "model.compute_dtype=bfloat16"),
    "one epoch is a few steps": ("data.heldout=0.7", "data.batch=8"),
}


# The others are CI's: each takes ten seconds and more.
QUICK = ("several steps a call", "dropout", "a mixture that changes")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in (*KINDS, "a mixture that changes")],
)
def test_continued_run_equals_straight_run(kind, tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    more = KINDS.get(kind)
    if more is None:
        other = write_corpus(tmp_path / "other", seed=1)
        knots = [{"step": 20, "weights": [1, 0]}, {"step": 40, "weights": [1, 3]}]
        mixture = {"corpora": [str(corpus), str(other)], "knots": knots}
        more = ("data.corpus=none", f"data.mixture={json.dumps(mixture)}")
    else:
        more = (f"data.corpus={corpus}", *more)
    # Both at once: validation looks at the whole.
    config = override(Config(), (*TINY, *more))
    run = Run(config, tmp_path / "straight", tmp_path / "cache", Silent(), ONE)
    run.train()
    if kind == "one epoch is a few steps":
        assert rows_per_epoch(run.prepared.corpora[0].train, 16) < 24 * 8, "the test must cross an epoch border"
    for at in (3, 24, 43):
        with pytest.raises(KeyboardInterrupt):
            Run(config, tmp_path / "stopped", tmp_path / "cache", Stop(at), ONE).train()
    Run(config, tmp_path / "stopped", tmp_path / "cache", Silent(), ONE).train()
    assert rows(tmp_path / "stopped") == rows(tmp_path / "straight")
    assert arrays(tmp_path / "stopped") == arrays(tmp_path / "straight")


@pytest.fixture
def finished(tmp_path):
    """A finished run: (config, folder, a function that opens it again)."""
    given = (*TINY, f"data.corpus={write_corpus(tmp_path / 'corpus')}", "train.steps=14", "evaluation.every=none")
    config = override(Config(), given)
    Run(config, tmp_path / "run", tmp_path / "cache", Silent(), ONE).train()
    return config, tmp_path / "run", tmp_path / "cache"


def test_a_finished_run_is_not_trained_again(finished):
    config, folder, cache = finished
    before = (folder / metrics.FILE).stat().st_mtime_ns
    assert Run(config, folder, cache, Silent(), ONE).train() == workdir.result(folder)
    assert (folder / metrics.FILE).stat().st_mtime_ns == before


class Heard(Silent):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()


# Orbax leaves the coroutines of a failed read to the garbage collector, which reports them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(how, finished):
    config, folder, cache = finished
    expected = arrays(folder)
    (folder / workdir.RESULT).unlink()
    largest = max((folder / "checkpoints" / "14" / "state").rglob("d/*"), key=lambda p: p.stat().st_size)
    damage(largest, how)
    heard = Heard()
    Run(config, folder, cache, heard, ONE).train()
    assert any("checkpoint 14 is damaged" in line for line in heard.lines), heard.lines
    assert "continuing from step 7" in heard.lines
    assert arrays(folder) == expected


def test_silent_damage_is_found_by_checksum(finished, monkeypatch):
    """Orbax's files check themselves in part; the checksum must find what they let through."""
    config, folder, cache = finished
    run = Run(config, folder, cache, Silent(), ONE)
    heard = Heard()
    checkpoints = Checkpoints(folder / "checkpoints", heard.say)
    real = type(checkpoints._manager).restore

    def altered(self, step, args):
        found = real(self, step, args=args)
        if step == 14 and "state" in found:
            params = found["state"]["params"]
            params["norm"]["scale"] = params["norm"]["scale"].at[0].multiply(1.0000001)
        return found

    monkeypatch.setattr(type(checkpoints._manager), "restore", altered)
    restored = checkpoints.restore_latest(run._spec, run._accept)
    checkpoints.close()
    assert int(restored.state.step) == 7
    assert "['norm']['scale'] does not match its checksum" in heard.lines[0]


def test_changed_text_is_refused(finished, tmp_path):
    from tinyjax.errors import UserError

    config, folder, cache = finished
    (folder / workdir.RESULT).unlink()
    (tmp_path / "corpus" / "000.txt").write_text("something else\n")
    with pytest.raises(UserError, match="the data is not what this run began with"):
        Run(config, folder, cache, Silent(), ONE).train()


def test_a_second_process_in_the_folder_is_refused(finished):
    from tinyjax.errors import UserError

    config, folder, _ = finished
    with (
        workdir.claimed(folder, config),
        pytest.raises(UserError, match="another process is running here"),
        workdir.claimed(folder, config),
    ):
        pass


def test_nothing_is_traced_again(finished, tmp_path):
    """A run traces its step and its evaluation once; a continued one does not trace more."""
    config, _, cache = finished
    for at in (5, 10**9):
        run = Run(config, tmp_path / "again", cache, Stop(at), ONE)
        try:
            run.train()
        except KeyboardInterrupt:
            pass
        assert run.compiled._cache_size() == 1
        assert run._evaluator.compiled._cache_size() <= 1
