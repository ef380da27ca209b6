"""Data configs refuse what cannot mean anything, by name of the field."""

import pytest

from tinyjax.config import from_json, override, to_json
from tinyjax.data.config import DataConfig, Knot, Mixture, TokenizerConfig
from tinyjax.errors import ConfigError

MIXTURE = Mixture(("a", "b"), (Knot(0, (1.0, 0.0)), Knot(10, (1.0, 3.0))))


def test_defaults_are_valid_and_go_through_json():
    for config in (DataConfig(), TokenizerConfig(), DataConfig(corpus=None, mixture=MIXTURE)):
        assert from_json(type(config), to_json(config)) == config


def test_corpora_are_one_or_those_of_the_mixture():
    assert DataConfig(corpus="x").corpora == ("x",)
    assert DataConfig(corpus=None, mixture=MIXTURE).corpora == ("a", "b")


@pytest.mark.parametrize(
    ("build", "path"),
    [
        (lambda: DataConfig(mixture=MIXTURE), "corpus"),
        (lambda: DataConfig(corpus=None), "corpus"),
        (lambda: DataConfig(corpus=" "), "corpus"),
        (lambda: DataConfig(text_field=""), "text_field"),
        (lambda: DataConfig(heldout=0.0), "heldout"),
        (lambda: DataConfig(heldout=1.0), "heldout"),
        (lambda: DataConfig(sequence=0), "sequence"),
        (lambda: DataConfig(batch=0), "batch"),
        (lambda: Knot(-1, (1.0,)), "step"),
        (lambda: Knot(10**9, (1.0,)), "step"),
        (lambda: Knot(0, (1.0, -1.0)), "weights"),
        (lambda: Knot(0, (0.0, 0.0)), "weights"),
        (lambda: Knot(0, ()), "weights"),
        (lambda: Knot(0, (1e308, 1e308)), "weights"),
        (lambda: Mixture((), (Knot(0, (1.0,)),)), "corpora"),
        (lambda: Mixture(("a", "a"), (Knot(0, (1.0, 1.0)),)), "corpora"),
        (lambda: Mixture(("a",), ()), "knots"),
        (lambda: Mixture(("a", "b"), (Knot(0, (1.0,)),)), "knots[0].weights"),
        (lambda: Mixture(("a",), (Knot(5, (1.0,)), Knot(5, (2.0,)))), "knots[1].step"),
        (lambda: TokenizerConfig(vocab_size=259), "vocab_size"),
        (lambda: TokenizerConfig(kind="char", vocab_size=10), "vocab_size"),
        (lambda: TokenizerConfig(kind="byte"), "vocab_size"),
        (lambda: TokenizerConfig(train_bytes=0), "train_bytes"),
    ],
)
def test_bad_values_name_their_field(build, path):
    with pytest.raises(ConfigError) as caught:
        build()
    assert caught.value.path == path
    assert "\n" not in str(caught.value)


def test_a_mixture_is_set_from_the_command_line():
    text = '{"corpora": ["a", "b"], "knots": [{"step": 0, "weights": [1, 2]}]}'
    config = override(DataConfig(), ["corpus=none", f"mixture={text}"])
    assert config.mixture == Mixture(("a", "b"), (Knot(0, (1.0, 2.0)),))


def test_the_size_of_the_byte_vocabulary_is_told():
    with pytest.raises(ConfigError, match="always 259"):
        override(TokenizerConfig(), ["kind=byte"])
