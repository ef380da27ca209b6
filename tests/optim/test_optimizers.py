"""AdamW step by step in NumPy; Muon's updates are orthogonal matrix by matrix."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tinyjax import tree
from tinyjax.config import variants
from tinyjax.errors import ConfigError, UserError
from tinyjax.models import layers
from tinyjax.models.attention import GroupedQuery
from tinyjax.models.feed_forward import Gated
from tinyjax.models.model import Model
from tinyjax.models.transformer import Transformer
from tinyjax.optim.optimizers import AdamW, Muon, Optimizer

ARCHITECTURE = Transformer(
    depth=3,
    width=16,
    attention=GroupedQuery(heads=2, kv_heads=1, head_width=6, bias=True),
    mlp=Gated(hidden=24),
    tied=False,
)
MODELS = {
    form: Model(dataclasses.replace(ARCHITECTURE, layers=form), 11, jnp.dtype("float32")) for form in ("scan", "unroll")
}


def random_like(spec, seed, scale=1.0):
    random = np.random.RandomState(seed)
    return jax.tree.map(lambda x: (scale * random.randn(*x.shape)).astype(np.float32), spec)


def updates(optimizer, params, gradients, form="scan"):
    """Return the update for each gradient in turn; the parameters take it with a rate of 0.1."""
    model = MODELS[form]
    transform = optimizer.transform(model.abstract(), model.logical_axes())

    @jax.jit
    def step(state, params, grads):
        update, state = transform.update(grads, state, params)
        return update, state, jax.tree.map(lambda p, u: p + 0.1 * u, params, update)

    state, found = transform.init(params), []
    for grads in gradients:
        update, state, params = step(state, params, grads)
        found.append(jax.tree.map(np.asarray, update))
    return found


def adamw_by_hand(c, params, gradients, decayed, nesterov=False):
    """Return the updates of AdamW (algorithm 2 of the paper) for a rate of 1, in float64, with global clipping before.

    With `nesterov`, the mean looks one step ahead (Dozat 2016).
    """
    p = {k: x.astype(np.float64) for k, x in tree.flatten(params).items()}
    m, v = ({k: np.zeros_like(x) for k, x in p.items()} for _ in range(2))
    found = []
    for t, grads in enumerate(gradients, 1):
        g = {k: x.astype(np.float64) for k, x in tree.flatten(grads).items()}
        norm = math.sqrt(sum((x**2).sum() for x in g.values()))
        if c.clip is not None and norm > c.clip:
            g = {k: x * c.clip / norm for k, x in g.items()}
        update = {}
        for k in p:
            m[k] = c.b1 * m[k] + (1 - c.b1) * g[k]
            v[k] = c.b2 * v[k] + (1 - c.b2) * g[k] ** 2
            mean = m[k] / (1 - c.b1**t)
            if nesterov:
                mean = c.b1 * m[k] / (1 - c.b1 ** (t + 1)) + (1 - c.b1) * g[k] / (1 - c.b1**t)
            step = mean / (np.sqrt(v[k] / (1 - c.b2**t)) + c.eps)
            update[k] = -step - (c.weight_decay * p[k] if decayed(k) else 0)
            p[k] = p[k] + 0.1 * update[k]
        found.append(update)
    return found


def compare(found, expected):
    for a, b in zip(found, expected, strict=True):
        a = tree.flatten(a)
        assert a.keys() == b.keys()
        for path in b:
            np.testing.assert_allclose(a[path], b[path], rtol=2e-5, atol=2e-6, err_msg=path)


# A large eps makes the order of eps, root and correction visible.
ADAMW = AdamW(b1=0.8, b2=0.9, eps=0.05, weight_decay=0.3, clip=None)


@pytest.mark.parametrize("form", MODELS)
@pytest.mark.parametrize("clip", [None, 1.0, 1e4])
def test_adamw_is_that_of_the_paper(form, clip):
    config = dataclasses.replace(ADAMW, clip=clip)
    spec = MODELS[form].abstract()
    params, gradients = random_like(spec, 0), [random_like(spec, 1), random_like(spec, 2, 0.1)]
    expected = adamw_by_hand(config, params, gradients, lambda path: path.endswith("kernel"))
    compare(updates(config, params, gradients, form), expected)


@pytest.mark.parametrize(
    ("config", "decayed"),
    [
        (dataclasses.replace(ADAMW, b2=0.91), lambda path: path.endswith("kernel")),
        (dataclasses.replace(ADAMW, clip=1.0), lambda path: path.endswith("kernel")),
        (dataclasses.replace(ADAMW, eps=0.06), lambda path: path.endswith("kernel")),
        (ADAMW, lambda path: True),
        (ADAMW, lambda path: path.endswith(("kernel", "table"))),
        (ADAMW, lambda path: False),
    ],
    ids=["b2", "clip", "eps", "decay of all", "decay of tables", "no decay"],
)
def test_another_rule_is_seen(config, decayed):
    spec = MODELS["scan"].abstract()
    params, gradients = random_like(spec, 0), [random_like(spec, 1), random_like(spec, 2, 0.1)]
    with pytest.raises(AssertionError):
        compare(updates(ADAMW, params, gradients), adamw_by_hand(config, params, gradients, decayed))


def test_decay_follows_the_patterns():
    config = dataclasses.replace(ADAMW, decay_paths=("^embedding/", "out/kernel$"))
    params = random_like(MODELS["scan"].abstract(), 0)
    zeros = jax.tree.map(np.zeros_like, params)
    (update,) = updates(config, params, [zeros])
    moved = {path for path, x in tree.flatten(update).items() if x.any()}
    assert moved == {"embedding/table", "layers/attention/out/kernel", "layers/mlp/out/kernel"}


def test_a_pattern_that_matches_nothing_is_refused():
    model = MODELS["scan"]
    with pytest.raises(UserError, match=r"optimizer\.decay_paths: 'kernels\$' matches no parameter"):
        AdamW(decay_paths=("kernel$", "kernels$")).transform(model.abstract(), model.logical_axes())


MUON = Muon(momentum=0.9, rms=0.2, weight_decay=0.0, clip=None)


def matrices(path, kernel, stacked):
    """Return the matrices [rows, columns] that a kernel is: heads together, layers apart."""
    kernels = kernel if stacked else kernel[None]
    rows = 2 if path.endswith("attention/out/kernel") else 1
    return kernels.reshape(len(kernels), math.prod(kernels.shape[1 : 1 + rows]), -1)


@functools.cache
def muon_updates(form):
    """Return (params, gradients, updates) of one step, equal for both forms of the stack."""
    spec = MODELS["scan"].abstract()
    params, grads = random_like(spec, 0), random_like(spec, 1)
    if form == "unroll":
        params, grads = layers.unstack(params), layers.unstack(grads)
    (update,) = updates(MUON, params, [grads], form)
    return params, grads, update


@pytest.mark.parametrize("form", MODELS)
def test_muon_s_updates_are_orthogonal_with_the_rms_asked_for(form):
    """Five Newton-Schulz steps leave singular values within 0.3 of 1; times rms sqrt(longer side)."""
    _, grads, update = muon_updates(form)
    kernels = {p: x for p, x in tree.flatten(update).items() if p.endswith("kernel")}
    assert len(kernels) == 7 * (1 if form == "scan" else 3)
    for path, kernel in kernels.items():
        gradients = matrices(path, tree.flatten(grads)[path], form == "scan")
        for matrix, gradient in zip(matrices(path, kernel, form == "scan"), gradients, strict=True):
            values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * math.sqrt(max(matrix.shape)))
            assert values.min() > 0.6, path
            assert values.max() < 1.3, path
            # The direction is that of the gradient's polar factor, downhill.
            u, _, vt = np.linalg.svd(gradient.astype(np.float64), full_matrices=False)
            along = -(matrix * (u @ vt)).sum() / np.linalg.norm(matrix) / math.sqrt(min(matrix.shape))
            assert along > 0.95, path


@pytest.mark.parametrize("wrong", ["each head alone", "layers as one"])
def test_matrices_cut_otherwise_have_other_updates(wrong):
    """What orthogonality alone cannot tell: heads alone, or layers as one matrix, give another direction."""
    _, grads, update = muon_updates("scan")
    gradient_LDHA, kernel_LDHA = (x["layers"]["attention"]["query"]["kernel"] for x in (grads, update))

    def along(cut):
        u, _, vt = np.linalg.svd(cut(gradient_LDHA).astype(np.float64), full_matrices=False)
        matrices = cut(kernel_LDHA)
        return -(matrices * (u @ vt)).sum() / np.linalg.norm(matrices) / np.linalg.norm(u @ vt)

    right = along(lambda x: x.reshape(3, 16, 12))
    wrongly = along(
        (lambda x: x.transpose(0, 2, 1, 3).reshape(6, 16, 6))
        if wrong == "each head alone"
        else (lambda x: x.reshape(1, 48, 12))
    )
    assert right > 0.97
    assert wrongly < right - 0.01


def test_muon_treats_stacked_layers_as_it_treats_them_alone():
    stacked, unrolled = muon_updates("scan")[2], muon_updates("unroll")[2]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), stacked, layers.stack(unrolled))


def test_muon_leaves_tables_and_vectors_to_nesterov_s_adam():
    params, grads, update = muon_updates("scan")
    config = AdamW(b1=MUON.b1, b2=MUON.b2, eps=MUON.eps, weight_decay=0.0, clip=None)
    (expected,) = adamw_by_hand(config, params, [grads], lambda path: False, nesterov=True)
    found = tree.flatten(update)
    for path in found:
        if not path.endswith("kernel"):
            np.testing.assert_allclose(found[path], expected[path], rtol=2e-5, atol=2e-6, err_msg=path)


def test_muon_decays_kernels_only():
    params, grads, plain = muon_updates("scan")
    (update,) = updates(dataclasses.replace(MUON, weight_decay=0.3), params, [grads])
    for path, x in tree.flatten(jax.tree.map(lambda a, b: a - b, update, plain)).items():
        expected = -0.3 * tree.flatten(params)[path] if path.endswith("kernel") else 0.0
        np.testing.assert_allclose(x, np.broadcast_to(expected, x.shape), atol=1e-5, err_msg=path)


def test_muon_s_momentum_is_nesterov_s():
    """Second step: Newton-Schulz of b m + (1 - b) g with m = b m + (1 - b) g, up to a factor that cancels."""
    spec = MODELS["scan"].abstract()
    params, first, second = (random_like(spec, seed) for seed in range(3))
    _, update = updates(MUON, params, [first, second])
    b = MUON.momentum
    mean = jax.tree.map(lambda g: (1 - b) * g, first)
    mean = jax.tree.map(lambda m, g: b * m + (1 - b) * g, mean, second)
    corrected = jax.tree.map(lambda m, g: b * m / (1 - b**3) + (1 - b) * g / (1 - b**2), mean, second)
    path = "layers/mlp/gate/kernel"
    for matrix, gradient in zip(tree.get(update, path), tree.get(corrected, path), strict=True):
        u, _, vt = np.linalg.svd(gradient.astype(np.float64), full_matrices=False)
        along = -(matrix * (u @ vt)).sum() / np.linalg.norm(matrix) / math.sqrt(min(matrix.shape))
        assert along > 0.95


@pytest.mark.parametrize("kind", variants(Optimizer))
@pytest.mark.parametrize("form", MODELS)
def test_every_optimizer_descends_and_clips(kind, form):
    """A contract for all: the update has the parameters' structure, points downhill and forgets the gradient's size
    when it is clipped."""
    config = variants(Optimizer)[kind]()
    assert config.clip == 1.0
    spec = MODELS[form].abstract()
    params, grads = random_like(spec, 0, 1e-3), random_like(spec, 1)
    (update,) = updates(config, params, [grads], form)
    tree.check_same_structure(params, update, kind)
    assert optax.tree.vdot(update, grads) < 0
    (larger,) = updates(config, params, [jax.tree.map(lambda g: 100 * g, grads)], form)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), update, larger)


@pytest.mark.parametrize("cls", variants(Optimizer).values(), ids=lambda c: c.kind)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", -1.0),
        ("eps", 0.0),
        ("weight_decay", -0.1),
        ("clip", 0.0),
        ("b1", 1.0),
        ("b2", -0.1),
        ("momentum", 1.0),
        ("rms", 0.0),
    ],
)
def test_bad_values_name_their_field(cls, field, value):
    if field not in cls.__dataclass_fields__:
        pytest.skip(f"{cls.kind} has no {field}")
    with pytest.raises(ConfigError) as caught:
        cls(**{field: value})
    assert caught.value.path == field
