"""No kernel gets worse unseen: the figures in the tables are measured again and must not have risen.

`python -m kernels.tune --chip=v5e` chooses and writes anew, with `--keep` it only adds this libtpu's figures.
"""

import pytest

from kernels import blocks, tune
from kernels.aot import store, tables
from kernels.chips import CHIPS

CHIP = CHIPS["v5e"]
GATED = [(op.name, program) for op in tune.OPS.values() for program in op.programs]


@pytest.mark.slow
@pytest.mark.parametrize(("op", "program"), GATED)
def test_figures_have_not_risen(op, program, tmp_path):
    version = tables.version()
    if not version:
        pytest.skip("libtpu is not installed: pip install 'tinyjax[aot]'")
    known = [e for e in blocks.table(CHIP.name) if (e.op, e.program) == (op, program) and version in e.figures]
    if not known:
        pytest.skip(f"the table has no figures of libtpu {version}: python -m kernels.tune --chip={CHIP.name} --keep")
    # The shortest program compiles soonest; it is made of the same code as the others.
    entry = min(known, key=lambda e: sum(kernel["bundles"] for kernel in e.figures[version]["kernels"].values()))
    now = tune.Tuner(tune.OPS[op], CHIP, store.Store(tmp_path / "measured.jsonl")).remeasure(entry)
    assert now is not None, f"{op} {program} does not compile with {entry.blocks} at {entry.shape}"
    assert not list(tables.worse(entry.figures[version], now.figures[version]))
