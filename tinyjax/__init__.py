"""Train and study tiny language models in JAX: configs, parameters, batches and keys are all plain data."""
