"""Sampling: the distribution it draws from, determinism, and where it stops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import write_corpus
from tinyjax.config import override
from tinyjax.data.prepare import prepare
from tinyjax.decode.sample import choose, continue_rows, samples
from tinyjax.models.model import Model
from tinyjax.train.run_config import Config


def frequencies(logits, temperature, top_p, n=20000):
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32)[None], (n, len(logits)))
    drawn = np.asarray(choose(rows, jax.random.key(0), temperature, top_p))
    return np.bincount(drawn, minlength=len(logits)) / n


P = np.array([0.5, 0.3, 0.15, 0.05])


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (0.0, 1.0, [1, 0, 0, 0]),
        (1.0, 1.0, P),
        (0.5, 1.0, P**2 / np.sum(P**2)),
        (1.0, 0.01, [1, 0, 0, 0]),  # the likeliest always stays
        (1.0, 0.6, [0.625, 0.375, 0, 0]),  # the token that crosses top_p stays
        (1.0, 0.9, np.array([0.5, 0.3, 0.15, 0]) / 0.95),
    ],
)
def test_frequencies(temperature, top_p, expected):
    # 4 standard errors of a frequency over 20000 draws are at most 0.015.
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        found = frequencies(np.log(P)[order], temperature, top_p)
        np.testing.assert_allclose(found, np.asarray(expected, float)[order], atol=0.015)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    given = (f"data.corpus={write_corpus(folder / 'c')}", "data.heldout=0.3", "data.sequence=12", "model.width=16")
    config = override(Config(), (*given, "tokenizer.vocab_size=300", "model.depth=1", "evaluation.samples=2"))
    prepared = prepare(config.data, config.tokenizer, folder / "cache")
    model = Model(config.model, 300, jnp.float32)
    return config, prepared, model, model.init(jax.random.key(1))


def test_greedy_continuation_is_the_argmax_of_each_prefix(setting):
    _, _, model, params = setting
    tokens = np.zeros((1, 7), np.int32)
    tokens[0, :2] = (1, 40)
    logits_of = jax.jit(model.logits)
    out = continue_rows(
        model, params, jnp.asarray(tokens), 2, jax.random.key(0), new=5, temperature=0.0, top_p=1.0, banned=(1,)
    )
    for i in range(2, 7):
        prefix = np.asarray(out)[:, :i]
        batch = {"tokens": prefix, "positions": np.arange(i, dtype=np.int32)[None]}
        logits = np.array(logits_of(params, batch))[0, -1]
        logits[1] = -np.inf
        assert out[0, i] == logits.argmax()


@pytest.mark.parametrize("prompt", ["", "the cat", "a " * 200])
def test_texts(setting, prompt):
    config, prepared, model, params = setting
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, prompt=prompt))
    found = samples(model, params, prepared, config)
    assert len(found) == 2
    assert found == samples(model, params, prepared, config)
    assert all(text.startswith(prompt) for text in found)


def test_no_samples(setting):
    config, prepared, model, params = setting
    none = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, samples=0))
    assert samples(model, params, prepared, none) == []


def test_a_text_ends_with_its_document(setting, monkeypatch):
    config, prepared, model, params = setting
    eos = prepared.tokenizer.eos_id
    word = prepared.tokenizer.encode("the cat")
    rows = [[1, *word, eos, *word], [1, eos, *word, *word]]
    monkeypatch.setattr("tinyjax.decode.sample.continue_rows", lambda *args, **kwargs: np.array(rows))
    assert samples(model, params, prepared, config) == ["the cat", ""]
