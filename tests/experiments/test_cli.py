"""The command line, from a run to its page, and every command of the README."""

import base64
import json
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jax
import pytest

from experiments import experiment, machine, run
from tests.support import write_corpus
from tinyjax.config import from_json, identity
from tinyjax.train.run_config import Config

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _restore_compilation_cache():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The arguments of a finished smoke run on a small corpus, and its folder."""
    folder = tmp_path_factory.mktemp("quickstart")
    corpus = write_corpus(folder / "corpus", documents=60)
    arguments = (
        *("quickstart", "--preset=smoke", "--no_huge_pages", f"--workdir={folder / 'run'}"),
        *(f"--cache_dir={folder / 'cache'}", "--set", f"data.corpus={corpus}", "data.heldout=0.3"),
        *("tokenizer.vocab_size=300", "evaluation.positions=none", "evaluation.prompt=<b>the"),
    )
    assert run.main(arguments) == 0
    return arguments, folder / "run"


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.images, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attributes)["src"])
            self.text.append(dict(attributes)["alt"])

    def handle_data(self, data):
        self.text.append(data)


def read_page(folder):
    page = _Page()
    page.feed((folder / "report.html").read_text(encoding="utf-8"))
    return page


def test_the_page_has_all_it_promises(quickstart):
    _, folder = quickstart
    page = read_page(folder)
    text = " ".join(" ".join(page.text).split())
    for expected in (
        *("fewer bits per byte than gzip -9", "gzip -9", "bzip2 -9", "xz -9", "this model"),
        *("without token tables", "attention scores", "jax", "git", "seed", "Sample 1", "<b>the"),
        *(
            "throughput",
            "learning rate",
            "held-out documents",
            '"vocab_size": 300',
            "python -m experiments.run quickstart",
        ),
    ):
        assert expected.lower() in text.lower(), expected
    assert "script" not in page.tags
    assert all(source.startswith("data:image/png;base64,") for source in page.images)
    for source, name in zip(page.images, ("loss", "learning_rate", "throughput"), strict=True):
        assert base64.b64decode(source.partition(",")[2]) == (folder / f"{name}.png").read_bytes()


def test_baselines_are_of_the_same_bytes(quickstart):
    _, folder = quickstart
    (place,) = (folder / "trials").iterdir()
    (evaluation,) = json.loads((place / "result.json").read_text())["evaluations"]
    (baseline,) = json.loads((place / "measured.json").read_text()).values()
    assert baseline["bytes"] == evaluation["bytes"]
    assert baseline["hash"] == evaluation["hash"]


def test_tensorboard_events_are_written(quickstart):
    _, folder = quickstart
    assert any((folder / "trials").rglob("events/*tfevents*"))


def test_the_same_command_again_and_report_only(quickstart, capsys):
    arguments, folder = quickstart
    before = (folder / "report.html").read_text()
    assert run.main(arguments) == 0
    assert run.main((*arguments[:1], "--report", *arguments[1:])) == 0
    assert capsys.readouterr().out.count("page: ") == 2

    def stable(page):
        return re.sub(r"\d{4}-\d\d-\d\dT[\d:+Z.]+", "", page)

    assert stable((folder / "report.html").read_text()) == stable(before)


def test_dry_run(quickstart, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, _ = quickstart
    arguments = [a for a in arguments if not a.startswith("--workdir")]
    assert run.main((arguments[0], "--dry_run", *arguments[1:], "model.depth=3")) == 0
    out = capsys.readouterr().out
    shown, _ = json.JSONDecoder().raw_decode(out)
    config = from_json(Config, shown)
    assert config.model.depth == 3
    assert f"identity: {identity(config)}" in out
    numbers = dict(re.findall(r"│ (\S[^│]*?) +│ +([\d,]+) │", out))
    groups = ("embedding", "layers/attention", "layers/attention_norm", "layers/mlp", "layers/mlp_norm", "norm")
    counted = re.search(r"│ total +│ +([\d,]+) │", out)[1]
    assert sum(int(numbers[g].replace(",", "")) for g in groups) == int(counted.replace(",", ""))
    assert "temporary" in out
    assert not list(tmp_path.iterdir()), "a dry run leaves nothing"


def test_list(capsys):
    assert run.main(["--list"]) == 0
    assert "quickstart" in capsys.readouterr().out


@pytest.mark.parametrize("name", experiment.names())
def test_every_experiment_says_what_it_is(name):
    module = experiment.load(name)
    assert "Command:" in module.__doc__
    assert "Expected:" in module.__doc__
    assert "Cost:" in module.__doc__
    assert {"smoke", "cpu"} <= set(module.PRESETS)
    for preset in module.PRESETS:
        for config in experiment.trials(module, preset):
            assert from_json(Config, json.loads(json.dumps(run_json(config)))) == config


def run_json(config):
    from tinyjax.config import to_json

    return to_json(config)


def test_huge_pages_are_announced_and_switchable(monkeypatch):
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(machine, "HUGE_PAGES", _File("always [madvise] never"))
    line, environ = machine.with_huge_pages({"GLIBC_TUNABLES": "glibc.malloc.check=0", "A": "b"})
    assert "--no_huge_pages" in line
    assert environ == {"GLIBC_TUNABLES": "glibc.malloc.check=0:glibc.malloc.hugetlb=1", "A": "b"}
    assert machine.with_huge_pages(environ) is None, "restarted only once"
    monkeypatch.setattr(machine, "HUGE_PAGES", _File("always madvise [never]"))
    assert machine.with_huge_pages({}) is None
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("", ""))
    assert machine.with_huge_pages({}) is None


class _File:
    def __init__(self, text):
        self._text = text

    def exists(self):
        return True

    def read_text(self):
        return self._text


def readme_commands():
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return [line.split(" #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("line", readme_commands())
def test_readme_command(line, quickstart, tmp_path, monkeypatch, capsys):
    """Each command is run: `make` targets are resolved by make, experiments run at their smoke size."""
    words = shlex.split(line)
    if words[0] == "make":
        subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True, capture_output=True)
        return
    if words[0] == "git":
        return  # needs the network; what follows it is run here
    assert words[:2] == ["python", "-m"]
    if words[2] != "experiments.run":
        # Benchmarks take minutes and have tests of their own; here, that the command and its options exist.
        shown = subprocess.run([sys.executable, *words[1:], "--help"], cwd=ROOT, capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
        assert all(word.split("=")[0] in shown.stdout for word in words[3:]), shown.stdout
        return
    assert words[2] == "experiments.run"
    monkeypatch.chdir(tmp_path)
    words = [w.replace("PATH", str(write_corpus(tmp_path / "corpus"))) for w in words[3:]]
    small = ["tokenizer.vocab_size=300", "data.heldout=0.3", "train.steps=4"]
    if words != ["--list"]:
        words += [] if "--set" in words else ["--set"]
        words += small if any("corpus" in w for w in words) else [f"data.corpus={tmp_path / 'c'}", *small]
        write_corpus(tmp_path / "c")
        words += ["--preset=smoke", "--no_huge_pages", f"--cache_dir={tmp_path / 'cache'}"]
    assert run.main(words) == 0
