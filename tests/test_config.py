"""Configs: JSON both ways, typed overrides by path, one identity, a word on every field."""

import dataclasses
import inspect
import json
import math
import re
import typing
from typing import ClassVar, Literal

import pytest

from tinyjax import config as configs
from tinyjax.config import Variant, differences, from_json, identity, override, to_json, variants
from tinyjax.errors import ConfigError, UserError
from tinyjax.models.attention import GroupedQuery
from tinyjax.models.feed_forward import Gated
from tinyjax.models.norms import LayerNorm, RMSNorm
from tinyjax.models.transformer import Transformer
from tinyjax.optim.optimizers import AdamW, Muon
from tinyjax.optim.schedules import Constant, Cosine
from tinyjax.train.run_config import Config


def types_in(kind):
    """Return the classes named in a type: members of unions, items of tuples, alternatives of families."""
    if isinstance(kind, type) and issubclass(kind, Variant) and not dataclasses.is_dataclass(kind):
        return list(variants(kind).values())
    if typing.get_args(kind) and typing.get_origin(kind) is not Literal:
        return [found for arg in typing.get_args(kind) if arg is not Ellipsis for found in types_in(arg)]
    return [kind]


def dataclasses_below(cls):
    """Return every config class that can occur in a run, by a walk over fields and variants."""
    found, queue = [], [cls]
    while queue:
        cls = queue.pop()
        if dataclasses.is_dataclass(cls) and cls not in found:
            found.append(cls)
            queue += [c for kind in configs.field_types(cls).values() for c in types_in(kind)]
    return found


def families_below(cls):
    """Return [(path, family)] of the variant fields that a default config holds."""
    found = []

    def walk(value, path):
        for name, kind in configs.field_types(type(value)).items():
            where, held = f"{path}{name}", getattr(value, name)
            if isinstance(held, Variant):
                found.append((where, kind))
            if dataclasses.is_dataclass(held):
                walk(held, where + ".")

    walk(cls(), "")
    return found


CLASSES = dataclasses_below(Config)
ALTERNATIVES = [(path, kind) for path, family in families_below(Config) for kind in variants(family)]


def test_the_walk_finds_what_a_run_is_made_of():
    assert {Config, Transformer, RMSNorm, LayerNorm, GroupedQuery, AdamW, Muon, Cosine} <= set(CLASSES)
    assert ("model.norm", "layer") in ALTERNATIVES
    assert ("optimizer", "muon") in ALTERNATIVES


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_classes_are_frozen_documented_and_hashable(cls):
    assert cls.__dataclass_params__.frozen
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}("), "the docstring is the one dataclasses makes up"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_every_field_says_what_it_is(cls):
    """A comment on its line; a field that holds another config is documented by that config."""
    source = inspect.getsource(cls)
    for name, kind in configs.field_types(cls).items():
        if any(dataclasses.is_dataclass(found) for found in types_in(kind)) and type(None) not in types_in(kind):
            continue
        declared = re.search(rf"^    {name}: .*?(?=^    \w|^$|\Z)", source, re.MULTILINE | re.DOTALL)
        assert declared, f"{cls.__name__}.{name} is not declared in its class"
        assert "  # " in declared.group(), f"{cls.__name__}.{name} has no comment"


@pytest.mark.parametrize(("path", "kind"), ALTERNATIVES)
def test_every_alternative_goes_through_json(path, kind):
    config = override(Config(), [f"{path}={kind}"] + (["schedule.final=0.1"] if kind == "wsd" else []))
    text = json.dumps(to_json(config))
    assert from_json(Config, json.loads(text)) == config
    assert identity(from_json(Config, json.loads(text))) == identity(config)
    held = to_json(config)
    for name in path.split("."):
        held = held[name]
    assert held["kind"] == kind
    assert hash(config) == hash(from_json(Config, json.loads(text)))


def test_json_holds_every_field():
    def names(value):
        return {f.name for f in dataclasses.fields(value)} | ({"kind"} if isinstance(value, Variant) else set())

    data = to_json(Config())
    assert data.keys() == names(Config())
    assert data["model"].keys() == names(Transformer())
    assert data["model"]["attention"].keys() == names(GroupedQuery())


@pytest.mark.parametrize(
    ("assignment", "read"),
    [
        ("train.steps=1e6", lambda c: c.train.steps == 10**6 and type(c.train.steps) is int),
        ("train.steps=1_000", lambda c: c.train.steps == 1000),
        ("train.steps=2.5e3", lambda c: c.train.steps == 2500 and type(c.train.steps) is int),
        ("data.heldout=1e-2", lambda c: c.data.heldout == 0.01),
        ("optimizer.learning_rate=1", lambda c: type(c.optimizer.learning_rate) is float),
        ("optimizer.clip=none", lambda c: c.optimizer.clip is None),
        ("optimizer.clip=null", lambda c: c.optimizer.clip is None),
        ("optimizer.clip=2", lambda c: c.optimizer.clip == 2.0),
        ("evaluation.every=None", lambda c: c.evaluation.every is None),
        ("evaluation.prompt=none", lambda c: c.evaluation.prompt == "none"),
        ("evaluation.prompt=a=b, c", lambda c: c.evaluation.prompt == "a=b, c"),
        ("evaluation.prompt=", lambda c: c.evaluation.prompt == ""),
        ("evaluation.prompt=[INST] {", lambda c: c.evaluation.prompt == "[INST] {"),
        ("model.tied=false", lambda c: c.model.tied is False),
        ("model.tied=True", lambda c: c.model.tied is True),
        ("model.layers=unroll", lambda c: c.model.layers == "unroll"),
        ('optimizer.decay_paths=["kernel$", "table$"]', lambda c: c.optimizer.decay_paths == ("kernel$", "table$")),
        ("optimizer.decay_paths=[]", lambda c: c.optimizer.decay_paths == ()),
        ("model.norm=layer", lambda c: c.model.norm == LayerNorm()),
        ('model.norm={"kind": "rms", "eps": 1e-3}', lambda c: c.model.norm == RMSNorm(1e-3)),
        ("model.attention.kv_heads=2", lambda c: c.model.attention == GroupedQuery(kv_heads=2)),
        ("data.corpus=1234", lambda c: c.data.corpus == "1234"),
    ],
)
def test_overrides_are_read_by_type(assignment, read):
    assert read(override(Config(), [assignment]))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("model.widht=3", "model.widht: no such field; did you mean width?"),
        ("modle.width=3", "modle: no such field; did you mean model?"),
        ("widh=3", "widh: no such field"),
        ("model.norm.epsilon=1", "model.norm.epsilon: no such field; did you mean eps?"),
        ("model.width.x=3", "model.width.x: model.width has no fields to set"),
        ("data.mixture.knots=[]", "data.mixture: is off (none); set it before data.mixture.knots"),
        ("model.width=3.5", "model.width: expected an integer, got '3.5'"),
        ("model.width=1e-1", "model.width: expected an integer, got '1e-1'"),
        ("model.width=none", "model.width: expected an integer, got 'none'"),
        ("model.width=true", "model.width: expected an integer, got 'true'"),
        ("model.width=", "model.width: expected an integer, got ''"),
        ("model.tied=1", "model.tied: expected true or false, got '1'"),
        ("model.tied=yes", "model.tied: expected true or false"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate: expected a number, got 'fast'"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate: expected a finite number, got nan"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate: expected a finite number, got inf"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate: must be positive, got -1.0"),
        ("model.layers=loop", "model.layers: 'loop' is not one of scan, unroll"),
        ("model.norm=layr", "model.norm: unknown kind 'layr'; did you mean layer?"),
        ("model.norm=[]", "model.norm: expected one of layer, rms"),
        ('optimizer.decay_paths=["a"', "optimizer.decay_paths: not valid JSON"),
        ("optimizer.decay_paths=[1]", "optimizer.decay_paths[0]: expected text, got 1"),
        ("optimizer.decay_paths=kernel", "optimizer.decay_paths: expected a list, got 'kernel'"),
        ('model.norm={"kind": "rms", "eps": NaN}', "model.norm.eps: expected a finite number, got nan"),
        ("train.microbatches=3", "train.microbatches: 3 does not divide 16 rows"),
        ("model.attention.heads=3", "model.attention.heads: 3 does not divide width = 128"),
        ("model.attention.kv_heads=3", "model.attention.kv_heads: 3 does not divide heads = 4"),
        ("model.width=__import__('os').getpid()", "model.width: expected an integer"),
    ],
)
def test_bad_overrides_name_the_field_and_the_way_out(assignment, message):
    with pytest.raises(ConfigError) as caught:
        override(Config(), [assignment])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["model.width", "=3", "", ".=1", "model..width=3", "model.=3"])
def test_what_is_no_assignment_is_refused(text):
    with pytest.raises(UserError, match="expected path=value"):
        override(Config(), [text])


def test_numbers_and_brackets_beyond_reason_are_refused_in_one_line():
    for text in (
        'model.norm={"kind": "rms", "eps": 1' + 400 * "0" + "}",
        'model.norm={"kind": "rms", "eps": 1' + 5000 * "0" + "}",
        "optimizer.decay_paths=" + 200_000 * "[",
        "train.steps=1e400",
        "train.steps=" + 5000 * "9",
    ):
        with pytest.raises(ConfigError):
            override(Config(), [text])
    with pytest.raises(ConfigError, match="expected a finite number"):
        from_json(float, 10**400)


def test_text_that_no_file_can_hold_is_refused():
    with pytest.raises(ConfigError, match=r"data\.corpus: .* is not valid Unicode"):
        override(Config(), ["data.corpus=caf\udce9.txt"])
    assert override(Config(), ["data.corpus=café\U0001f600"]).data.corpus == "café\U0001f600"


def test_the_order_of_overrides_may_pass_through_invalid_configs():
    for order in (["model.width=96", "model.attention.heads=3"], ["model.attention.heads=3", "model.width=96"]):
        config = override(Config(), order)
        assert (config.model.width, config.model.attention.heads) == (96, 3)
    config = override(Config(), ["data.batch=6", "train.microbatches=3"])
    assert config == override(Config(), ["train.microbatches=3", "data.batch=6"])
    assert override(Config(), ["train.steps=5", "train.steps=7"]).train.steps == 7


def test_another_kind_starts_from_its_own_defaults():
    config = override(Config(), ["optimizer.weight_decay=0.5", "optimizer=muon", "optimizer.rms=0.3"])
    assert config.optimizer == Muon(rms=0.3)
    with pytest.raises(ConfigError, match=r"schedule\.decay: no such field"):
        override(Config(), ["schedule=constant", "schedule.decay=0.5"])
    assert override(Config(), ["schedule=constant"]).schedule == Constant()


def test_overrides_leave_the_original_alone():
    config = Config()
    override(config, ["model.width=64", "optimizer=muon"])
    assert config == Config()


class Shape(Variant):
    """A family for these tests; it looks for alternatives in a room that has none of its own."""

    room: ClassVar[str] = "tinyjax.objectives"


@dataclasses.dataclass(frozen=True)
class Round(Shape):
    """A circle."""

    kind: ClassVar[str] = "round"
    radius: float = 1.5


@dataclasses.dataclass(frozen=True)
class Square(Shape):
    """Four corners."""

    kind: ClassVar[str] = "square"
    side: int = 2


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two names."""

    first: str
    second: str = "b"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One field of every type that configs may have."""

    number: int = 3
    rate: float = 0.1
    name: str = "caf\u00e9"
    on: bool = True
    maybe: int | None = None
    either: int | str = 1
    mode: Literal["x", "y"] = "x"
    many: tuple[float, ...] = (1.0, 2.0)
    two: tuple[int, str] = (1, "a")
    shape: Shape = Round()
    pairs: tuple[Pair, ...] = (Pair("a"),)


class TestIdentity:
    def test_is_what_it_has_always_been(self):
        """A change here orphans every finished run: never edit this value, mend the code."""
        text = (
            '{"either":1,"many":[1.0,2.0],"maybe":null,"mode":"x","name":"caf\u00e9","number":3,"on":true,'
            '"pairs":[{"first":"a","second":"b"}],"rate":0.1,"shape":{"kind":"round","radius":1.5},"two":[1,"a"]}'
        )
        assert configs.canonical(to_json(Sample())) == text
        assert identity(Sample()) == "2d28f1b1c01a82d8"

    @pytest.mark.parametrize(
        "change",
        [
            {"number": 4},
            {"rate": 0.2},
            {"name": "cafe"},
            {"on": False},
            {"maybe": 0},
            {"either": "1"},
            {"mode": "y"},
            {"many": (2.0, 1.0)},
            {"many": ()},
            {"two": (1, "b")},
            {"shape": Square()},
            {"shape": Round(2.0)},
            {"pairs": (Pair("a", "c"),)},
            {"pairs": ()},
        ],
        ids=str,
    )
    def test_depends_on_each_field(self, change):
        changed = dataclasses.replace(Sample(), **change)
        assert identity(changed) != identity(Sample())
        assert from_json(Sample, json.loads(json.dumps(to_json(changed)))) == changed
        (line,) = differences(to_json(Sample()), to_json(changed))[:1]
        assert line.startswith(next(iter(change)))

    def test_the_sample_has_changed_in_every_field(self):
        (mark,) = (m for m in type(self).test_depends_on_each_field.pytestmark if m.name == "parametrize")
        assert {name for change in mark.args[1] for name in change} == {f.name for f in dataclasses.fields(Sample)}

    def test_equal_configs_have_equal_identities(self):
        assert Sample(rate=1) == Sample(rate=1.0)
        assert identity(Sample(rate=1)) == identity(Sample(rate=1.0))
        assert identity(Sample(rate=-0.0)) == identity(Sample(rate=0.0))
        assert identity(Sample(many=(1, 2))) == identity(Sample())

    def test_values_that_no_file_holds_have_none(self):
        for bad in (Sample(rate=math.nan), Sample(rate=math.inf), Sample(number="3"), Sample(number=True)):
            with pytest.raises(ConfigError):
                identity(bad)

    def test_every_field_of_a_run_counts(self):
        assert len({identity(override(Config(), [a])) for a in ("train.seed=1", "model.width=64", "data.batch=8")}) == 3


def test_canonical_json_has_one_form():
    assert configs.canonical({"b": [1, 2.0], "a": None}) == '{"a":null,"b":[1,2.0]}'
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            configs.canonical({"a": bad})


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        (int, True, "expected an integer, got True"),
        (int, 1.0, "expected an integer, got 1.0"),
        (float, True, "expected a number, got True"),
        (bool, 1, "expected true or false, got 1"),
        (str, None, "expected text, got None"),
        (int | None, "x", "expected an integer, got 'x'"),
        (int | str, 1.5, "expected an integer or text, got 1.5"),
        (Literal["x", "y"], [], "[] is not one of x, y"),
        (Literal[1, 2], True, "True is not one of 1, 2"),
        (tuple[int, str], [1], "expected 2 items, got 1"),
        (Pair, {}, "first: missing"),
        (Pair, [], "expected an object with fields of Pair"),
        (Pair, {"first": "a", "secnd": "b"}, "secnd: no such field; did you mean second?"),
        (Shape, {"radius": 1.0}, "expected one of round, square"),
        (Shape, {"kind": "triangle"}, "unknown kind 'triangle'"),
        (Sample, {"pairs": [{"first": "a"}, {"first": 1}]}, "pairs[1].first: expected text, got 1"),
    ],
)
def test_json_is_read_strictly(kind, data, message):
    with pytest.raises(ConfigError) as caught:
        from_json(kind, data)
    assert message in str(caught.value)


def test_differences_name_paths():
    assert differences({"a": 1}, {"a": 1}) == []
    assert differences({"a": {"b": 1}}, {"a": {"b": 2}}) == ["a.b: 1 -> 2"]
    assert differences({"a": 1}, {"a": 1.0}) == ["a: 1 -> 1.0"]
    assert differences({}, {"a": None}) == ["a: absent -> None"]
    assert differences({"a": True}, {"a": 1}) == ["a: True -> 1"]


def test_two_alternatives_of_one_name_are_a_bug_that_shows():
    class Family(Variant):
        room: ClassVar[str] = "tinyjax.objectives"

    class One(Family):
        kind: ClassVar[str] = "same"

    class Two(Family):
        kind: ClassVar[str] = "same"

    with pytest.raises(TypeError, match="two Family variants are called 'same'"):
        variants(Family)


def test_gated_width_is_not_typed_twice():
    """A derived width stays derived: none in the file, whatever the model's width."""
    config = override(Config(), ["model.width=96", "model.attention.heads=3"])
    assert config.model.mlp == Gated()
    assert to_json(config)["model"]["mlp"]["hidden"] is None
