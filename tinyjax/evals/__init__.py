"""Measurements of trained models and of text, each a function from data to numbers."""
