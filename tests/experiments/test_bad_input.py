"""Bad input: one line on stderr that says what and what to do, exit code 2, and nothing left behind."""

import gzip
import json

import jax
import pytest

from experiments import run
from tests.support import write_corpus

SMALL = (
    "data.heldout=0.3",
    "tokenizer.vocab_size=300",
    "model.depth=1",
    "model.width=16",
    "model.attention.heads=2",
    "data.sequence=16",
    "data.batch=4",
    "train.steps=2",
    "evaluation.samples=0",
)


@pytest.fixture(autouse=True)
def _restore_compilation_cache():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def refused(capsys, tmp_path, *argv):
    """Run the command line in `tmp_path`, expect a refusal, and return its line."""
    code = run.main(["--no_huge_pages", f"--cache_dir={tmp_path / 'cache'}", *argv])
    captured = capsys.readouterr()
    assert code == 2, captured
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in captured.out + captured.err
    return lines[0]


# (overrides, what the line must say)
CONFIG = {
    "unknown field": ("model.dept=4", "model.dept: no such field; did you mean depth"),
    "unknown section": ("modle.depth=4", "modle: no such field; did you mean model"),
    "field of a field": ("model.depth.x=4", "model.depth has no fields"),
    "no equals sign": ("model.depth", "expected path=value"),
    "no path": ("=4", "expected path=value"),
    "empty part of a path": ("model..depth=4", "expected path=value"),
    "text for a number": ("model.depth=four", "model.depth: expected an integer, got 'four'"),
    "fraction for an integer": ("model.depth=1.5", "model.depth: expected an integer"),
    "not a number": ("model.dropout=nan", "model.dropout: expected a finite number"),
    "infinite": ("optimizer.learning_rate=1e999", "optimizer.learning_rate: expected a finite number"),
    "not a choice": ("model.remat=some", "model.remat: 'some' is not one of none, full, dots"),
    "unknown kind": ("optimizer=adamm", "optimizer: unknown kind 'adamm'; did you mean adamw"),
    "field of another kind": ("schedule.form=linear schedule=cosine schedule.form=linear", "schedule.form: no such"),
    "broken JSON": ("data.mixture={", "data.mixture: not valid JSON"),
    "unknown field in JSON": ('data.mixture={"corpus":1}', "data.mixture.corpus: no such field; did you mean corpora"),
    "not true or false": ("model.tied=yes", "model.tied: expected true or false"),
    "zero steps": ("train.steps=0", "train.steps: must be at least 1"),
    "negative steps": ("train.steps=-5", "train.steps: must be at least 1"),
    "zero depth": ("model.depth=0", "model.depth: must be at least 1"),
    "zero batch": ("data.batch=0", "data.batch: expected at least 1"),
    "zero sequence": ("data.sequence=0", "data.sequence: expected at least 1"),
    "heads do not divide": ("model.attention.heads=3", "model.attention.heads: 3 does not divide width = 16"),
    "kv heads do not divide": ("model.attention.heads=4 model.attention.kv_heads=3", "kv_heads: 3 does not divide"),
    "odd head width": ("model.attention.head_width=5", "model.attention.head_width: must be even"),
    "dropout of all": ("model.dropout=1", "model.dropout: must be in [0, 1)"),
    "negative cap": ("model.logit_softcap=-1", "model.logit_softcap: must be positive"),
    "microbatches do not divide": ("train.microbatches=3", "train.microbatches: 3 does not divide 4 rows"),
    "negative seed": ("train.seed=-1", "train.seed: must be from 0"),
    "zero learning rate": ("optimizer.learning_rate=0", "optimizer.learning_rate: must be positive"),
    "decay matches nothing": ('optimizer=adamw optimizer.decay_paths=["kernal$"]', "'kernal$' matches no parameter"),
    "decay is no expression": ('optimizer=adamw optimizer.decay_paths=["("]', "'(' is not a regular expression"),
    "warm-up and decay overlap": ("schedule.warmup=0.7 schedule.decay=0.7", "schedule.decay: warmup + decay is 1.4"),
    "exponential to zero": ("schedule.form=exponential", "schedule.final: must be above 0"),
    "held-out share of 1": ("data.heldout=1", "data.heldout: expected a share"),
    "two corpora sources": ('data.mixture={"corpora":["a"],"knots":[{"step":0,"weights":[1]}]}', "exactly one of"),
    "vocabulary of bytes": ("tokenizer.kind=byte", "tokenizer.vocab_size: is always 259"),
    "tiny vocabulary": ("tokenizer.vocab_size=100", "tokenizer.vocab_size: expected more than 259"),
    "top_p of zero": ("evaluation.top_p=0", "evaluation.top_p: must be in (0, 1]"),
    "keep no checkpoint": ("checkpoint.keep_last=0", "checkpoint.keep_last: must be at least 1"),
    "init of zero": ("model.init.std=0", "model.init.std: must be positive"),
}


@pytest.mark.parametrize("case", CONFIG)
def test_config(case, tmp_path, capsys):
    overrides, expected = CONFIG[case]
    corpus = write_corpus(tmp_path / "corpus")
    given = (f"data.corpus={corpus}", *SMALL, *overrides.split(" "))
    line = refused(capsys, tmp_path, "quickstart", "--preset=smoke", f"--workdir={tmp_path / 'run'}", "--set", *given)
    assert expected in line
    assert not (tmp_path / "run").exists()


def _jsonl(path, *rows):
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    return path


CORPORA = {
    "missing": (lambda folder: folder / "nowhere", "nowhere"),
    "empty folder": (lambda folder: folder, "no"),
    "no match": (lambda folder: f"{folder}/*.nothing", "nothing"),
    "empty file": (lambda folder: _written(folder / "a.txt", b""), "a.txt"),
    "binary": (lambda folder: _written(folder / "a.txt", b"\x7fELF\0\0\0" * 9), "a.txt"),
    "undecodable": (lambda folder: _written(folder / "a.txt", b"caf\xe9 " * 99), "a.txt"),
    "truncated gzip": (
        lambda folder: _written(folder / "a.jsonl.gz", gzip.compress(b'{"text": "x"}\n')[:-9]),
        "a.jsonl.gz",
    ),
    "not JSON": (lambda folder: _jsonl(folder / "a.jsonl", '{"text": "x"}', "{"), "a.jsonl:2"),
    "no text field": (lambda folder: _jsonl(folder / "a.jsonl", json.dumps({"body": "x"})), "a.jsonl:1"),
    "text is a number": (lambda folder: _jsonl(folder / "a.jsonl", json.dumps({"text": 5})), "a.jsonl:1"),
    "lone surrogate": (lambda folder: _jsonl(folder / "a.jsonl", '{"text": "\\ud800"}'), "a.jsonl:1"),
    "not Parquet": (lambda folder: _written(folder / "a.parquet", b"PAR1 no"), "a.parquet"),
    "one document": (lambda folder: _written(folder / "a.py", b"x = 1\n" * 50), "data.heldout"),
    "one-token documents": (lambda folder: _jsonl(folder / "a.jsonl", *['{"text": "a"}'] * 50), "data.heldout"),
}


def _written(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("case", CORPORA)
def test_corpus(case, tmp_path, capsys):
    make, expected = CORPORA[case]
    folder = tmp_path / "text"
    folder.mkdir()
    given = (*SMALL, f"data.corpus={make(folder)}")
    line = refused(capsys, tmp_path, "quickstart", "--preset=smoke", f"--workdir={tmp_path / 'run'}", "--set", *given)
    assert expected in line
    assert not (tmp_path / "run").exists()


def test_vocabulary_larger_than_the_text(tmp_path, capsys):
    given = (*SMALL, f"data.corpus={write_corpus(tmp_path / 'corpus')}", "tokenizer.vocab_size=60000")
    line = refused(capsys, tmp_path, "quickstart", "--preset=smoke", f"--workdir={tmp_path / 'run'}", "--set", *given)
    assert "tokenizer.vocab_size" in line
    assert not (tmp_path / "run").exists()


ARGUMENTS = {
    "unknown experiment": (("quickstrat",), "unknown experiment 'quickstrat'; did you mean quickstart"),
    "no experiment": ((), "name an experiment"),
    "hostile name": (("../../etc/passwd",), "unknown experiment"),
    "unknown preset": (("quickstart", "--preset=smokey"), "--preset=smokey: no such preset; did you mean smoke"),
    "unknown flag": (("quickstart", "--presets=cpu"), "--presets"),
    "set without value": (("quickstart", "--set"), "--set"),
    "page of nothing": (("quickstart", "--preset=smoke", "--report", "--workdir=nowhere"), "is not finished"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, expected = ARGUMENTS[case]
    assert expected in refused(capsys, tmp_path, *arguments)


@pytest.mark.parametrize("which", ["workdir", "cache_dir"])
def test_a_folder_that_cannot_be_written(which, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    given = (*SMALL, f"data.corpus={write_corpus(tmp_path / 'corpus')}")
    line = refused(
        capsys, tmp_path, "quickstart", "--preset=smoke", f"--{which}={tmp_path / 'file' / 'x'}", "--set", *given
    )
    assert "file" in line


def test_a_full_disk(tmp_path, capsys, monkeypatch):
    import shutil

    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1000))
    given = (*SMALL, f"data.corpus={write_corpus(tmp_path / 'corpus')}")
    arguments = ("quickstart", "--preset=smoke", f"--workdir={tmp_path / 'run'}", "--set", *given)
    assert "make room" in refused(capsys, tmp_path, *arguments)
    monkeypatch.undo()
    assert run.main(["--no_huge_pages", f"--cache_dir={tmp_path / 'cache'}", *arguments]) == 0, "must continue"


def test_a_workdir_of_another_config(tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus")

    def arguments(steps):
        given = (*SMALL, f"data.corpus={corpus}", f"train.steps={steps}")
        return ("quickstart", "--preset=smoke", f"--workdir={tmp_path / 'run'}", "--set", *given)

    assert run.main(["--no_huge_pages", f"--cache_dir={tmp_path / 'cache'}", *arguments(2)]) == 0
    capsys.readouterr()
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))
    assert "train.steps: 2 -> 3" in refused(capsys, tmp_path, *arguments(3))
    assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*")) == before


def test_there_are_at_least_40_cases():
    assert len(CONFIG) + len(CORPORA) + len(ARGUMENTS) >= 40
