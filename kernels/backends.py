"""Which device a kernel is written for, and what runs in its place on others."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

# What XLA calls the platform of an implementation. "reference" and "chunked" are for all.
PLATFORMS = {"tpu": "tpu", "gpu": "cuda"}


def perform(primitive: Callable, implementation: str, arrays: tuple, options: Mapping[str, Any]) -> Any:
    """Return primitive(*arrays, **options), of an implementation of any name.

    Where JAX's default backend is not the one the kernel is written for, it is interpreted, slowly, unless the program
    turns out to be compiled for that platform after all: ahead of time, or for export.
    """
    platform = PLATFORMS.get(implementation)
    if platform is None or jax.default_backend() == implementation:
        return primitive(*arrays, **options)
    return jax.lax.platform_dependent(
        *arrays,
        default=functools.partial(primitive, **options, interpret=True),
        **{platform: functools.partial(primitive, **options)},
    )


def choose(implementation: str | None, why_not: Callable[[str], str | None], call: str) -> str:
    """Return the implementation to use: the named one, else the default backend's kernel, else "chunked".

    why_not(name) says in one line why a kernel cannot serve the shapes at hand, None if it can. With several devices a
    kernel is only chosen inside a `shard_map` (with check_vma=False): XLA cannot divide a kernel among them.
    Raises ValueError for an unknown name, and when the named implementation cannot serve the call.
    """
    names = ("reference", "chunked", *PLATFORMS)
    if implementation not in (None, *names):
        raise ValueError(f"{call} has no implementation {implementation!r}; choose from {', '.join(names)}")
    name = implementation or jax.default_backend()
    if name not in PLATFORMS:
        return implementation or "chunked"
    reason = why_not(name)
    if implementation is not None:
        if reason is not None:
            raise ValueError(f"{call} by {name!r} cannot serve this call: {reason}; leave the implementation open")
        return name
    divided = jax.device_count() > 1 and not jax.sharding.get_abstract_mesh().manual_axes
    return "chunked" if divided or reason is not None else name
