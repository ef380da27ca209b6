"""Parameter counts and FLOPs: equal to closed forms, and to the products found in the traced program."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyjax import tree
from tinyjax.models.attention import GroupedQuery
from tinyjax.models.feed_forward import Gated, Plain
from tinyjax.models.model import Model
from tinyjax.models.norms import LayerNorm
from tinyjax.models.transformer import Transformer
from tinyjax.objectives.next_token import NextToken

V, S, B = 37, 7, 3


def gated(**fields):
    return Transformer(
        **{"depth": 3, "width": 12, "attention": GroupedQuery(heads=3), "mlp": Gated(hidden=20)} | fields
    )


# Config -> parameters, written out: tables, then per layer the projections, the feed-forward layer and the vectors.
COUNTS = {
    "gated": (gated(), V * 12 + 3 * (4 * 12 * 12 + 3 * 12 * 20 + 2 * 12) + 12),
    "untied": (gated(tied=False), 2 * V * 12 + 3 * (4 * 12 * 12 + 3 * 12 * 20 + 2 * 12) + 12),
    "one kv head": (
        gated(attention=GroupedQuery(heads=3, kv_heads=1, head_width=6)),
        V * 12 + 3 * ((3 + 1 + 1) * 6 * 12 + 3 * 6 * 12 + 3 * 12 * 20 + 2 * 12) + 12,
    ),
    "normalised heads": (
        gated(attention=GroupedQuery(heads=3, qk_norm=True)),
        V * 12 + 3 * (4 * 12 * 12 + 2 * 4 + 3 * 12 * 20 + 2 * 12) + 12,
    ),
    "sinks and a window": (
        gated(attention=GroupedQuery(heads=3, sinks=True, window=4)),
        V * 12 + 3 * (4 * 12 * 12 + 3 + 3 * 12 * 20 + 2 * 12) + 12,
    ),
    "biases and LayerNorm": (
        gated(attention=GroupedQuery(heads=3, bias=True), mlp=Plain(bias=True), norm=LayerNorm()),
        V * 12 + 3 * (4 * 12 * 12 + 4 * 12 + 2 * 12 * 48 + 48 + 12 + 4 * 12) + 24,
    ),
    "width from 8/3": (gated(mlp=Gated()), V * 12 + 3 * (4 * 12 * 12 + 3 * 12 * 32 + 2 * 12) + 12),
}


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_parameters_are_counted_in_closed_form(name, layers):
    config, expected = COUNTS[name]
    spec = Model(dataclasses.replace(config, layers=layers), V, jnp.dtype("float32")).abstract()
    assert tree.count(spec) == expected
    assert sum(tree.groups(spec).values()) == expected
    assert tree.nbytes(spec) == 4 * expected


def jaxprs_in(value):
    if isinstance(value, (tuple, list)):
        return [found for item in value for found in jaxprs_in(item)]
    if hasattr(value, "jaxpr"):
        value = value.jaxpr
    return [value] if hasattr(value, "eqns") else []


def matmul_flops(jaxpr):
    """Return 2 x (elements of the result) x (elements contracted) over all dot_generals of a program without loops."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        assert equation.primitive.name not in ("while", "scan"), "a loop would hide how often its body runs"
        total += sum(matmul_flops(inner) for value in equation.params.values() for inner in jaxprs_in(value))
    return total


def batch():
    positions_BS = np.tile(np.arange(S, dtype=np.int32), (B, 1))
    tokens_BS = np.random.RandomState(0).randint(0, V, (B, S)).astype(np.int32)
    return {
        "tokens": tokens_BS,
        "targets": tokens_BS,
        "positions": positions_BS,
        "segment_ids": np.ones((B, S), np.int32),
    }


@pytest.mark.parametrize("name", COUNTS)
def test_flops_are_the_products_of_the_program(name):
    """The backward pass makes exactly two products for each of the forward pass: a training token costs 3 times that.

    All pairs of the attention are counted, as the reference computes them, whatever a faster implementation skips.
    """
    config = COUNTS[name][0]
    attention = dataclasses.replace(config.attention, implementation="reference")
    config = dataclasses.replace(config, layers="unroll", attention=attention)
    model = Model(config, V, jnp.dtype("float32"))
    objective = NextToken(implementation="reference")
    params = model.abstract()

    def loss(params):
        return objective.loss(model, params, batch(), None)[0][0]

    forward = B * S * sum(config.flops(V, S).values())
    assert matmul_flops(jax.make_jaxpr(model.logits)(params, batch()).jaxpr) == forward
    assert matmul_flops(jax.make_jaxpr(loss)(params).jaxpr) == forward
    trained = matmul_flops(jax.make_jaxpr(jax.value_and_grad(loss))(params).jaxpr)
    assert trained == 3 * forward
    assert trained == B * S * sum(model.flops_per_token(S).values())


def test_flops_by_hand():
    flops = gated(attention=GroupedQuery(heads=3, kv_heads=1, head_width=6)).flops(V, S)
    assert flops == {
        "attention projections": 3 * 2 * (12 * (3 + 2) * 6 + 3 * 6 * 12),
        "attention scores": 3 * 2 * 2 * S * 3 * 6,
        "mlp": 3 * 2 * 3 * 12 * 20,
        "head": 2 * 12 * V,
    }


def test_matrices_cost_two_flops_a_parameter_forward():
    """The rule of thumb 6 N per token, N without tables and vectors, holds for all but scores and head."""
    config = gated()
    flops = Model(config, V, jnp.dtype("float32")).flops_per_token(S)
    kernels = [
        x.size for p, x in tree.flatten(Model(config, V, jnp.dtype("float32")).abstract()).items() if "kernel" in p
    ]
    assert flops["attention projections"] + flops["mlp"] == 6 * sum(kernels)
