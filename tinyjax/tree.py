"""Parameters by name: nested dicts of arrays addressed by slash paths such as `layers/attention/query/kernel`."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from tinyjax.errors import UserError, nearest


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {path: leaf} of a nested dict, in sorted order of path components."""
    out: dict[str, Any] = {}
    for name in sorted(tree):
        path = f"{prefix}{name}"
        if isinstance(tree[name], Mapping):
            out |= flatten(tree[name], path + "/")
        else:
            out[path] = tree[name]
    return out


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested dict of {path: leaf}; the inverse of `flatten`."""
    out: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = out
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return out


def map_named(function: Callable[..., Any], tree: Mapping[str, Any], *rest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree of `function(path, leaf, *leaves of rest)`."""
    others = [flatten(r) for r in rest]
    return unflatten({p: function(p, leaf, *(o[p] for o in others)) for p, leaf in flatten(tree).items()})


def get(tree: Mapping[str, Any], path: str) -> Any:
    """Return the leaf at `path`. Raises UserError with the nearest names when there is none."""
    leaves = flatten(tree)
    if path not in leaves:
        raise UserError(f"no parameter {path}{nearest(path, leaves)}")
    return leaves[path]


def mask(tree: Mapping[str, Any], patterns: tuple[str, ...], what: str) -> dict[str, Any]:
    """Return a tree of booleans: whether some regular expression is found in the leaf's path.

    Raises UserError when a pattern is malformed or matches no leaf: it would silently do nothing.
    """
    paths = list(flatten(tree))
    for pattern in patterns:
        try:
            matched = any(re.search(pattern, path) for path in paths)
        except re.error as error:
            raise UserError(f"{what}: {pattern!r} is not a regular expression ({error})") from None
        if not matched:
            raise UserError(f"{what}: {pattern!r} matches no parameter{nearest(pattern, paths)}")
    return unflatten({path: any(re.search(p, path) for p in patterns) for path in paths})


def count(tree: Any) -> int:
    """Return the number of elements in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Return the bytes of all leaves, from shape and dtype (works on abstract trees)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def groups(tree: Mapping[str, Any]) -> dict[str, int]:
    """Return {group: elements}, a group being a path without layer numbers and its last component; sums to `count`."""
    out: dict[str, int] = {}
    for path, leaf in flatten(tree).items():
        parts = [p for p in path.split("/") if not p.isdigit()]
        name = "/".join(parts[:2] if len(parts) > 2 else parts[:1])
        out[name] = out.get(name, 0) + leaf.size
    return out


def check_same_structure(expected: Mapping[str, Any], found: Mapping[str, Any], what: str) -> None:
    """Raise UserError naming missing, extra and mis-shaped leaves, with the nearest paths; `what` names the source."""
    want, have = flatten(expected), flatten(found)
    lines = [f"missing {p}{nearest(p, have.keys() - want.keys())}" for p in sorted(want.keys() - have.keys())]
    lines += [f"unexpected {p}{nearest(p, want.keys() - have.keys())}" for p in sorted(have.keys() - want.keys())]
    for p in sorted(want.keys() & have.keys()):
        a, b = want[p], have[p]
        if tuple(a.shape) != tuple(b.shape) or a.dtype != b.dtype:
            lines.append(f"{p} is {b.dtype}{list(b.shape)}, expected {a.dtype}{list(a.shape)}")
    if lines:
        more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
        raise UserError(f"{what}: parameters do not fit the model: " + "; ".join(lines[:3]) + more)
