"""Experiments: one readable file each, all run by `python -m experiments.run NAME`."""
