"""How attention is laid out on a TPU: heads in tiles of lanes, rows in blocks, and which blocks meet."""

import dataclasses

import jax.numpy as jnp
import numpy as np

LANES = 128


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Queries and keys per block; multiples of 128."""

    q: int
    kv: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static about one call. Sizes are the true ones; `*_padded` those of the arrays that kernels see.

    A grid step serves `cluster` key heads (see `clusters_of`), side by side in the lanes, and all query heads that read
    them: in the natural order of heads these are contiguous, so that nothing is transposed in memory, and a head
    narrower than 128 lanes is not padded to them. With 2 `buffers` keys are fetched while others are worked on.
    """

    s: int
    t: int
    heads: int
    kv_heads: int
    width: int
    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    segments: bool
    sinks: bool
    cluster: int
    buffers: int
    blocks: Blocks

    @property
    def width_padded(self) -> int:
        """See `padded_width`."""
        return padded_width(self.width)

    @property
    def clusters(self) -> int:
        """Grid steps over heads."""
        return self.kv_heads // self.cluster

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.heads // self.kv_heads

    @property
    def cluster_heads(self) -> int:
        """Query heads per grid step."""
        return self.cluster * self.group

    @property
    def s_padded(self) -> int:
        """Rows of queries, in whole blocks."""
        return round_up(self.s, self.blocks.q)

    @property
    def t_padded(self) -> int:
        """Rows of keys, in whole blocks."""
        return round_up(self.t, self.blocks.kv)

    @property
    def q_blocks(self) -> int:
        """Blocks of queries."""
        return self.s_padded // self.blocks.q

    @property
    def kv_blocks(self) -> int:
        """Blocks of keys."""
        return self.t_padded // self.blocks.kv

    @property
    def masked(self) -> bool:
        """Whether any block holds a pair that is not visible."""
        return self.causal or self.segments or self.t_padded != self.t


@dataclasses.dataclass(frozen=True)
class Span:
    """Where a head lies: in lanes start to stop of the array, from `offset` on within these."""

    start: int
    stop: int
    offset: int


def round_up(n: int, multiple: int) -> int:
    """Return the least multiple that is not below n."""
    return -(-n // multiple) * multiple


def padded_width(width: int) -> int:
    """Return the least head width that divides 128 or is a multiple of it; at least 16, the rows of a bfloat16 tile."""
    return round_up(width, LANES) if width > LANES else max(16, 1 << (width - 1).bit_length())


def clusters_of(kv_heads: int, width: int) -> list[int]:
    """Return how many key heads one grid step may serve, ascending: as many as fill whole tiles of lanes, or all."""
    side_by_side = max(1, LANES // padded_width(width))
    return [n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and (n % side_by_side == 0 or n == kv_heads)]


def span(head: int, heads: int, width: int) -> Span:
    """Return the whole 128-lane tiles in which head number `head` of `heads` lies; the last tile may be cut short."""
    start = head * width // LANES * LANES
    return Span(start, min(start + max(width, LANES), heads * width), head * width - start)


def visits(plan: Plan, q_segments_BS=None, kv_segments_BT=None):
    """Return int32 [B or 1, q blocks, 4]: the visible blocks of keys of each block of queries.

    Row (first, full, full_end, end): blocks first to end hold visible pairs or lie between such, full to full_end hold
    nothing else. Segments are padded and only their ranges per block are looked at: never too few blocks are visited.
    """
    bq, bk, offset = plan.blocks.q, plan.blocks.kv, plan.t - plan.s
    first_position = np.arange(plan.q_blocks) * bq + offset
    last_position = np.minimum(first_position + bq, plan.t) - 1
    first, full = np.zeros_like(first_position), np.zeros_like(first_position)
    end = np.full_like(first_position, -(-plan.t // bk))
    full_end = np.full_like(first_position, plan.t // bk)
    if plan.causal:
        end = np.clip(-(-(last_position + 1) // bk), 0, end)
        full_end = np.clip((first_position + 1) // bk, 0, full_end)
    if plan.window is not None:
        first = np.clip((first_position - plan.window + 1) // bk, 0, end)
        full = np.clip(-(-(last_position - plan.window + 1) // bk), 0, None)
    none = full >= full_end
    full, full_end = np.where(none, end, full), np.where(none, end, full_end)
    table = np.stack([first, full, full_end, end], axis=-1)[None].astype(np.int32)
    return _narrowed(plan, table, q_segments_BS, kv_segments_BT) if plan.segments else jnp.asarray(table)


def _narrowed(plan, table_1Q4, q_segments_BS, kv_segments_BT):
    """Cut the visits down to blocks of which some segment may be equal; full are those of one and the same segment."""
    b = q_segments_BS.shape[0]
    q_BQR = q_segments_BS.reshape(b, plan.q_blocks, plan.blocks.q)
    kv_BKR = kv_segments_BT.reshape(b, plan.kv_blocks, plan.blocks.kv)
    low_BQK, high_BQK = q_BQR.min(axis=2)[:, :, None], q_BQR.max(axis=2)[:, :, None]
    kv_low_BQK, kv_high_BQK = kv_BKR.min(axis=2)[:, None], kv_BKR.max(axis=2)[:, None]
    block_11K = jnp.arange(plan.kv_blocks)[None, None]
    first_1Q1, full_1Q1, full_end_1Q1, end_1Q1 = (jnp.asarray(table_1Q4[..., i : i + 1]) for i in range(4))
    meet_BQK = (low_BQK <= kv_high_BQK) & (kv_low_BQK <= high_BQK)
    meet_BQK = meet_BQK & (first_1Q1 <= block_11K) & (block_11K < end_1Q1)
    same_BQK = (low_BQK == kv_high_BQK) & (kv_low_BQK == high_BQK)
    same_BQK = same_BQK & (full_1Q1 <= block_11K) & (block_11K < full_end_1Q1)
    first_BQ, end_BQ = _range(meet_BQK)
    full_BQ, full_end_BQ = _range(same_BQK)
    # Blocks of one segment with others between them: no run of full blocks.
    run_BQ = (jnp.sum(same_BQK, axis=2) == full_end_BQ - full_BQ) & (full_end_BQ > full_BQ)
    full_BQ, full_end_BQ = jnp.where(run_BQ, full_BQ, end_BQ), jnp.where(run_BQ, full_end_BQ, end_BQ)
    return jnp.stack([first_BQ, full_BQ, full_end_BQ, end_BQ], axis=-1).astype(jnp.int32)


def _range(chosen_BQK):
    """Return (first chosen, one past the last chosen), (0, 0) where none is."""
    n = chosen_BQK.shape[2]
    some_BQ = jnp.any(chosen_BQK, axis=2)
    end_BQ = jnp.where(some_BQ, n - jnp.argmax(chosen_BQK[:, :, ::-1], axis=2), 0)
    return jnp.argmax(chosen_BQK, axis=2), end_BQ
