"""Next-token prediction, with z-loss."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kernels.cross_entropy.api import Implementation, linear_cross_entropy, loss_sums
from tinyjax import sharding
from tinyjax.data.packing import IGNORE
from tinyjax.errors import ConfigError
from tinyjax.objectives.objective import Objective


@dataclasses.dataclass(frozen=True)
class NextToken(Objective):
    """Negative log-likelihood of each token given those before it in its document."""

    kind: ClassVar[str] = "next_token"
    z_loss: float = 0.0  # weight of log(Z)^2 (PaLM, section 5); 1e-4 is usual
    # Leave out tiles of the backward pass that bfloat16 would round away (Wijmans et al. 2024), where a kernel runs.
    # For fine-tuning: in pre-training rare tokens learn from just these.
    filter_gradients: bool = False  # let kernels skip negligible gradients of logits
    implementation: Implementation | None = None  # none: the kernel of the device where it can serve, else chunked

    def __post_init__(self):
        if self.z_loss < 0:
            raise ConfigError("z_loss", f"must not be negative, got {self.z_loss}")

    def loss(self, model, params, batch, key):
        x_BSD, c_VD = model.hidden(params, batch, key)

        def sums(x_BSD, c_VD, targets_BS):
            found = loss_sums(
                x_BSD.reshape(-1, x_BSD.shape[-1]),
                c_VD,
                targets_BS.reshape(-1),
                ignore_index=IGNORE,
                softcap=model.architecture.logit_softcap,
                z_weight=self.z_loss,
                filter_eps="auto" if self.filter_gradients else None,
                implementation=self.implementation,
            )
            return sharding.add_shares(found)

        shared = sharding.per_device(sums, (P("batch"), P(), P("batch")), (P(), P(), P()))
        loss, nll, squares = shared(x_BSD, c_VD, batch["targets"])
        count = jnp.sum(batch["targets"] != IGNORE).astype(jnp.float32)
        return (loss, count), {"nll": nll, "z": squares}


def token_nll(model, params, batch):
    """Return nll_BS in nats, 0 where there is nothing to predict; for evaluation."""
    x_BSD, c_VD = model.hidden(params, batch)

    def losses(x_BSD, c_VD, targets_BS):
        nll_N = linear_cross_entropy(
            x_BSD.reshape(-1, x_BSD.shape[-1]),
            c_VD,
            targets_BS.reshape(-1),
            ignore_index=IGNORE,
            softcap=model.architecture.logit_softcap,
            reduction="none",
        )
        return nll_N.reshape(targets_BS.shape)

    return sharding.per_device(losses, (P("batch"), P(), P("batch")), P("batch"))(x_BSD, c_VD, batch["targets"])
