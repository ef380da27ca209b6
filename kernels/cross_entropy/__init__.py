"""Cross-entropy of a linear classifier without the array of logits."""
