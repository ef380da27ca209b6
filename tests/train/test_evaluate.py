"""Held-out losses: against a plain computation, whatever the batch size; errors against resampling."""

import math

import jax
import numpy as np
import pytest

from tests.support import write_corpus
from tinyjax import sharding
from tinyjax.data.config import DataConfig, TokenizerConfig
from tinyjax.data.prepare import prepare
from tinyjax.models.attention import GroupedQuery
from tinyjax.models.model import Model
from tinyjax.models.transformer import Transformer
from tinyjax.train.evaluate import Evaluator, ratio_error

SEQUENCE = 24


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    data = DataConfig(corpus=str(write_corpus(folder / "corpus")), heldout=0.4, sequence=SEQUENCE, batch=4)
    return prepare(data, TokenizerConfig(vocab_size=300), folder / "cache")


@pytest.fixture(scope="module")
def model():
    return Model(Transformer(depth=1, width=16, attention=GroupedQuery(heads=2)), 300, np.float32)


def evaluate(model, params, prepared, batch, positions=None):
    data = DataConfig(corpus="unused", sequence=SEQUENCE, batch=batch)
    mesh = sharding.data_mesh(sharding.devices_for(batch, jax.devices()))
    return Evaluator(model, prepared.corpora, data, positions, mesh).evaluate(params)[0]


def by_hand(model, params, prepared):
    """Return nats and bytes per document, each piece of a document alone in its row."""
    split = prepared.corpora[0].heldout
    nats = np.zeros(split.documents)
    logits_of = jax.jit(model.logits)
    for d in range(split.documents):
        tokens = np.asarray(split.tokens[split.offsets[d] : split.offsets[d + 1]], np.int32)
        for start in range(0, len(tokens) - 1, SEQUENCE):
            piece = tokens[start : start + SEQUENCE + 1]
            inputs = np.zeros((1, SEQUENCE), np.int32)
            inputs[0, : len(piece) - 1] = piece[:-1]
            batch = {"tokens": inputs, "positions": np.arange(SEQUENCE, dtype=np.int32)[None]}
            logits = np.asarray(logits_of(params, batch), np.float64)[0, : len(piece) - 1]
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            nats[d] -= log_p[np.arange(len(piece) - 1), piece[1:]].sum()
    return nats, np.asarray(split.byte_counts, np.float64)


def test_equals_a_plain_computation_at_any_batch_size(model, prepared):
    params = model.init(jax.random.key(0))
    nats, size = by_hand(model, params, prepared)
    for batch in (1, 3, 64):
        found = evaluate(model, params, prepared, batch)
        assert found.bytes == size.sum()
        assert found.nats_per_token == pytest.approx(nats.sum() / found.tokens, rel=1e-5)
        assert found.bits_per_byte == pytest.approx(nats.sum() / math.log(2) / size.sum(), rel=1e-5)
        assert found.bits_per_byte_error == pytest.approx(ratio_error(nats / math.log(2), size), rel=1e-4)


def test_bytes_are_those_of_the_text(model, prepared):
    corpus = prepared.corpora[0]
    found = evaluate(model, model.init(jax.random.key(0)), prepared, 4)
    assert found.bytes == corpus.heldout.text.stat().st_size
    decoded = b"".join(
        prepared.tokenizer.decode_bytes(corpus.heldout.tokens[a + 1 : b - 1])
        for a, b in zip(corpus.heldout.offsets[:-1], corpus.heldout.offsets[1:], strict=True)
    )
    assert decoded == corpus.heldout.text.read_bytes()


def test_a_uniform_model_needs_log_v(model, prepared):
    params = jax.tree.map(lambda x: x * 0, model.init(jax.random.key(0)))
    assert evaluate(model, params, prepared, 4).nats_per_token == pytest.approx(math.log(300), rel=1e-6)


def test_the_selection_has_an_identity(model, prepared):
    params = model.init(jax.random.key(0))
    every, some = evaluate(model, params, prepared, 4), evaluate(model, params, prepared, 4, positions=50)
    assert some.documents < every.documents
    assert some.hash != every.hash
    assert evaluate(model, params, prepared, 7).hash == every.hash


def test_ratio_error_against_the_bootstrap():
    chance = np.random.default_rng(0)
    size = chance.lognormal(5, 1.2, 200)
    bits = size * chance.normal(2.0, 0.4, 200)
    picks = chance.integers(0, 200, (4000, 200))
    resampled = bits[picks].sum(1) / size[picks].sum(1)
    assert ratio_error(bits, size) == pytest.approx(resampled.std(), rel=0.1)
    # The plausible wrong form: the error of a plain mean of per-document ratios.
    wrong = (bits / size).std(ddof=1) / math.sqrt(200)
    assert wrong != pytest.approx(resampled.std(), rel=0.1)
    assert math.isnan(ratio_error(bits[:1], size[:1]))
