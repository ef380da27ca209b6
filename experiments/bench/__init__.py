"""Benchmarks: `python -m experiments.bench NAME [options]`; one module with a `main(argv)` per benchmark."""
