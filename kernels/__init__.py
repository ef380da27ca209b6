"""Operations with hand-written kernels: a reference, a plain XLA form and, per backend, Pallas; nothing of tinyjax."""
