"""The train step: accumulation, dispatch, device counts and bad steps change nothing that they should not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tinyjax import sharding, tree
from tinyjax.data.packing import IGNORE
from tinyjax.errors import UserError
from tinyjax.models.attention import GroupedQuery
from tinyjax.models.feed_forward import Plain
from tinyjax.models.init import FanIn
from tinyjax.models.model import Model
from tinyjax.models.transformer import Transformer
from tinyjax.optim.optimizers import AdamW, Muon
from tinyjax.optim.schedules import Linear
from tinyjax.train import state as states
from tinyjax.train.run_config import Config, TrainConfig
from tinyjax.train.step import compile_step, gradients, learning_rate, make_step

V, ROWS, S = 11, 8, 5
CONFIG = Config(
    model=Transformer(depth=2, width=8, attention=GroupedQuery(heads=2), mlp=Plain(hidden=8), init=FanIn()),
    optimizer=AdamW(learning_rate=0.05),
    schedule=Linear(warmup=0.0),
    train=TrainConfig(steps=10),
)
MUON = dataclasses.replace(CONFIG, optimizer=Muon(learning_rate=0.05))


def accumulating(config, microbatches):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, microbatches=microbatches))


def batch(seed=0, steps=None):
    """Return a batch whose rows have very uneven numbers of targets, the first rows none."""
    random = np.random.RandomState(seed)
    shape = (ROWS, S) if steps is None else (steps, ROWS, S)
    valid = random.rand(*shape) < np.linspace(0, 1, ROWS)[:, None]
    valid[..., -1, :] = True
    return {
        "tokens": random.randint(0, V, shape).astype(np.int32),
        "targets": np.where(valid, random.randint(0, V, shape), IGNORE).astype(np.int32),
        "positions": np.broadcast_to(np.arange(S, dtype=np.int32), shape).copy(),
        "segment_ids": np.ones(shape, np.int32),
    }


class Run:
    """A compiled step with its mesh and model."""

    def __init__(self, config, devices=1, several=False):
        self.config, self.mesh = config, sharding.data_mesh(jax.devices()[:devices])
        self.model = Model(config.model, V, jnp.dtype("float32"))
        self.transform = config.optimizer.transform(self.model.abstract(), self.model.logical_axes())
        self.spec = states.spec(self.model, self.transform, self.mesh)
        self.step = compile_step(make_step(self.model, self.transform, config), self.spec, self.mesh, several)

    def initial(self, seed=0):
        return states.initial(self.model, self.transform, self.mesh, seed)

    def put(self, data):
        return jax.device_put(data, sharding.batch_sharding(self.mesh, ROWS))

    def take(self, state, data):
        state, metrics = self.step(state, self.put(data))
        return state, {k: float(v) for k, v in metrics.items()}


@functools.cache
def run(config=CONFIG, devices=1):
    return Run(config, devices)


def numpy(tree_of_arrays):
    return jax.tree.map(np.asarray, tree_of_arrays)


def close(a, b, rtol=1e-4, atol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@functools.cache
def summed_gradients(microbatches):
    params = numpy(run().initial().params)
    part = functools.partial(gradients, run().model, CONFIG.objective, key=None, microbatches=microbatches)
    return numpy(jax.jit(part)(params, batch()))


@pytest.mark.parametrize("microbatches", [2, 8])
def test_accumulation_is_the_full_batch(microbatches):
    """Float32 sums in another order; the first of 8 microbatches has no target at all."""
    close(summed_gradients(microbatches), summed_gradients(1), rtol=1e-5, atol=1e-6)


def test_a_mean_of_means_is_seen():
    whole, _, _ = summed_gradients(1)
    params, data = numpy(run().initial().params), batch()
    part = jax.jit(functools.partial(gradients, run().model, CONFIG.objective, key=None, microbatches=1))
    halves = [part(params, {k: x[i : i + 4] for k, x in data.items()})[0] for i in (0, 4)]
    wrong = jax.tree.map(lambda a, b: (np.asarray(a) + np.asarray(b)) / 2, *halves)
    assert float(optax.tree.norm(jax.tree.map(np.subtract, wrong, whole))) > 0.05 * float(optax.tree.norm(whole))


def test_metrics_are_sums_and_the_rate_is_the_schedule_s():
    state, metrics = run().take(run().initial(), batch())
    assert metrics["count"] == (batch()["targets"] != IGNORE).sum()
    assert metrics["loss"] == pytest.approx(metrics["nll"])
    assert metrics["loss"] / metrics["count"] == pytest.approx(np.log(V), rel=0.5)
    assert metrics["finite"] == 1
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(summed_gradients(1)[0])), rel=1e-5)
    assert metrics["learning_rate"] == pytest.approx(0.05)
    _, metrics = run().take(state, batch(1))
    assert metrics["learning_rate"] == pytest.approx(0.05 * 0.9)
    assert learning_rate(CONFIG.optimizer, CONFIG.schedule, 5, 10) == pytest.approx(0.025)


def test_the_update_is_the_rate_times_the_transformation():
    state = run().initial()
    before, opt_state = numpy(state.params), numpy(state.opt_state)
    updates, _ = run().transform.update(summed_gradients(1)[0], opt_state, before)
    state, _ = run().take(state, batch())
    close(numpy(state.params), jax.tree.map(lambda p, u: p + 0.05 * np.asarray(u), before, updates))
    assert (int(state.step), int(state.skipped)) == (1, 0)


def test_a_batch_without_targets_is_no_step_to_nan():
    data = batch()
    data["targets"][:] = IGNORE
    state, metrics = run().take(run().initial(), data)
    assert metrics["count"] == metrics["loss"] == metrics["grad_norm"] == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(numpy(state.params)))


@pytest.mark.parametrize("config", [CONFIG, MUON, accumulating(CONFIG, 4)], ids=["adamw", "muon", "microbatches"])
@pytest.mark.parametrize("devices", [1, 8])
def test_the_second_step_compiles_nothing_and_the_state_stays_where_it_was(config, devices):
    ours = run(config, devices)
    state = ours.initial()
    for seed in range(3):
        state, _ = ours.take(state, batch(seed))
        assert ours.step._cache_size() == 1
        jax.tree.map(lambda x, spec: x.sharding == spec.sharding or pytest.fail("moved"), state, ours.spec)
        tree.check_same_structure(ours.spec.params, state.params, "state")
    assert int(state.step) == 3


@functools.cache
def course(config, devices, steps=4):
    """Return ([loss of each step], final state) of a short run."""
    ours, losses = run(config, devices), []
    state = ours.initial()
    for seed in range(steps):
        state, metrics = ours.take(state, batch(seed))
        losses.append(metrics["loss"] / metrics["count"])
    return losses, numpy(state)


@pytest.mark.parametrize("devices", [2, 8])
def test_another_number_of_devices_gives_the_same_run(devices):
    losses, state = course(CONFIG, 1)
    found, state_too = course(CONFIG, devices)
    np.testing.assert_allclose(found, losses, rtol=2e-5)
    close(state_too.params, state.params, rtol=1e-3, atol=2e-4)


def test_microbatches_and_devices_together_give_the_same_run():
    losses, _ = course(CONFIG, 1)
    # Microbatches of 2 rows do not fill 8 devices: slower, never different.
    found, _ = course(accumulating(CONFIG, 4), 8)
    np.testing.assert_allclose(found, losses, rtol=2e-5)


def test_initial_values_do_not_depend_on_the_mesh():
    jax.tree.map(np.testing.assert_array_equal, numpy(run().initial(3)), numpy(run(CONFIG, 8).initial(3)))
    other = numpy(run().initial(4)).params
    assert (numpy(run().initial(3)).params["embedding"]["table"] != other["embedding"]["table"]).all()


def test_several_steps_in_one_call_are_the_single_steps():
    losses, expected = course(CONFIG, 1)
    ours = Run(CONFIG, several=True)
    together = {k: np.stack([batch(seed)[k] for seed in range(4)]) for k in batch()}
    state, metrics = ours.step(ours.initial(), together)
    assert metrics["loss"].shape == (4,)
    np.testing.assert_allclose(metrics["loss"] / metrics["count"], losses, rtol=1e-5)
    close(numpy(state), expected)
    ours.step(state, together)
    assert ours.step._cache_size() == 1


def test_the_old_state_is_given_away():
    state = run().initial()
    new, _ = run().take(state, batch())
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state)))
    assert not any(x.is_deleted() for x in jax.tree.leaves(new))


@pytest.mark.parametrize("config", [CONFIG, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_step_changes_neither_parameters_nor_optimizer(config, value):
    ours = run(config)
    state, _ = ours.take(ours.initial(), batch())
    state.params["norm"]["scale"] = state.params["norm"]["scale"].at[0].set(value)
    before = numpy(state)
    state, metrics = ours.take(state, batch(1))
    assert metrics["finite"] == 0
    after = numpy(state)
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (before.params, before.opt_state))
    assert (int(after.step), int(after.skipped)) == (2, 1)


def test_the_run_goes_on_after_a_bad_step():
    ours = run()
    state, _ = ours.take(ours.initial(), batch())
    good = state.params["norm"]["scale"]
    state.params["norm"]["scale"] = jnp.full_like(good, jnp.nan)
    good = np.asarray(good)
    state, _ = ours.take(state, batch(1))
    state.params["norm"]["scale"] = jax.device_put(good, state.params["norm"]["scale"].sharding)
    state, metrics = ours.take(state, batch(2))
    assert metrics["finite"] == 1
    assert (int(state.step), int(state.skipped)) == (3, 1)
    assert metrics["learning_rate"] == pytest.approx(0.05 * 0.8), "a withheld update still is a step of the schedule"


def test_dropout_depends_on_seed_and_step_only():
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, dropout=0.5))

    ours, other = (run(dataclasses.replace(config, train=TrainConfig(steps=10, seed=s))) for s in (0, 1))
    first, again, elsewhere = (r.take(r.initial(0), batch())[1]["loss"] for r in (ours, ours, other))
    assert first == again != elsewhere
    state, _ = ours.take(ours.initial(0), batch())
    fresh = dataclasses.replace(ours.initial(0), step=state.step)
    assert ours.take(fresh, batch())[1]["loss"] != first


def test_optimizer_slots_lie_like_their_parameters(monkeypatch):
    """With a rule that splits a parameter axis, Adam's and Muon's copies are split as well, scalars are whole."""
    monkeypatch.setitem(sharding.RULES, "embed", "data")
    for config in (CONFIG, MUON):
        ours = Run(config, devices=8)
        shardings = {p: x.sharding for p, x in tree.flatten(ours.spec.params).items()}
        assert not shardings["embedding/table"].is_fully_replicated
        slots = 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(ours.spec.opt_state):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            mine = [p for p in shardings if name.endswith("/" + p)]
            if mine:
                longest = max(mine, key=len)
                assert leaf.sharding == shardings[longest], name
                slots += 1
            else:
                assert leaf.sharding.is_fully_replicated, name
        assert slots >= len(shardings)
        assert ours.initial().params["embedding"]["table"].sharding == shardings["embedding/table"]


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(
        UserError, match=r"data\.batch: 6 rows per microbatch do not divide over 8 devices; use a multiple of 8"
    ):
        sharding.batch_sharding(sharding.data_mesh(), 6)


def test_an_axis_without_a_rule_is_an_error():
    with pytest.raises(KeyError, match="unknown"):
        sharding.of_axes(sharding.data_mesh(), {"x": jax.sharding.PartitionSpec("unknown")})
