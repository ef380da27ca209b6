"""The one call through which models reach attention; implementations slot in behind it."""

from kernels.attention import reference


def attention(q_BSHA, k_BTKA, v_BTKA, *, segment_ids_BS=None, softcap: float | None = None, scale: float | None = None):
    """Causal grouped-query attention, see `reference.attention`. Raises ValueError when heads do not divide."""
    if q_BSHA.shape[2] % k_BTKA.shape[2]:
        raise ValueError(f"{q_BSHA.shape[2]} query heads are not a multiple of {k_BTKA.shape[2]} key heads")
    return reference.attention(q_BSHA, k_BTKA, v_BTKA, segment_ids_BS=segment_ids_BS, softcap=softcap, scale=scale)
