"""How long a kernel would take by the compiler's figures. Nobody has compared these with hardware."""

from collections.abc import Sequence

from kernels.aot import jobs
from kernels.chips import Chip


def lower_bound(kernels: Sequence[jobs.Kernel], chip: Chip) -> float:
    """Return seconds from bundles and bytes alone: all steps run all branches."""
    return sum(
        max(
            kernel.bundles * kernel.steps / (chip.clock_hz * chip.cores),
            kernel.traffic / chip.hbm_bytes_per_s,
        )
        for kernel in kernels
    )


def walked(kernels: Sequence[jobs.Kernel], chip: Chip) -> float:
    """Return seconds from the walked grids, cores sharing the work evenly."""
    return sum(kernel.cycles for kernel in kernels) / (chip.clock_hz * chip.cores)
