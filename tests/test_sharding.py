"""What runs on each device's own share: it sees that share, its sums are whole, and its gradients are too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tinyjax import sharding

ROWS = 8


def squares(seen, add=sharding.add_shares):
    """Return sum((x w)^2) over the rows, and note the shape of the rows each device is given."""

    def function(x_BD, w_D):
        seen.append(x_BD.shape)
        return add(jnp.sum(jnp.square(x_BD @ w_D)))

    return lambda x_BD, w_D: sharding.per_device(function, (P("batch"), P()), P())(x_BD, w_D)


def run(devices, rows=ROWS, add=sharding.add_shares):
    """Return the shapes seen, the value and the gradients for the shared and the divided argument."""
    random = np.random.RandomState(0)
    x_BD, w_D = random.randn(rows, 3).astype(np.float32), random.randn(3).astype(np.float32)
    mesh, seen = sharding.data_mesh(jax.devices()[:devices]), []
    program = jax.value_and_grad(squares(seen, add), argnums=(0, 1))
    if rows % devices == 0:
        x_BD = jax.device_put(x_BD, sharding.batch_sharding(mesh, rows))
    value, grads = jax.jit(sharding.within(mesh, program))(x_BD, w_D)
    return set(seen), [np.asarray(x) for x in (value, *grads)]


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_each_device_sees_its_share_and_the_results_are_whole(devices):
    seen, found = run(devices)
    assert seen == {(ROWS // devices, 3)}
    for a, b in zip(found, run(1)[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_rows_that_do_not_divide_are_left_to_the_compiler():
    seen, found = run(8, rows=5)
    assert seen == {(5, 3)}
    for a, b in zip(found, run(1, rows=5)[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_without_adding_the_shares_the_value_is_one_device_s():
    _, (value, *_) = run(8, add=lambda x: x)
    assert abs(value / run(1)[1][0] - 1) > 0.1


def test_outside_of_a_mesh_nothing_is_divided():
    seen = []
    value = jax.jit(squares(seen))(np.ones((ROWS, 3), np.float32), np.ones(3, np.float32))
    assert seen == [(ROWS, 3)]
    assert value == 9 * ROWS
