"""Optimizers as optax transformations, and schedules as functions of the step."""
