"""Architectures: each component is a frozen config and a small Linen module in a file of its own."""
