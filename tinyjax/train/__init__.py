"""Training: one frozen state of data, one free-function step, a loop that continues where it was stopped."""
