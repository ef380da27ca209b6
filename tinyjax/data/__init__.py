"""Data: corpus -> documents -> split -> tokenizer -> memory-mapped tokens -> batches addressed by step."""
