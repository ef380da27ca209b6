"""A model as data: an architecture, a vocabulary and a dtype; functions of explicit parameters."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tinyjax.models import layers
from tinyjax.models.component import Architecture


def compute_dtype(policy: str, backend: str) -> Any:
    """Return the dtype of activations. On CPU, bfloat16 was not faster to train with (XLA:CPU 0.10 to 0.12)."""
    if policy == "auto":
        policy = "float32" if backend == "cpu" else "bfloat16"
    return jnp.dtype(policy)


@dataclasses.dataclass(frozen=True)
class Model:
    """An architecture bound to a vocabulary size. Parameters never live in it; two equal models compare equal."""

    architecture: Architecture
    vocab_size: int
    dtype: Any

    @functools.cached_property
    def _module(self) -> nn.Module:
        return self.architecture.module(self.vocab_size, self.dtype)

    @functools.cached_property
    def _stacked(self) -> nn.Module:
        return dataclasses.replace(self.architecture, layers="scan").module(self.vocab_size, self.dtype)

    def _boxed(self, key):
        """Parameters with logical axis names, in the stacked form: so both forms start from equal values."""
        one = jnp.zeros((1, 1), jnp.int32)
        return self._stacked.init(key, {"tokens": one, "positions": one, "segment_ids": one})["params"]

    def init(self, key) -> dict[str, Any]:
        """Return float32 parameters, equal for the scanned and the unrolled form of one architecture."""
        params = nn.meta.unbox(self._boxed(key))
        return params if self.architecture.layers == "scan" else layers.unstack(params)

    def abstract(self) -> dict[str, Any]:
        """Return the spec tree: a ShapeDtypeStruct per parameter. No arrays are made."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def logical_axes(self) -> dict[str, Any]:
        """Return a PartitionSpec of logical axis names per parameter, the tree that sharding rules map to a mesh."""
        boxed = jax.eval_shape(self._boxed, jax.random.key(0))
        specs = nn.get_partition_spec(boxed)
        if self.architecture.layers == "scan":
            return specs
        inner = jax.tree.map(lambda s: jax.sharding.PartitionSpec(*s[1:]), specs["layers"])
        return {**specs, "layers": {str(i): inner for i in range(self.architecture.depth)}}

    def hidden(self, params, batch, key=None):
        """Return (x_BSD, c_VD): final hidden states and the output table. A dropout `key` turns training mode on."""

        def both(module):
            return module.hidden(batch, key is not None), module.head()

        rngs = None if key is None else {"dropout": key}
        return nn.apply(both, self._module)({"params": params}, rngs=rngs)

    def logits(self, params, batch):
        """Return logits_BSV in float32, for inference."""
        return self._module.apply({"params": params}, batch)

    def flops_per_token(self, sequence: int) -> dict[str, int]:
        """Return {part: matmul FLOPs per trained token}: forward once, backward twice, no recomputation."""
        return {k: 3 * v for k, v in self.architecture.flops(self.vocab_size, sequence).items()}
