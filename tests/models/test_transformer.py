"""What a decoder must be whatever its components: causal, blind to neighbours, the same in every form of its stack."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyjax import tree
from tinyjax.models import layers
from tinyjax.models.attention import GroupedQuery
from tinyjax.models.feed_forward import Gated, Plain
from tinyjax.models.init import FanIn
from tinyjax.models.model import Model
from tinyjax.models.norms import LayerNorm
from tinyjax.models.transformer import Transformer

V = 37
# Large initial values, so that attention is far from uniform and an error is far above rounding.
CONFIG = Transformer(
    depth=2,
    width=12,
    attention=GroupedQuery(heads=4, kv_heads=2, head_width=6, qk_norm=True, softcap=5.0),
    mlp=Gated(hidden=20),
    init=FanIn(scale=2.0),
    tied=False,
    logit_softcap=8.0,
)
CONFIGS = {
    "everything on": CONFIG,
    "defaults, one kv head, tied": Transformer(
        depth=2, width=16, attention=GroupedQuery(heads=2, kv_heads=1), init=FanIn(scale=2.0)
    ),
    "biases and LayerNorm": Transformer(
        depth=3,
        width=8,
        attention=GroupedQuery(heads=1, bias=True),
        mlp=Plain(bias=True, activation="relu2"),
        norm=LayerNorm(),
        init=FanIn(scale=2.0),
        layers="unroll",
    ),
}


def model_of(config=CONFIG, vocab_size=V, dtype=jnp.float32):
    return Model(config, vocab_size, jnp.dtype(dtype))


@functools.cache
def params_of(config, vocab_size=V):
    """Return parameters in which scales and biases, too, are random, so that none may be forgotten."""
    params = jax.jit(model_of(config, vocab_size).init)(jax.random.key(0))
    random = np.random.RandomState(0)
    noise = tree.map_named(lambda _, x: 0.1 * random.randn(*x.shape).astype(np.float32), params)
    return tree.map_named(lambda path, x, n: x if path.endswith(("kernel", "table")) else x + n, params, noise)


def batch_of(rows, s, v=V, seed=0):
    tokens_BS = np.random.RandomState(seed).randint(0, v, (rows, s)).astype(np.int32)
    positions_BS = np.tile(np.arange(s, dtype=np.int32), (rows, 1))
    return {"tokens": tokens_BS, "positions": positions_BS, "segment_ids": np.ones((rows, s), np.int32)}


@functools.cache
def compiled(config):
    return jax.jit(model_of(config).logits)


@functools.cache
def hidden_of(config):
    return jax.jit(model_of(config).hidden)


def logits_of(config, batch, params=None):
    return np.asarray(compiled(config)(params_of(config) if params is None else params, batch))


def close(a, b, scale=8.0):
    """Compare to float32 rounding: a few dozen dependent operations on values of size `scale`."""
    np.testing.assert_allclose(a, b, rtol=0, atol=100 * scale * float(jnp.finfo(jnp.float32).eps))


@pytest.mark.parametrize("name", ["everything on", "biases and LayerNorm"])
def test_no_gradient_flows_from_a_token_to_those_before_it(name):
    """Tokens are all different, so that the gradient of the embedding table's row is that of one place."""
    config, s = dataclasses.replace(CONFIGS[name], tied=False), 5
    batch = {k: x[:1] for k, x in batch_of(1, s).items()}
    batch["tokens"] = np.random.RandomState(0).permutation(V)[None, :s].astype(np.int32)

    def sums(table_VD):
        params = params_of(config) | {"embedding": {"table": table_VD}}
        x_BSD, _ = model_of(config).hidden(params, batch)
        return jnp.sum(x_BSD * jnp.arange(1.0, 1 + config.width)[None, None], axis=(0, 2))

    jacobian_SVD = jax.jit(jax.jacrev(sums))(params_of(config)["embedding"]["table"])
    reach_ST = np.abs(np.asarray(jacobian_SVD)).sum(axis=-1)[:, batch["tokens"][0]]
    np.testing.assert_array_equal(reach_ST != 0, np.tril(np.ones((s, s), bool)))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_does_not_depend_on_its_place_or_neighbours(name):
    batch = batch_of(5, 7)
    order = np.array([3, 1, 4, 0, 2])
    close(
        logits_of(CONFIGS[name], batch)[order],
        logits_of(CONFIGS[name], {k: x[order] for k, x in batch.items()}),
    )
    other = batch_of(5, 7, seed=1)
    other["tokens"][2] = batch["tokens"][2]
    close(logits_of(CONFIGS[name], batch)[2], logits_of(CONFIGS[name], other)[2])


def packed(lengths):
    """Return documents of these lengths as rows of one each, and as one row of all, with padding behind."""
    alone = [batch_of(1, n, seed=n) for n in lengths]
    row = {k: np.concatenate([d[k] for d in alone], axis=1) for k in ("tokens", "positions")}
    row["segment_ids"] = np.repeat(np.arange(1, 1 + len(lengths)), lengths)[None].astype(np.int32)
    return alone, {k: np.pad(x, ((0, 0), (0, 2))) for k, x in row.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_are_as_if_alone(name):
    alone, row = packed([1, 4, 6])
    together = logits_of(CONFIGS[name], row)[0]
    starts = np.cumsum([0, 1, 4])
    for document, start in zip(alone, starts, strict=True):
        length = document["tokens"].shape[1]
        close(together[start : start + length], logits_of(CONFIGS[name], document)[0])


@pytest.mark.parametrize("forgotten", ["segment_ids", "positions"])
def test_packing_without_segments_or_with_wrong_positions_is_seen(forgotten):
    alone, row = packed([5, 6])
    if forgotten == "segment_ids":
        row["segment_ids"] = np.ones_like(row["segment_ids"])
    else:
        row["positions"] = np.arange(13, dtype=np.int32)[None] ** 2
    together = logits_of(CONFIG, row)[0]
    assert np.abs(together[5:11] - logits_of(CONFIG, alone[1])[0]).max() > 0.01


def test_only_distances_between_positions_count():
    batch = batch_of(2, 9)
    close(logits_of(CONFIG, batch), logits_of(CONFIG, batch | {"positions": batch["positions"] + 1000}), scale=200.0)


def test_no_segments_are_one_segment():
    batch = batch_of(2, 9)
    without = {k: x for k, x in batch.items() if k != "segment_ids"}
    close(logits_of(CONFIG, batch), logits_of(CONFIG, without))


@functools.cache
def gradient_of(config):
    def loss(params, batch):
        x_BSD, c_VD = model_of(config).hidden(params, batch)
        logits_BSV = jnp.einsum("bsd,vd->bsv", x_BSD, c_VD)
        return -jnp.mean(jax.nn.log_softmax(logits_BSV)[:, :, 3]), logits_BSV

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("name", ["everything on", "biases and LayerNorm"])
def test_scanned_and_unrolled_are_one_model(name):
    scanned = dataclasses.replace(CONFIGS[name], layers="scan")
    unrolled = dataclasses.replace(CONFIGS[name], layers="unroll")
    first, second = (
        jax.tree.map(np.asarray, jax.jit(model_of(c).init)(jax.random.key(5))) for c in (scanned, unrolled)
    )
    assert layers.is_stacked(first)
    assert not layers.is_stacked(second)
    assert tree.count(first) == tree.count(second)
    jax.tree.map(np.testing.assert_array_equal, layers.stack(second), first)
    jax.tree.map(np.testing.assert_array_equal, layers.unstack(first), second)
    (values, grads), (values_too, grads_too) = (
        gradient_of(c)(p, batch_of(2, 7)) for c, p in ((scanned, first), (unrolled, second))
    )
    jax.tree.map(close, values, values_too)
    jax.tree.map(close, grads, layers.stack(jax.tree.map(np.asarray, grads_too)))


def test_ten_layers_and_more_stay_in_order():
    """As text, layer 10 comes before layer 2."""
    params = {"layers": {"mlp": {"kernel": np.arange(22.0).reshape(11, 2)}}, "norm": {"scale": np.ones(2)}}
    apart = layers.unstack(params)
    assert (apart["layers"]["10"]["mlp"]["kernel"] == [20, 21]).all()
    jax.tree.map(np.testing.assert_array_equal, layers.stack(apart), params)


@pytest.mark.parametrize("layers_as", ["scan", "unroll"])
def test_recomputing_changes_nothing(layers_as):
    config = dataclasses.replace(CONFIG, layers=layers_as)
    expected = gradient_of(config)(params_of(config), batch_of(2, 7))
    for remat in ("full", "dots"):
        found = gradient_of(dataclasses.replace(config, remat=remat))(params_of(config), batch_of(2, 7))
        jax.tree.map(close, found, expected)


@pytest.mark.parametrize("layers_as", ["scan", "unroll"])
def test_recomputing_does_recompute(layers_as):
    """The products of the traced gradient: most when only inputs are kept, fewer with the projections kept."""

    def products(remat):
        model = model_of(dataclasses.replace(CONFIG, layers=layers_as, remat=remat))

        def loss(params):
            return jnp.sum(model.hidden(params, batch_of(2, 7))[0])

        return str(jax.make_jaxpr(jax.grad(loss))(model.abstract())).count("dot_general")

    assert products("none") < products("dots") < products("full")


class TestDropout:
    config = dataclasses.replace(CONFIG, dropout=0.25)

    def hidden(self, key):
        return np.asarray(hidden_of(self.config)(params_of(CONFIG), batch_of(2, 7), key)[0])

    def test_is_off_in_evaluation(self):
        close(self.hidden(None), hidden_of(CONFIG)(params_of(CONFIG), batch_of(2, 7))[0])
        close(logits_of(self.config, batch_of(2, 7), params_of(CONFIG)), logits_of(CONFIG, batch_of(2, 7)))

    def test_is_on_and_depends_on_nothing_but_the_key(self):
        first, again, other = (self.hidden(jax.random.key(k)) for k in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert np.abs(first - other).max() > 0.01
        assert np.abs(first - self.hidden(None)).max() > 0.01

    @pytest.mark.parametrize("layers_as", ["scan", "unroll"])
    def test_each_write_is_dropped_by_itself_with_the_share_asked_for(self, layers_as):
        """A dropped constant 1 has variance p / (1 - p); n writes that shared a mask would have more than n times it.

        With a final eps far above any variance, LayerNorm is a subtraction of the mean and a division by 1000.
        """
        width, rows = 64, 8 * 16
        config = Transformer(
            depth=2,
            width=width,
            attention=GroupedQuery(heads=1, bias=True),
            mlp=Plain(hidden=1, bias=True),
            norm=LayerNorm(eps=1e6),
            dropout=0.25,
            layers=layers_as,
        )
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), model_of(config).abstract())
        for end, writes in (("embedding/table", 1), ("out/bias", 4)):
            params = tree.map_named(lambda path, x, end=end: x + np.float32(path.endswith(end)), zeros)
            params["norm"]["scale"] += 1000
            y_ND = np.asarray(hidden_of(config)(params, batch_of(8, 16), jax.random.key(0))[0]).reshape(rows, width)
            variance = np.var(y_ND, axis=1, ddof=1).mean()
            assert variance == pytest.approx(writes * 0.25 / 0.75, rel=0.06), end


@pytest.mark.parametrize("v", [1, 2, 259, 50257])
def test_odd_vocabularies_and_one_token(v):
    batch = batch_of(1, 1, v=v)
    for tied in (True, False):
        config = Transformer(depth=1, width=8, attention=GroupedQuery(heads=1, head_width=6), tied=tied)
        model = model_of(config, v)
        logits_BSV = jax.jit(lambda key, model=model: model.logits(model.init(key), batch))(jax.random.key(0))
        assert logits_BSV.shape == (1, 1, v)
        assert np.isfinite(logits_BSV).all()


def test_a_tied_head_is_the_table():
    config = CONFIGS["defaults, one kv head, tied"]
    assert "head" not in params_of(config)
    x_BSD, c_VD = hidden_of(config)(params_of(config), batch_of(2, 3))
    np.testing.assert_array_equal(c_VD, params_of(config)["embedding"]["table"])
    expected = np.einsum("bsd,vd->bsv", x_BSD, c_VD)
    close(logits_of(config, batch_of(2, 3)), expected)


def test_logits_are_capped_and_hidden_states_are_not():
    x_BSD, c_VD = hidden_of(CONFIG)(params_of(CONFIG), batch_of(2, 3))
    raw_BSV = np.einsum("bsd,vd->bsv", x_BSD, c_VD)
    assert np.abs(raw_BSV).max() > 4, "a cap of 8 would do too little to be seen"
    close(logits_of(CONFIG, batch_of(2, 3)), 8 * np.tanh(raw_BSV / 8))


def test_logical_axes_fit_the_parameters():
    for config in (CONFIG, dataclasses.replace(CONFIG, layers="unroll")):
        axes, shapes = (tree.flatten(x) for x in (model_of(config).logical_axes(), model_of(config).abstract()))
        assert axes.keys() == shapes.keys()
        assert {path: len(names) for path, names in axes.items()} == {p: len(x.shape) for p, x in shapes.items()}
        stacked = {path for path, names in axes.items() if "layers" in names}
        assert stacked == ({p for p in axes if p.startswith("layers/")} if config.layers == "scan" else set())
