"""The TPU kernels of attention, compiled by the TPU's own compiler on a machine without one."""

import importlib.util

import pytest

from kernels import chips
from kernels.aot import jobs, parent
from kernels.attention import shapes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler: pip install 'tinyjax[aot]'"
    ),
]
MIB = 1 << 20


@pytest.mark.parametrize("chip", chips.CHIPS)
@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_forward_and_backward_compile_without_a_table_of_scores(shape, chip):
    result = parent.one(jobs.Job("kernels.attention.shapes", "value_and_grad", shape, "tpu", chip, "memory"))
    assert result.error is None, f"{result.error}: {result.reason}"
    print(f"{shape} on {chip}: temporary {result.memory.temp / MIB:.1f} MiB")
    at = shapes.SHAPES[shape]
    # What is kept besides gradients: out, lse and copies of q, k, v, dout where their layout has to change.
    arrays = 2 * at.b * at.a * (3 * at.h * at.s + 2 * at.k * at.t)
    assert result.memory.temp <= 3 * arrays
