"""Next-token prediction, with z-loss."""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from kernels.cross_entropy.api import linear_cross_entropy
from tinyjax.data.packing import IGNORE
from tinyjax.errors import ConfigError
from tinyjax.objectives.objective import Objective


@dataclasses.dataclass(frozen=True)
class NextToken(Objective):
    """Negative log-likelihood of each token given those before it in its document."""

    kind: ClassVar[str] = "next_token"
    z_loss: float = 0.0  # weight of log(Z)^2 (PaLM, section 5); 1e-4 is usual
    implementation: Literal["chunked", "reference"] = "chunked"  # reference holds all logits at once

    def __post_init__(self):
        if self.z_loss < 0:
            raise ConfigError("z_loss", f"must not be negative, got {self.z_loss}")

    def loss(self, model, params, batch, key):
        x_BSD, c_VD = model.hidden(params, batch, key)
        targets_N = batch["targets"].reshape(-1)
        loss, nll, squares = linear_cross_entropy(
            x_BSD.reshape(-1, x_BSD.shape[-1]),
            c_VD,
            targets_N,
            ignore_index=IGNORE,
            softcap=model.architecture.logit_softcap,
            z_weight=self.z_loss,
            implementation=self.implementation,
        )
        count = jnp.sum(targets_N != IGNORE).astype(jnp.float32)
        return (loss, count), {"nll": nll, "z": squares}


def token_nll(model, params, batch):
    """Return nll_BS in nats, 0 where there is nothing to predict; for evaluation."""
    x_BSD, c_VD = model.hidden(params, batch)
    nll_N, _ = linear_cross_entropy(
        x_BSD.reshape(-1, x_BSD.shape[-1]),
        c_VD,
        batch["targets"].reshape(-1),
        ignore_index=IGNORE,
        softcap=model.architecture.logit_softcap,
        reduction="none",
    )
    return nll_N.reshape(batch["targets"].shape)
