"""Scaled dot-product attention with grouped heads and document borders."""
