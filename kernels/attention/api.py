"""The one call through which models reach attention; implementations slot in behind it."""

from typing import Literal

from kernels.attention import chunked, reference

Implementation = Literal["reference", "chunked"]

# Blocks of queries. Of 1, 2, 4 and 8, forward and backward were fastest with 4 on CPU, for 4 rows of 256 tokens and 4
# heads of 64: 12.5 ms of CPU time against 18 to 20 for the reference (JAX 0.12 and 0.10).
BLOCKS = 4


def attention(
    q_BSHA,
    k_BTKA,
    v_BTKA,
    *,
    segment_ids_BS=None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: Implementation = "chunked",
):
    """Causal grouped-query attention, see `reference.attention`. Raises ValueError when heads do not divide.

    "chunked" keeps no [S, T] table for the backward pass; it has a reverse-mode derivative only.
    """
    if q_BSHA.shape[2] % k_BTKA.shape[2]:
        raise ValueError(f"{q_BSHA.shape[2]} query heads are not a multiple of {k_BTKA.shape[2]} key heads")
    options = {"segment_ids_BS": segment_ids_BS, "softcap": softcap, "scale": scale}
    if implementation == "reference":
        return reference.attention(q_BSHA, k_BTKA, v_BTKA, **options)
    return chunked.attention(q_BSHA, k_BTKA, v_BTKA, blocks=BLOCKS, **options)
