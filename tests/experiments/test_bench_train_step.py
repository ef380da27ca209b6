"""The train-step benchmark at a size of milliseconds: the table, and that both sides compute the same."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from experiments.bench import train_step
from experiments.bench.contenders import ours, workload
from experiments.bench.contenders.process import Contender, Running
from experiments.bench.contenders.workload import Workload
from tinyjax.errors import UserError

# Odd sizes: rows of 7 tokens do not divide into blocks, 19 tokens not into vectors.
TINY = Workload(width=12, depth=2, heads=2, hidden=10, sequence=7, rows=2, vocab=19)
ARGV = [f"--{name}={value}" for name, value in dataclasses.asdict(TINY).items()]


def losses(prepare, steps, **options):
    step = prepare(TINY, options)
    return [step() for _ in range(steps)]


def test_ours_alone_gives_the_table_and_the_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_step, "torch_version", lambda python: None)
    path = tmp_path / "times.json"
    train_step.main([*ARGV, "--contenders=ours,ours_packed,torch", "--rounds=2", "--steps=3", f"--json={path}"])
    out = capsys.readouterr().out
    assert "pip install 'tinyjax[rivals]'" in " ".join(out.split())
    for part in ("ours", "ours_packed", "tokens/s", "GFLOP/s", "% of peak"):
        assert part in out
    data = json.loads(path.read_text())
    assert data["work"] == dataclasses.asdict(TINY) and data["peak_flops"] > 0
    assert [r["name"] for r in data["results"]] == ["ours", "ours_packed"]
    for result in data["results"]:
        # 2 rounds of 3 steps; the one that compiles is not among them
        assert len(result["wall"]) == len(result["cpu"]) == 6 and min(result["wall"]) > 0


def test_rates_follow_from_the_best_time():
    work = Workload()
    results = [
        train_step.Result("ours", 9.0, (2.0, 1.0, 9.0), (3.0, 2.5, 4.0)),
        train_step.Result("torch", 9.0, (4.0, 2.0), (5.0, 4.0)),
    ]
    table = train_step.table(results, work, 378e9, "")
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert rows[0]["best ms"] == 1000 and rows[0]["median ms"] == 2000 and rows[0]["CPU ms"] == 2500
    assert rows[0]["tokens/s"] == 4096 and rows[1]["tokens/s"] == 2048
    assert rows[0]["x torch"] == 2 and rows[1]["x torch"] == 1
    assert rows[0]["% of peak"] == pytest.approx(50, rel=2e-3)


def test_flops_count_every_matmul_three_times():
    # Per token, forward: 4 projections 8 D^2, scores and mix 4 S D, three matrices 6 D F, per layer; head 2 D V.
    d, f, s, layers, v = 256, 704, 256, 6, 8192
    forward = layers * (8 * d * d + 4 * s * d + 6 * d * f) + 2 * d * v
    assert train_step.flops_per_step(Workload()) == 3 * 4096 * forward == 189_246_996_480


def test_a_contender_that_dies_is_named_with_its_last_line():
    broken = Contender("ours_broken", "ours", {"packed": False, "set": ["model.widht=3"]})
    with pytest.raises(UserError, match=r"ours_broken stopped with status 1: .*width") as raised:
        Running(broken, TINY, sys.executable)
    assert "\n" not in str(raised.value)


def test_packing_changes_what_is_attended_to():
    plain, packed = workload.batch(TINY, packed=False), workload.batch(TINY, packed=True)
    assert (plain["tokens"] == packed["tokens"]).all() and "segment_ids" not in plain
    many = workload.batch(Workload(), packed=True)
    assert (many["positions"][:, 0] == 0).all() and (np.diff(many["segment_ids"], axis=1) >= 0).all()
    assert ((many["positions"] == 0).sum(axis=1) == many["segment_ids"].max(axis=1)).all()
    (one,) = losses(ours.prepare, 1, packed=False, set=[])
    (other,) = losses(ours.prepare, 1, packed=True, set=[])
    assert one == pytest.approx(np.log(TINY.vocab), abs=0.1)
    assert one != other or packed["segment_ids"].max() == 1


@pytest.mark.slow
@pytest.mark.parametrize("change", [["train.microbatches=2"], ["model.layers=scan"]])
def test_settings_of_ours_that_change_speed_do_not_change_losses(change):
    expected = losses(ours.prepare, 3, packed=False, set=[])
    np.testing.assert_allclose(losses(ours.prepare, 3, packed=False, set=change), expected, rtol=1e-5)


@pytest.mark.rivals
def test_both_sides_train_alike(monkeypatch):
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'tinyjax[rivals]'")
    from experiments.bench.contenders import pytorch

    # A large rate, so that clipping, decay and both moments show within a few steps.
    monkeypatch.setattr(workload, "LEARNING_RATE", 0.05)
    expected = losses(ours.prepare, 5, packed=False, set=[])
    found = losses(pytorch.prepare, 5, compile=False, bf16=False)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert expected[0] - expected[-1] > 0.1
    monkeypatch.setattr(workload, "CLIP", 1e-3)
    wrong = losses(pytorch.prepare, 5, compile=False, bf16=False)
    assert np.abs(np.subtract(wrong, expected)).max() > 1e-3


@pytest.mark.rivals
def test_a_wrong_rotation_is_seen(monkeypatch):
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'tinyjax[rivals]'")
    from experiments.bench.contenders import pytorch

    expected = losses(ours.prepare, 3, packed=False, set=[])
    monkeypatch.setattr(workload, "ROPE_BASE", 3.0)
    assert np.abs(np.subtract(losses(pytorch.prepare, 3, compile=False, bf16=False), expected)).max() > 1e-6
