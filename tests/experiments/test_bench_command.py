"""The command: benchmarks are found by name, and bad input is one line."""

import pytest

from experiments.bench import __main__ as bench
from experiments.bench import train_step
from tinyjax.errors import UserError


def test_without_a_name_benchmarks_are_listed(capsys):
    assert bench.main([]) == 0
    out = capsys.readouterr().out
    assert "train_step" in out and "tinyjax against PyTorch" in out


def test_only_modules_with_a_main_are_benchmarks():
    assert "train_step" in bench.benchmarks()
    assert not {"contenders", "__init__", "__main__"} & bench.benchmarks().keys()


def test_unknown_name_is_one_line_with_the_nearest(capsys):
    assert bench.main(["train_stp"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "no benchmark train_stp; did you mean train_step?\n"


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--contenders=ourz"], "did you mean ours?"),
        (["--contenders=ours", "--torch_python=/nowhere/python"], "--torch_python=/nowhere/python"),
        (["--contenders=ours", "--width=30", "--heads=4"], "--heads=4"),
    ],
)
def test_bad_options_are_one_line(argv, part, capsys):
    assert bench.main(["train_step", *argv]) == 2
    err = capsys.readouterr().err
    assert part in err and err.count("\n") == 1


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_counts_must_be_positive(value, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["train_step", f"--rounds={value}"])
    assert stop.value.code == 2 and "--rounds" in capsys.readouterr().err


def test_without_torch_only_ours_are_chosen():
    chosen = train_step.choose(None, [], have_torch=False)
    assert {c.module for c in chosen} == {"ours"}
    with pytest.raises(UserError, match="rivals"):
        train_step.choose("torch,torch_bf16", [], have_torch=False)


def test_results_that_cannot_be_written_are_one_line_and_leave_nothing(tmp_path):
    with pytest.raises(UserError, match="--json="):
        train_step.write_json(tmp_path / "absent" / "times.json", {})
    assert not list(tmp_path.iterdir())


def test_a_contender_with_another_loss_is_refused():
    train_step.check_same([("ours", 9.06204), ("torch_bf16", 9.0700)], 0.02)
    for wrong in (9.2, float("nan")):
        with pytest.raises(UserError, match=r"^torch has loss"):
            train_step.check_same([("ours", 9.06204), ("torch", wrong)], 0.02)
