"""Config trees: frozen dataclasses that go to JSON and back, take typed overrides by path, and hash to an identity.

A config is complete: every field has a value, `None` is "off". A field whose type is a `Variant` subclass holds one of
several alternatives (a norm, an optimizer, a schedule); in JSON it is an object with a "kind", and the alternatives are
all subclasses found in the variant's room (package), so that a new one is one new file.
"""

import dataclasses
import functools
import hashlib
import importlib
import json
import math
import pkgutil
import types
import typing
from typing import Any, ClassVar, TypeVar

from tinyjax.errors import ConfigError, UserError, nearest

T = TypeVar("T")


class Variant:
    """Base of a family of alternatives. The family's root sets `room`; each alternative sets `kind`."""

    room: ClassVar[str]
    kind: ClassVar[str]


@functools.cache
def variants(family: type) -> dict[str, type]:
    """Return {kind: dataclass} of every alternative of `family` defined in its room."""
    package = importlib.import_module(family.room)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
    found: dict[str, type] = {}
    queue = [family]
    while queue:
        cls = queue.pop()
        queue.extend(cls.__subclasses__())
        if "kind" in vars(cls) and found.setdefault(cls.kind, cls) is not cls:
            raise TypeError(f"two {family.__name__} variants are called {cls.kind!r}: {found[cls.kind]} and {cls}")
    return dict(sorted(found.items()))


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Return {field name: resolved type} of a dataclass, in order of declaration."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _family(kind: Any) -> type | None:
    return kind if isinstance(kind, type) and issubclass(kind, Variant) else None


def _members(kind: Any) -> tuple[Any, ...]:
    """Alternatives of a union type, or the type itself."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def to_json(config: Any) -> Any:
    """Return the config as JSON data: dataclasses become objects, tuples lists, variants carry "kind"."""
    if dataclasses.is_dataclass(config):
        out = {"kind": config.kind} if isinstance(config, Variant) else {}
        return out | {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple):
        return [to_json(item) for item in config]
    return config


def from_json(kind: Any, data: Any, path: str = "") -> Any:
    """Return `data` as a value of type `kind`, strictly.

    Raises ConfigError naming the dotted path for an unknown field (with the nearest name), a missing one without
    default, a wrong type, or a value that the dataclass itself refuses.
    """
    where = path or "config"
    if typing.get_origin(kind) is typing.Literal:
        if data in typing.get_args(kind) and any(type(data) is type(a) and data == a for a in typing.get_args(kind)):
            return data
        raise ConfigError(where, f"{data!r} is not one of {', '.join(map(str, typing.get_args(kind)))}")
    if len(_members(kind)) > 1:
        return _union(kind, data, path)
    if kind is type(None):
        if data is None:
            return None
        raise ConfigError(where, f"expected none, got {data!r}")
    if typing.get_origin(kind) is tuple:
        return _tuple(kind, data, path)
    if family := _family(kind):
        return _variant(family, data, path)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, data, path)
    return _scalar(kind, data, where)


def _scalar(kind: type, data: Any, where: str) -> Any:
    if kind is float and type(data) in (int, float):
        try:
            value = float(data)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise ConfigError(where, f"expected a finite number, got {value}")
        return value + 0.0  # -0.0 and 0.0 are equal and must hash alike
    if kind is str and type(data) is str and any("\ud800" <= c <= "\udfff" for c in data):
        raise ConfigError(where, f"{data!r} is not valid Unicode; write it in UTF-8")
    if kind in (int, str, bool) and type(data) is kind:
        return data
    raise ConfigError(where, f"expected {_name(kind)}, got {data!r}")


def _union(kind: Any, data: Any, path: str) -> Any:
    members = _members(kind)
    if data is None and type(None) in members:
        return None
    errors = []
    for member in members:
        if member is type(None):
            continue
        try:
            return from_json(member, data, path)
        except ConfigError as error:
            errors.append(error)
    if len(errors) == 1 or isinstance(data, dict):
        raise errors[-1]
    raise ConfigError(path or "config", f"expected {_name(kind)}, got {data!r}")


def _tuple(kind: Any, data: Any, path: str) -> tuple:
    args = typing.get_args(kind)
    if not isinstance(data, (list, tuple)):
        raise ConfigError(path, f"expected a list, got {data!r}")
    if args[-1] is Ellipsis:
        return tuple(from_json(args[0], item, f"{path}[{i}]") for i, item in enumerate(data))
    if len(data) != len(args):
        raise ConfigError(path, f"expected {len(args)} items, got {len(data)}")
    return tuple(from_json(a, item, f"{path}[{i}]") for i, (a, item) in enumerate(zip(args, data, strict=True)))


def _variant(family: type, data: Any, path: str) -> Any:
    known = variants(family)
    if isinstance(data, str):
        data = {"kind": data}
    if not isinstance(data, dict) or "kind" not in data:
        raise ConfigError(path, f"expected one of {', '.join(known)}, got {data!r}")
    if data["kind"] not in known:
        raise ConfigError(path, f"unknown kind {data['kind']!r}{nearest(str(data['kind']), known)}")
    return _dataclass(known[data["kind"]], {k: v for k, v in data.items() if k != "kind"}, path)


def _dataclass(cls: type, data: Any, path: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(path or "config", f"expected an object with fields of {cls.__name__}, got {data!r}")
    kinds = field_types(cls)
    prefix = path + "." if path else ""
    for name in data:
        if name not in kinds:
            raise ConfigError(prefix + str(name), f"no such field{nearest(str(name), kinds)}")
    values = {}
    for f in dataclasses.fields(cls):
        if f.name in data:
            values[f.name] = from_json(kinds[f.name], data[f.name], prefix + f.name)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(prefix + f.name, "missing")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(prefix + error.path, error.reason) from None


def _name(kind: Any) -> str:
    if kind is type(None):
        return "none"
    if len(_members(kind)) > 1:
        return " or ".join(_name(m) for m in _members(kind))
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    return {int: "an integer", float: "a number", str: "text", bool: "true or false"}.get(
        kind, getattr(kind, "__name__", str(kind))
    )


def _parse(kind: Any, text: str, path: str) -> Any:
    """Turn the text of an override into JSON data for `kind`. Never evaluates it."""
    members = _members(kind)
    if type(None) in members and text.lower() in ("none", "null"):
        return None
    scalars = [m for m in members if m in (int, float, bool)]
    number = text.replace("_", "")
    for scalar in scalars:
        try:
            if scalar is bool and text.lower() in ("true", "false"):
                return text.lower() == "true"
            if scalar is int:
                value = float(number) if "e" in number.lower() else int(number)
                if value == int(value):
                    return int(value)
            if scalar is float:
                return float(number)
        except (ValueError, OverflowError):
            continue
    if str not in members and text.startswith(("[", "{")):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(path, f"not valid JSON ({error.msg} at column {error.colno})") from None
        except (ValueError, RecursionError) as error:  # thousands of digits or brackets
            raise ConfigError(path, f"not valid JSON ({error})") from None
    return text


def _type_at(kind: Any, data: Any, name: str, path: str) -> Any:
    """Type of field `name` below JSON `data` of type `kind`; ConfigError with the nearest name when there is none."""
    known: dict[str, Any] = {}
    for member in _members(kind):
        cls = member
        if family := _family(member):
            chosen = data.get("kind") if isinstance(data, dict) else None
            cls = variants(family).get(chosen)
        if dataclasses.is_dataclass(cls):
            known |= field_types(cls)
    if name not in known:
        if not known:
            raise ConfigError(path, f"{path.rpartition('.')[0]} has no fields to set")
        raise ConfigError(path, f"no such field{nearest(name, known)}")
    return known[name]


def override(config: T, assignments: list[str] | tuple[str, ...]) -> T:
    """Return `config` with "path=value" assignments applied in order, validated once at the end.

    Setting a variant to the name of another kind takes that kind's defaults. Raises ConfigError for a malformed
    assignment, an unknown path (with the nearest name) or a value of the wrong type.
    """
    data = to_json(config)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        names = path.split(".")
        if not equals or not all(names):
            raise UserError(f"--set {assignment}: expected path=value, for example model.depth=4")
        node, kind = data, type(config)
        for i, name in enumerate(names[:-1]):
            kind = _type_at(kind, node, name, ".".join(names[: i + 1]))
            node = node[name]
            if node is None:
                raise ConfigError(".".join(names[: i + 1]), f"is off (none); set it before {path}")
        kind = _type_at(kind, node, names[-1], path)
        value = _parse(kind, text, path)
        node[names[-1]] = to_json(from_json(kind, value, path))
    return from_json(type(config), data)


def canonical(data: Any) -> str:
    """Return JSON data as the one text that is hashed: sorted keys, no spaces, no NaN."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def identity(config: Any) -> str:
    """Return the config's identity: 16 hex digits of the SHA-256 of its canonical JSON.

    Equal configs have equal identities. Raises ConfigError for a value that the field's type refuses.
    """
    # Read back first: code may have put the integer 1 in a field of floats, a file always holds 1.0.
    read = from_json(type(config), to_json(config))
    return hashlib.sha256(canonical(to_json(read)).encode()).hexdigest()[:16]


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Return lines "path: a -> b" for every place where two pieces of JSON data differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        lines = []
        for name in sorted(a.keys() | b.keys()):
            where = f"{path}.{name}" if path else name
            if name in a and name in b:
                lines += differences(a[name], b[name], where)
            else:
                lines.append(f"{where}: {a.get(name, 'absent')} -> {b.get(name, 'absent')}")
        return lines
    return [] if a == b and type(a) is type(b) else [f"{path}: {a} -> {b}"]
