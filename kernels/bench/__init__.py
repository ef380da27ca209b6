"""`python -m kernels.bench`: implementations beside each other and beside rivals, timed here or compiled for a TPU."""
