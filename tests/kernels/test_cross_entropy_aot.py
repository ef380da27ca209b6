"""The TPU kernels of the cross-entropy, compiled by the TPU's own compiler on a machine without one."""

import importlib.util

import pytest

from kernels import chips
from kernels.aot import jobs, parent
from kernels.cross_entropy import shapes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler: pip install 'tinyjax[aot]'"
    ),
]
MIB = 1 << 20


def memory(shape, chip, implementation="tpu", program="value_and_grad"):
    """Return the compiled program's jobs.Memory; fails with the compiler's reason."""
    result = parent.one(jobs.Job("kernels.cross_entropy.shapes", program, shape, implementation, chip, "memory"))
    assert result.error is None, f"{shape} on {chip}: {result.error}: {result.reason}"
    print(f"{shape} on {chip}, {implementation}: temporary {result.memory.temp / MIB:.1f} MiB")
    return result.memory


@pytest.mark.xdist_group("libtpu")
@pytest.mark.parametrize("chip", chips.CHIPS)
def test_loss_and_gradients_of_gemma_need_little_more_than_the_gradients(chip):
    """Wijmans et al. 2024, table 1: 1164 MiB where the dense loss takes 28000; the gradients alone are 1161."""
    shape = shapes.SHAPES["gemma-2-2b"]
    gradients = 2 * (shape.n + shape.v) * shape.d
    found = memory("gemma-2-2b", chip)
    assert found.temp + found.outputs <= 1.05 * gradients


@pytest.mark.xdist_group("libtpu")
@pytest.mark.parametrize("chip", chips.CHIPS)
def test_a_tiny_model_needs_under_16_mib(chip):
    assert memory("tiny", chip).temp < 16 * MIB


@pytest.mark.xdist_group("libtpu")
@pytest.mark.parametrize("chip", chips.CHIPS)
@pytest.mark.parametrize("shape", sorted(set(shapes.SHAPES) - {"tiny", "gemma-2-2b"}))
def test_every_shape_compiles(shape, chip):
    memory(shape, chip)


@pytest.mark.xdist_group("libtpu")
def test_a_loss_that_holds_its_logits_would_be_seen():
    shape = shapes.SHAPES["tiny"]
    assert memory("tiny", "v5e", "reference").temp >= shape.n * shape.v * 2
