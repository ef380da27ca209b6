"""Eight virtual CPU devices and strict shapes for every test, set before JAX makes its first array."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402  (reads JAX_PLATFORMS when imported)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
