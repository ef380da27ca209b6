"""Tables that several experiments and the dry run show: what was trained, and what it costs."""

from typing import Any

import jax
import jax.numpy as jnp

from tinyjax import sharding
from tinyjax.report.document import Table
from tinyjax.train import state
from tinyjax.train.derived import model_of
from tinyjax.train.run_config import Config
from tinyjax.train.step import compile_step, make_step


def derived_tables(derived: dict[str, Any]) -> tuple[Table, ...]:
    """Return tables of parameters, FLOPs and sizes from the JSON of `tinyjax.train.derived.Derived`."""
    total = derived["params_total"]
    params = [(group, n, 100 * n / total) for group, n in derived["params"].items()]
    flops_total = derived["flops_per_token_total"]
    flops = [(part, n, 100 * n / flops_total) for part, n in derived["flops_per_token"].items()]
    mib = 2**20
    return (
        Table(
            "Parameters",
            ("group", "parameters", "share, %"),
            (
                *params,
                ("total", total, 100.0),
                (
                    "without token tables",
                    derived["params_without_tables"],
                    100 * derived["params_without_tables"] / total,
                ),
            ),
        ),
        Table(
            "Training FLOPs per token",
            ("part", "FLOPs", "share, %"),
            (
                *flops,
                ("total", flops_total, 100.0),
                ("total, pairs in the past only", derived["flops_causal"], 100 * derived["flops_causal"] / flops_total),
            ),
            caption="Matrix products, forward once and backward twice; attention over all pairs of a row.",
        ),
        Table(
            "Run",
            ("quantity", "value"),
            (
                ("steps", derived["steps"]),
                ("tokens per step", derived["tokens_per_step"]),
                ("tokens", derived["tokens"]),
                ("tokens per parameter", derived["tokens"] / total),
                ("FLOPs", derived["flops"]),
                ("parameters, MiB", derived["bytes_params"] / mib),
                ("optimizer state, MiB", derived["bytes_optimizer"] / mib),
                ("gradients, MiB", derived["bytes_gradients"] / mib),
            ),
        ),
    )


def memory_table(config: Config) -> Table:
    """Compile the train step for this machine, from shapes alone, and return what memory the compiler reserves."""
    model = model_of(config, config.tokenizer.vocab_size)
    transform = config.optimizer.transform(model.abstract(), model.logical_axes())
    mesh = sharding.data_mesh(jax.devices()[:1])
    spec = state.spec(model, transform, mesh)
    row = jax.ShapeDtypeStruct((config.data.batch, config.data.sequence), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), row)
    step = compile_step(make_step(model, transform, config), spec, mesh)
    found = step.lower(spec, batch).compile().memory_analysis()
    mib = 2**20
    rows = (("state and batch", found.argument_size_in_bytes / mib), ("temporary", found.temp_size_in_bytes / mib))
    title = f"Memory of a train step on one {jax.devices()[0].device_kind} device, MiB"
    return Table(title, ("part", "MiB"), (*rows, ("together", sum(size for _, size in rows))))
