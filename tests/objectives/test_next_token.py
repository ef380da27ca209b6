"""Next-token prediction: its sums are those of the logits, over the tokens that count and no others."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyjax.config import variants
from tinyjax.data.packing import IGNORE
from tinyjax.errors import ConfigError
from tinyjax.models.attention import GroupedQuery
from tinyjax.models.feed_forward import Plain
from tinyjax.models.init import FanIn
from tinyjax.models.model import Model
from tinyjax.models.transformer import Transformer
from tinyjax.objectives.next_token import NextToken, token_nll
from tinyjax.objectives.objective import Objective

V, ROWS, S = 19, 3, 7
ARCHITECTURE = Transformer(
    depth=1, width=8, attention=GroupedQuery(heads=1), mlp=Plain(hidden=8), init=FanIn(3.0), logit_softcap=5.0
)
MODEL = Model(ARCHITECTURE, V, jnp.dtype("float32"))


@functools.cache
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def batch(valid=0.6):
    random = np.random.RandomState(0)
    tokens_BS = random.randint(0, V, (ROWS, S)).astype(np.int32)
    targets_BS = np.where(random.rand(ROWS, S) < valid, random.randint(0, V, (ROWS, S)), IGNORE).astype(np.int32)
    positions_BS = np.tile(np.arange(S, dtype=np.int32), (ROWS, 1))
    return {
        "tokens": tokens_BS,
        "targets": targets_BS,
        "positions": positions_BS,
        "segment_ids": np.ones((ROWS, S), np.int32),
    }


@functools.cache
def logits_BSV():
    return np.asarray(jax.jit(MODEL.logits)(params(), batch()), np.float64)


def by_hand(targets_BS):
    """Return (sum of nll, sum of lse squared, count), from logits in float64."""
    lse_BS = np.log(np.exp(logits_BSV()).sum(axis=-1))
    valid_BS = targets_BS != IGNORE
    picked_BS = np.take_along_axis(logits_BSV(), np.maximum(targets_BS, 0)[:, :, None], axis=-1)[:, :, 0]
    return (lse_BS - picked_BS)[valid_BS].sum(), (lse_BS[valid_BS] ** 2).sum(), valid_BS.sum()


@functools.cache
def compiled(objective):
    return jax.jit(lambda p, b: objective.loss(MODEL, p, b, None))


IMPLEMENTATIONS = NextToken.__dataclass_fields__["implementation"].type.__args__


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("valid", [0.0, 0.6, 1.0])
def test_sums_and_count_are_those_of_the_valid_tokens(implementation, z_loss, valid):
    data = batch(valid)
    (total, count), metrics = compiled(NextToken(z_loss, implementation))(params(), data)
    nll, squares, tokens = by_hand(data["targets"])
    assert total == pytest.approx(nll + z_loss * squares, rel=1e-5)
    assert metrics["nll"] == pytest.approx(nll, rel=1e-5)
    assert metrics["z"] == pytest.approx(squares, rel=1e-5)
    assert count == tokens
    assert {x.dtype for x in jax.tree.leaves((total, count, metrics))} == {jnp.dtype("float32")}


def test_z_loss_changes_the_gradient_and_not_the_nll():
    def gradient(objective):
        return jax.jit(jax.grad(lambda p: objective.loss(MODEL, p, batch(), None)[0][0]))(params())

    without, some, more = (gradient(NextToken(z)) for z in (0.0, 0.1, 0.2))

    def linear(a, b, c):
        np.testing.assert_allclose(np.asarray(c) - b, np.asarray(b) - a, rtol=1e-3, atol=1e-4)

    jax.tree.map(linear, without, some, more)
    assert (
        max(np.abs(np.asarray(a) - b).max() for a, b in zip(*map(jax.tree.leaves, (without, some)), strict=True)) > 0.01
    )


def test_losses_per_token_sum_to_the_loss():
    data = batch()
    nll_BS = jax.jit(functools.partial(token_nll, MODEL))(params(), data)
    assert nll_BS.shape == (ROWS, S)
    assert (np.asarray(nll_BS)[data["targets"] == IGNORE] == 0).all()
    (total, _), _ = compiled(NextToken())(params(), data)
    assert float(jnp.sum(nll_BS)) == pytest.approx(float(total), rel=1e-5)


def test_losses_of_a_token_belong_to_its_place():
    data = batch(1.0)
    nll_BS = np.asarray(token_nll(MODEL, params(), data))
    lse_BS = np.log(np.exp(logits_BSV()).sum(axis=-1))
    expected = lse_BS - np.take_along_axis(logits_BSV(), data["targets"][:, :, None], axis=-1)[:, :, 0]
    np.testing.assert_allclose(nll_BS, expected, rtol=1e-5, atol=1e-5)


def test_the_cap_is_part_of_the_loss():
    uncapped = Model(dataclasses.replace(ARCHITECTURE, logit_softcap=None), V, jnp.dtype("float32"))
    (total, _), _ = NextToken().loss(uncapped, params(), batch(), None)
    assert abs(float(total) - by_hand(batch()["targets"])[0]) > 0.1


def test_rows_add_up():
    """Sums over parts of a batch are the sums over the whole, however unevenly tokens are spread."""
    data = batch(0.4)
    (total, count), _ = compiled(NextToken(0.1))(params(), data)
    parts = [compiled(NextToken(0.1))(params(), {k: x[i : i + 1] for k, x in data.items()})[0] for i in range(ROWS)]
    assert len({int(n) for _, n in parts}) > 1
    assert float(total) == pytest.approx(sum(float(t) for t, _ in parts), rel=1e-5)
    assert float(count) == sum(float(n) for _, n in parts)


@pytest.mark.parametrize("kind", variants(Objective))
def test_every_objective_gives_sums_that_can_be_added(kind):
    objective = variants(Objective)[kind]()
    (total, count), metrics = jax.jit(lambda p, b: objective.loss(MODEL, p, b, None))(params(), batch())
    for value in (total, count, *metrics.values()):
        assert value.shape == ()
        assert value.dtype == jnp.float32
    assert "loss" not in metrics, "the step adds it"


def test_a_negative_weight_is_refused():
    with pytest.raises(ConfigError, match="z_loss"):
        NextToken(z_loss=-1e-4)
