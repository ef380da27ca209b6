"""Eight virtual CPU devices and strict shapes for every test, set before JAX makes its first array."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of a test is compilation; LLVM without optimisation halves it and leaves XLA's own passes as they are. CI runs
# the kernels, the slow and the rival tests with it on (XLA_FLAGS= in the Makefile).
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

import pytest  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def _compile_once(tmp_path_factory):
    """Let tests that build the same program share its compilation."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
