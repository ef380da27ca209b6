"""Every component that exists, found through its family: it builds, starts at its deviation and keeps its dtypes."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyjax import tree
from tinyjax.config import from_json, to_json, variants
from tinyjax.errors import ConfigError
from tinyjax.models.attention import GroupedQuery
from tinyjax.models.component import Architecture, Build, FeedForward, Mixer, Norm, Position
from tinyjax.models.feed_forward import ACTIVATIONS, Gated, Plain
from tinyjax.models.init import GPT2, FanIn, Init, Normal, Small
from tinyjax.models.model import Model, compute_dtype
from tinyjax.models.norms import LayerNorm, RMSNorm
from tinyjax.models.position import Rotary
from tinyjax.models.transformer import Transformer

V = 11
FIELDS = {"attention": Mixer, "mlp": FeedForward, "norm": Norm, "position": Position, "init": Init}
ALTERNATIVES = [(field, kind) for field, family in FIELDS.items() for kind in variants(family)]
BATCH = {
    "tokens": np.random.RandomState(0).randint(0, V, (2, 5)).astype(np.int32),
    "positions": np.tile(np.arange(5, dtype=np.int32), (2, 1)),
    "segment_ids": np.ones((2, 5), np.int32),
}


def small(**fields):
    return dataclasses.replace(Transformer(depth=2, width=8, attention=GroupedQuery(heads=2)), **fields)


def initialised(config, vocab_size=V, dtype=jnp.float32, seed=0):
    model = Model(config, vocab_size, jnp.dtype(dtype))
    return model, jax.jit(model.init)(jax.random.key(seed))


def works(config):
    assert from_json(Architecture, json.loads(json.dumps(to_json(config)))) == config
    model = Model(config, V, jnp.dtype("float32"))

    @jax.jit
    def start(key):
        params = model.init(key)
        return params, model.logits(params, BATCH)

    params, logits_BSV = start(jax.random.key(0))
    jax.tree.map(
        lambda x, spec: (x.shape, x.dtype) == (spec.shape, spec.dtype) or pytest.fail("not its spec"),
        params,
        model.abstract(),
    )
    assert logits_BSV.shape == (2, 5, V)
    assert logits_BSV.dtype == jnp.float32
    assert np.isfinite(logits_BSV).all()
    assert np.std(logits_BSV) > 0
    assert Model(config, V, jnp.dtype(jnp.float32)) == model


@pytest.mark.parametrize(("field", "kind"), ALTERNATIVES)
def test_every_component_works_in_a_decoder(field, kind):
    works(small(**{field: variants(FIELDS[field])[kind]()}))


@pytest.mark.parametrize("kind", variants(Architecture))
def test_every_architecture_works(kind):
    cls = variants(Architecture)[kind]
    works(small() if cls is Transformer else cls())


def test_the_families_are_not_empty():
    assert {"gqa", "gated", "plain", "rms", "layer", "rope", "none", "gpt2", "normal", "fan_in", "small"} <= {
        kind for _, kind in ALTERNATIVES
    }


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 4, "kv_heads": 1},
        {"heads": 3, "head_width": 2},
        {"heads": 2, "qk_norm": True, "bias": True},
        {"heads": 2, "softcap": 0.5},
        {"heads": 2, "window": 2},
        {"heads": 4, "kv_heads": 2, "sinks": True},
    ],
)
def test_every_option_of_attention_works(options):
    config = small(attention=GroupedQuery(**options))
    works(config)
    sizes = {name: options[name] for name in ("heads", "kv_heads", "head_width") if name in options}
    plain = small(attention=GroupedQuery(**sizes))
    if options.keys() & {"qk_norm", "softcap", "window", "sinks"}:
        # From equal parameters the option must make a difference.
        model, params = initialised(dataclasses.replace(config, init=FanIn(4.0)))
        other = Model(dataclasses.replace(plain, init=FanIn(4.0)), V, jnp.dtype(jnp.float32))
        difference = jax.jit(lambda p: model.logits(p, BATCH) - other.logits(p, BATCH))(params)
        assert np.abs(difference).max() > 1e-3


def test_a_window_forgets_what_is_further_back():
    """One layer with a window of 2 sees tokens 3 and 4 from position 4; two layers see token 2 as well."""
    changed = BATCH | {"tokens": np.where(np.arange(5) < 3, (BATCH["tokens"] + 1) % V, BATCH["tokens"])}
    for depth, same in ((1, True), (2, False)):
        config = small(depth=depth, attention=GroupedQuery(heads=2, window=2), init=FanIn(4.0))
        model, params = initialised(config)
        logits = jax.jit(model.logits)
        last, other = (np.asarray(logits(params, batch))[:, 4] for batch in (BATCH, changed))
        assert (last == other).all() == same


def test_every_implementation_of_attention_gives_the_same_model():
    config = small(attention=GroupedQuery(heads=2, window=3, sinks=True), init=FanIn(4.0))
    model, params = initialised(config)
    expected = jax.jit(model.logits)(params, BATCH)
    for name in ("reference", "chunked"):
        attention = dataclasses.replace(config.attention, implementation=name)
        other = Model(dataclasses.replace(config, attention=attention), V, jnp.dtype(jnp.float32))
        np.testing.assert_allclose(jax.jit(other.logits)(params, BATCH), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_works(activation):
    works(small(depth=1, mlp=Gated(activation=activation, bias=True)))
    works(small(depth=1, mlp=Plain(activation=activation, hidden=3)))


@pytest.mark.parametrize(
    ("build", "path"),
    [
        (lambda: small(depth=0), "depth"),
        (lambda: small(width=9), "attention.heads"),
        (lambda: small(width=6), "attention.head_width"),
        (lambda: small(dropout=1.0), "dropout"),
        (lambda: small(dropout=-0.1), "dropout"),
        (lambda: small(logit_softcap=0.0), "logit_softcap"),
        (lambda: GroupedQuery(heads=0), "heads"),
        (lambda: GroupedQuery(heads=4, kv_heads=3), "kv_heads"),
        (lambda: GroupedQuery(head_width=0), "head_width"),
        (lambda: GroupedQuery(softcap=-1.0), "softcap"),
        (lambda: GroupedQuery(window=0), "window"),
        (lambda: Gated(hidden=0), "hidden"),
        (lambda: Plain(hidden=-1), "hidden"),
        (lambda: RMSNorm(eps=0.0), "eps"),
        (lambda: LayerNorm(eps=-1.0), "eps"),
        (lambda: Rotary(base=1.0), "base"),
        (lambda: Normal(std=0.0), "std"),
        (lambda: GPT2(std=-1.0), "std"),
        (lambda: FanIn(scale=0.0), "scale"),
    ],
)
def test_bad_values_name_their_field(build, path):
    with pytest.raises(ConfigError) as caught:
        build()
    assert caught.value.path == path
    assert "\n" not in str(caught.value)


DEPTH, WIDTH, HEADS, A, F, VOCAB = 8, 48, 2, 32, 80, 701

# Written from the papers: scheme -> {end of path: deviation}.
OUTWARD = math.sqrt(2 * DEPTH)
DEVIATIONS = {
    Normal(std=0.03): dict.fromkeys(("table", "query/kernel", "out/kernel", "gate/kernel"), 0.03),
    GPT2(std=0.02): {
        "table": 0.02,
        "query/kernel": 0.02,
        "key/kernel": 0.02,
        "value/kernel": 0.02,
        "gate/kernel": 0.02,
        "up/kernel": 0.02,
        "attention/out/kernel": 0.02 / OUTWARD,
        "mlp/out/kernel": 0.02 / OUTWARD,
    },
    FanIn(scale=0.5): {
        "table": 0.5 / math.sqrt(WIDTH),
        "query/kernel": 0.5 / math.sqrt(WIDTH),
        "up/kernel": 0.5 / math.sqrt(WIDTH),
        "attention/out/kernel": 0.5 / math.sqrt(HEADS * A) / OUTWARD,
        "mlp/out/kernel": 0.5 / math.sqrt(F) / OUTWARD,
    },
    Small(): {
        "table": math.sqrt(2 / (5 * WIDTH)),
        "query/kernel": math.sqrt(2 / (5 * WIDTH)),
        "gate/kernel": math.sqrt(2 / (5 * WIDTH)),
        "attention/out/kernel": 2 / (DEPTH * math.sqrt(WIDTH)),
        "mlp/out/kernel": 2 / (DEPTH * math.sqrt(WIDTH)),
    },
}  # fmt: skip


def test_every_scheme_is_measured():
    assert {type(init) for init in DEVIATIONS} == set(variants(Init).values())


@pytest.mark.parametrize("init", DEVIATIONS, ids=lambda init: init.kind)
def test_initial_values_are_normal_with_the_scheme_s_deviation(init):
    config = Transformer(
        depth=DEPTH,
        width=WIDTH,
        attention=GroupedQuery(heads=HEADS, head_width=A, bias=True),
        mlp=Gated(hidden=F),
        init=init,
        tied=False,
    )
    _, params = initialised(config, VOCAB)
    for path, leaf in tree.flatten(params).items():
        if path.endswith("scale"):
            assert (leaf == 1).all()
        elif path.endswith("bias"):
            assert (leaf == 0).all()
        else:
            expected = [std for end, std in DEVIATIONS[init].items() if path.endswith(end)]
            for std in expected:
                z = np.asarray(leaf, np.float64).ravel() / std
                # Five standard errors of a normal sample's deviation and mean; kurtosis tells a uniform one (1.8).
                assert abs(z.std() - 1) < 5 / math.sqrt(2 * z.size), path
                assert abs(z.mean()) < 5 / math.sqrt(z.size), path
                assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / z.size), path
    covered = {p for p in tree.flatten(params) for end in DEVIATIONS[init] if p.endswith(end)}
    assert {"embedding/table", "head/table", "layers/mlp/out/kernel"} <= covered


def test_layers_heads_and_tables_are_drawn_apart():
    _, params = initialised(small(tied=False))
    query_LDHA = params["layers"]["attention"]["query"]["kernel"]
    assert np.abs(np.asarray(query_LDHA[0] - query_LDHA[1])).min() > 0
    assert np.abs(np.asarray(query_LDHA - params["layers"]["attention"]["key"]["kernel"])).min() > 0
    assert np.abs(np.asarray(params["embedding"]["table"] - params["head"]["table"])).min() > 0
    _, again = initialised(small(tied=False))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    _, other = initialised(small(tied=False), seed=1)
    assert (other["embedding"]["table"] != params["embedding"]["table"]).all()


def norm_of(config, dtype):
    """Return the function x -> y of a norm with random scale and bias, and these."""
    module = config.module(Build(width=6, depth=1, dtype=jnp.dtype(dtype), init=GPT2(), dropout=0.0), None)
    random = np.random.RandomState(0)
    params = {"scale": 1 + 0.1 * random.randn(6).astype(np.float32)}
    if config.kind == "layer":
        params["bias"] = random.randn(6).astype(np.float32)
    return lambda x: module.apply({"params": params}, x), params


def by_hand(config, params, x, dtype=np.float64):
    x = np.asarray(x, dtype)
    if config.kind == "layer":
        x = x - x.mean(axis=-1, keepdims=True, dtype=dtype)
    y = x / np.sqrt((x**2).mean(axis=-1, keepdims=True, dtype=dtype) + dtype(config.eps))
    return y * params["scale"].astype(dtype) + params.get("bias", np.zeros(6)).astype(dtype)


@pytest.mark.parametrize("config", [RMSNorm(1e-3), LayerNorm(1e-3)], ids=lambda c: c.kind)
class TestNorms:
    def test_formula_in_both_dtypes(self, config):
        x = np.random.RandomState(1).randn(3, 5, 6)
        for dtype in (jnp.float32, jnp.bfloat16):
            norm, params = norm_of(config, dtype)
            rounded = jnp.asarray(x, dtype)
            y = norm(rounded)
            assert y.dtype == dtype
            expected = by_hand(config, params, np.asarray(rounded, np.float64))
            # One rounding of the result is all that a bfloat16 stream may cost.
            eps = float(jnp.finfo(dtype).eps)
            np.testing.assert_allclose(
                np.asarray(y, np.float64), expected, rtol=(0.5 if eps > 1e-3 else 8) * eps, atol=8e-7
            )

    def test_statistics_in_the_stream_s_dtype_would_be_seen(self, config):
        x = np.asarray(jnp.asarray(20 + np.random.RandomState(1).randn(3, 5, 6), jnp.bfloat16))
        norm, params = norm_of(config, jnp.bfloat16)
        wrong = by_hand(config, params, x, jnp.bfloat16.dtype.type)
        expected = by_hand(config, params, x.astype(np.float64))
        eps = float(jnp.finfo(jnp.bfloat16).eps)
        found = np.asarray(norm(jnp.asarray(x)), np.float64)
        np.testing.assert_allclose(found, expected, rtol=0.5 * eps, atol=1e-5)
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(wrong.astype(np.float64), expected, rtol=0.5 * eps, atol=1e-5)

    def test_a_row_of_zeros_is_finite_with_its_gradient(self, config):
        norm, _ = norm_of(config, jnp.float32)
        assert np.isfinite(norm(jnp.zeros((1, 1, 6)))).all()
        assert np.isfinite(jax.grad(lambda x: jnp.sum(norm(x)))(jnp.zeros((1, 1, 6)))).all()


def test_bfloat16_is_the_stream_only():
    config = small(tied=False, attention=GroupedQuery(heads=2, qk_norm=True), norm=LayerNorm(), init=FanIn())
    model, params = initialised(config, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    x_BSD, c_VD = jax.jit(model.hidden)(params, BATCH)
    assert x_BSD.dtype == c_VD.dtype == jnp.bfloat16
    logits_BSV = jax.jit(model.logits)(params, BATCH)
    assert logits_BSV.dtype == jnp.float32
    # Logits rounded to bfloat16 on the way would lie on its grid.
    assert (logits_BSV != logits_BSV.astype(jnp.bfloat16).astype(jnp.float32)).any()
    exact = np.einsum("bsd,vd->bsv", *(np.asarray(x, np.float64) for x in (x_BSD, c_VD)))
    np.testing.assert_allclose(logits_BSV, exact, rtol=1e-5, atol=1e-5)
    wide = jax.jit(Model(config, V, jnp.dtype(jnp.float32)).logits)(params, BATCH)
    np.testing.assert_allclose(logits_BSV, wide, atol=20 * float(jnp.finfo(jnp.bfloat16).eps))


def test_bfloat16_gradients_reach_float32_parameters():
    model, params = initialised(small(), dtype=jnp.bfloat16)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(model.logits(p, BATCH)))))(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("policy", "backend", "dtype"),
    [
        ("auto", "cpu", "float32"),
        ("auto", "tpu", "bfloat16"),
        ("auto", "gpu", "bfloat16"),
        ("bfloat16", "cpu", "bfloat16"),
        ("float32", "tpu", "float32"),
    ],
)
def test_the_dtype_follows_policy_and_backend(policy, backend, dtype):
    assert compute_dtype(policy, backend) == jnp.dtype(dtype)


def test_rotary_angles_are_those_of_the_paper():
    """Pair i of a head turns by position * base^(-2i / A); the pairs are (i, i + A / 2)."""
    rotary, a = Rotary(base=100.0), 6
    positions_BS = np.array([[0, 1, 7, 1000]], np.int32)
    x_BSHA = np.random.RandomState(0).randn(1, 4, 2, a).astype(np.float32)
    found = np.asarray(rotary.rotate(jnp.asarray(x_BSHA), rotary.tables(jnp.asarray(positions_BS), a)))
    z_BSHI = x_BSHA[..., : a // 2] + 1j * x_BSHA[..., a // 2 :]
    angle_SI = positions_BS[0][:, None] * 100.0 ** (-2 * np.arange(a // 2) / a)
    turned = z_BSHI * np.exp(1j * angle_SI)[None, :, None]
    # A float32 angle near 1000 is known to 6e-5.
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], axis=-1), atol=3e-4)
