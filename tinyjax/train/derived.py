"""What follows from a config: sizes, FLOPs, tokens, memory; computed here and nowhere else."""

import dataclasses

import jax

from tinyjax import tree
from tinyjax.models.model import Model, compute_dtype
from tinyjax.train import state
from tinyjax.train.run_config import Config


@dataclasses.dataclass(frozen=True)
class Derived:
    """Derived numbers of one run. FLOPs count matrix products: forward once, backward twice, no recomputation."""

    params: dict[str, int]  # elements by group; they sum to params_total
    params_total: int
    params_without_tables: int  # the "non-embedding" count of scaling laws
    flops_per_token: dict[str, int]  # of training, by part; attention over all pairs of a row, and the head
    flops_per_token_total: int
    flops_causal: int  # the same total with attention scores counted for pairs in the past only
    tokens_per_step: int
    steps: int
    tokens: int  # seen in training, padding included
    flops: float  # of the run: flops_per_token_total * tokens
    bytes_params: int
    bytes_optimizer: int
    bytes_gradients: int


def model_of(config: Config, vocab_size: int) -> Model:
    """Return the model of a config; where its compute dtype is "auto", that of the default backend."""
    return Model(config.model, vocab_size, compute_dtype(config.model.compute_dtype, jax.default_backend()))


def derive(config: Config, vocab_size: int) -> Derived:
    """Return the derived numbers. Makes no arrays. AssertionError if the parameter groups do not sum to the total."""
    model = model_of(config, vocab_size)
    spec = model.abstract()
    optimizer = config.optimizer.transform(spec, model.logical_axes())
    shapes = jax.eval_shape(lambda: state.create(model, optimizer, jax.random.key(0)))
    groups, total = tree.groups(spec), tree.count(spec)
    assert sum(groups.values()) == total, f"parameter groups sum to {sum(groups.values())}, not {total}"
    tables = sum(leaf.size for path, leaf in tree.flatten(spec).items() if path.endswith("table"))
    sequence = config.data.sequence
    flops = model.flops_per_token(sequence)
    scores = flops.get("attention scores", 0)
    per_step = config.data.batch * sequence
    return Derived(
        params=groups,
        params_total=total,
        params_without_tables=total - tables,
        flops_per_token=flops,
        flops_per_token_total=sum(flops.values()),
        # Query i sees i + 1 of S keys: (S + 1) / 2 on average.
        flops_causal=sum(flops.values()) - scores + scores * (sequence + 1) // (2 * sequence),
        tokens_per_step=per_step,
        steps=config.train.steps,
        tokens=config.train.steps * per_step,
        flops=float(sum(flops.values())) * config.train.steps * per_step,
        bytes_params=tree.nbytes(shapes.params),
        bytes_optimizer=tree.nbytes(shapes.opt_state),
        bytes_gradients=tree.nbytes(shapes.params),
    )
