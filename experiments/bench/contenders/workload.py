"""The computation that all contenders share: sizes, parameters and batches. Needs NumPy only."""

import dataclasses

import numpy as np

LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0
NORM_EPS, ROPE_BASE = 1e-6, 10000.0


@dataclasses.dataclass(frozen=True)
class Workload:
    """A decoder with gated SiLU, RoPE, RMSNorm and a tied head, and its batch."""

    width: int = 256  # D
    depth: int = 6  # L
    heads: int = 4  # H, each of D / H
    hidden: int = 704  # F
    sequence: int = 256  # S
    rows: int = 16  # B; B * S tokens a step
    vocab: int = 8192  # V

    @property
    def tokens(self) -> int:
        """Return tokens per step."""
        return self.rows * self.sequence


def parameters(work: Workload, seed: int = 0) -> dict[str, np.ndarray]:
    """Return {path: float32 array}, equal on every machine: matrices normal with deviation 0.02, scales 1."""
    d, h, f = work.width, work.heads, work.hidden
    shapes = {"embedding/table": (work.vocab, d), "norm/scale": (d,)}
    for i in range(work.depth):
        layer = f"layers/{i}"
        shapes |= {f"{layer}/attention/{name}/kernel": (d, h, d // h) for name in ("query", "key", "value")}
        shapes |= {f"{layer}/attention/out/kernel": (h, d // h, d), f"{layer}/mlp/out/kernel": (f, d)}
        shapes |= {f"{layer}/mlp/{name}/kernel": (d, f) for name in ("gate", "up")}
        shapes |= {f"{layer}/{name}/scale": (d,) for name in ("attention_norm", "mlp_norm")}
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        if path.endswith("scale"):
            return np.ones(shape, np.float32)
        return 0.02 * rng.standard_normal(shape, np.float32)

    return {path: draw(path, shape) for path, shape in shapes.items()}


def batch(work: Workload, packed: bool, seed: int = 1) -> dict[str, np.ndarray]:
    """Return int32 arrays [B, S]: tokens, targets, positions and, if packed, segment_ids of unequal documents.

    Unpacked, every row is one document.
    """
    rng = np.random.default_rng(seed)
    stream_BS = rng.integers(0, work.vocab, (work.rows, work.sequence + 1), np.int32)
    positions_BS = np.tile(np.arange(work.sequence, dtype=np.int32), (work.rows, 1))
    arrays = {"tokens": stream_BS[:, :-1], "targets": stream_BS[:, 1:], "positions": positions_BS}
    if packed:
        # About four documents a row, which is what stories of 60 tokens give at 256 tokens a row.
        starts_BS = rng.random((work.rows, work.sequence)) < 4 / work.sequence
        starts_BS[:, 0] = True
        first_BS = np.maximum.accumulate(np.where(starts_BS, positions_BS, 0), axis=1)
        arrays["positions"] = positions_BS - first_BS
        arrays["segment_ids"] = np.cumsum(starts_BS, axis=1, dtype=np.int32)
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}
