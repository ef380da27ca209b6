"""What the benchmarks time: each contender is a process of its own that answers requests for a few more steps."""
