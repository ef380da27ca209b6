"""The kernels inside a training run: by config, on one device and several, with the losses of the reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.cross_entropy import api as cross_entropy
from tinyjax import sharding
from tinyjax.data.packing import IGNORE
from tinyjax.models.attention import GroupedQuery
from tinyjax.models.feed_forward import Gated
from tinyjax.models.model import Model
from tinyjax.models.transformer import Transformer
from tinyjax.objectives.next_token import NextToken, token_nll
from tinyjax.optim.optimizers import AdamW
from tinyjax.train import state as states
from tinyjax.train.run_config import Config, TrainConfig
from tinyjax.train.step import compile_step, make_step

V, ROWS, S, STEPS = 67, 4, 24, 50


def config(loss="reference", attention="reference"):
    return Config(
        model=Transformer(
            depth=2,
            width=16,
            attention=GroupedQuery(
                heads=4, kv_heads=2, window=4, qk_norm=True, softcap=0.5, sinks=True, implementation=attention
            ),
            mlp=Gated(hidden=24),
            logit_softcap=10.0,
        ),
        objective=NextToken(z_loss=1e-3, implementation=loss),
        optimizer=AdamW(learning_rate=3e-3),
        train=TrainConfig(steps=STEPS),
    )


def batch(seed):
    """Return packed rows of three documents with a tail of padding."""
    random = np.random.RandomState(seed)
    segments_S = np.array([1] * 7 + [2] * 9 + [3] * 5 + [0] * 3, np.int32)
    tokens_BS = random.randint(0, V, (ROWS, S)).astype(np.int32)
    return {
        "tokens": tokens_BS,
        "targets": np.where(segments_S > 0, (tokens_BS * 5 + 3) % V, IGNORE).astype(np.int32),
        "positions": np.broadcast_to(np.arange(S, dtype=np.int32), (ROWS, S)).copy(),
        "segment_ids": np.broadcast_to(segments_S, (ROWS, S)).copy(),
    }


def losses(config, devices=1, steps=STEPS):
    mesh = sharding.data_mesh(jax.devices()[:devices])
    model = Model(config.model, V, jnp.dtype("float32"))
    transform = config.optimizer.transform(model.abstract(), model.logical_axes())
    spec = states.spec(model, transform, mesh)
    step = compile_step(make_step(model, transform, config), spec, mesh)
    state = states.initial(model, transform, mesh, 0)
    found = []
    for seed in range(steps):
        state, metrics = step(state, jax.device_put(batch(seed), sharding.batch_sharding(mesh, ROWS)))
        found.append(float(metrics["loss"]) / float(metrics["count"]))
    return np.asarray(found)


@pytest.fixture(scope="module")
def expected():
    found = losses(config())
    assert found[-1] < found[0] - 1
    return found


# Interpreting a kernel takes seconds a step; CI does it.
ALL = ["chunked", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tpu", "gpu"))]


@pytest.mark.parametrize("implementation", ALL)
def test_fifty_steps_have_the_losses_of_the_reference(implementation, expected):
    """Rounding of one step, about 1e-7, grows as training goes on; a wrong term shows at once."""
    found = losses(config(implementation, implementation))
    np.testing.assert_allclose(found[:2], expected[:2], rtol=2e-6)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("changed", [{"window": 3}, {"sinks": False}, {"softcap": None}])
def test_another_attention_has_other_losses(changed, expected):
    other = config()
    attention = dataclasses.replace(other.model.attention, **changed)
    other = dataclasses.replace(other, model=dataclasses.replace(other.model, attention=attention))
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(losses(other, steps=10), expected[:10], rtol=1e-4)


@pytest.mark.parametrize("implementation", ALL)
def test_four_devices_have_the_losses_of_one(implementation, expected):
    np.testing.assert_allclose(losses(config(implementation, implementation), 4, 5), expected[:5], rtol=1e-5)


@pytest.mark.parametrize("devices", [1, 4])
def test_held_out_losses_are_those_of_each_device_s_rows(devices):
    mesh = sharding.data_mesh(jax.devices()[:devices])
    model = Model(config().model, V, jnp.dtype("float32"))
    params = jax.jit(model.init)(jax.random.key(0))
    run = jax.jit(sharding.within(mesh, lambda params, data: token_nll(model, params, data)))
    nll_BS = run(params, jax.device_put(batch(0), sharding.batch_sharding(mesh, ROWS)))
    want_BS = np.concatenate(
        [token_nll(model, params, jax.tree.map(lambda x, i=i: x[i : i + 1], batch(0))) for i in range(ROWS)]
    )
    np.testing.assert_allclose(nll_BS, want_BS, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("filtered", [False, True])
def test_the_filter_of_gradients_reaches_the_kernel(filtered, monkeypatch):
    """With a threshold above every |softmax - onehot| the filter leaves nothing of the loss's gradient."""
    monkeypatch.setattr(cross_entropy, "auto_filter_eps", lambda dtype: 2.0)
    model = Model(config().model, V, jnp.dtype("float32"))
    objective = NextToken(filter_gradients=filtered, implementation="tpu")
    params = jax.jit(model.init)(jax.random.key(0))
    grads = jax.jit(jax.grad(lambda params: objective.loss(model, params, batch(0), None)[0][0]))(params)
    assert any(np.asarray(x).any() for x in jax.tree.leaves(grads)) == (not filtered)
