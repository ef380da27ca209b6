"""A matrix between named axes: the only place where kernels and biases are declared."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from tinyjax.models.component import Build
from tinyjax.models.init import Role


class Linear(nn.Module):
    """Contract the last axes of x with a kernel of shape inputs + outputs; computes as one [N, in] x [in, out] matmul.

    `axes` are the logical names of the kernel's axes (sharding rules refer to them); parameters: kernel, bias if asked.
    """

    build: Build
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str, ...]
    role: Role
    bias: bool = False

    @nn.compact
    def __call__(self, x):
        fan_in = math.prod(self.inputs)
        init = self.build.init.initializer(self.role, fan_in, self.build.width, self.build.depth)
        shape = self.inputs + self.outputs
        kernel = self.param("kernel", nn.with_logical_partitioning(init, self.axes), shape, jnp.float32)
        lead = x.shape[: x.ndim - len(self.inputs)]
        y = x.reshape(-1, fan_in) @ kernel.astype(self.build.dtype).reshape(fan_in, -1)
        y = y.reshape(lead + self.outputs)
        if self.bias:
            names = self.axes[len(self.inputs) :]
            zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), names)
            bias = self.param("bias", zeros, self.outputs, jnp.float32).astype(self.build.dtype)
            y = y + bias.reshape((1,) * len(lead) + self.outputs)
        return y


def matmul_flops(inputs: Sequence[int], outputs: Sequence[int]) -> int:
    """Return forward FLOPs per token of a Linear: a multiply and an add per weight."""
    return 2 * math.prod(inputs) * math.prod(outputs)
