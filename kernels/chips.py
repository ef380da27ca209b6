"""The TPU chips that block sizes are measured for."""

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Chip:
    """One chip. Bandwidth, peak and clock are those libtpu's own cost model works with; no device was timed."""

    name: str
    topology: str  # the smallest name that libtpu 0.0.42 and later accept; 0.0.42 refuses v5e:1x1
    device_kinds: tuple[str, ...]  # what jax.Device.device_kind says
    cores: int  # TensorCores behind one JAX device; a parallel grid axis is split over them
    vmem_bytes: int  # per core
    hbm_bytes_per_s: float  # of all cores together
    flops_per_s: float  # bfloat16, of all cores together
    clock_hz: float  # what one estimated cycle is worth


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "v5e:2x2", ("TPU v5 lite", "TPU v5e"), 1, 128 * MIB, 738e9, 197e12, 1.5e9),
        Chip("v5p", "v5p:2x2x1", ("TPU v5", "TPU v5p"), 2, 64 * MIB, 2350e9, 394e12, 1.75e9),
        Chip("v6e", "v6e:2x2", ("TPU v6 lite", "TPU v6e"), 1, 128 * MIB, 1638e9, 918e12, 1.75e9),
    )
}


def of_device_kind(kind: str) -> Chip | None:
    """Return the chip whose `jax.Device.device_kind` is `kind`, or None when nothing was measured for it."""
    return next((chip for chip in CHIPS.values() if kind in chip.device_kinds), None)
