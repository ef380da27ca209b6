"""`python -m kernels.bench [--op=OP] [--compile_for=CHIP] [--repeats=20]`."""

import argparse

import jax
from rich.console import Console
from rich.table import Table

from kernels.bench import compiled, here, timing
from kernels.bench.gpu import Torch
from kernels.chips import CHIPS


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.add_argument("--op", choices=("cross_entropy", "attention"), help="only this operation")
    parser.add_argument("--compile_for", choices=CHIPS, help="compile for this TPU instead of running (needs libtpu)")
    parser.add_argument("--shape", help="only this shape, with --compile_for")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each program")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    console = Console()
    if options.compile_for:
        compiled.main(options.compile_for, options.op, options.shape, console)
        return
    device = jax.devices()[0]
    console.print(f"{device.device_kind}, JAX {jax.__version__}; medians of {options.repeats} runs taken in turn")
    for group in here.groups(options.op, device.platform):
        console.print(_table(group, options.repeats))


def _table(group, repeats):
    table = Table("implementation", "ms", "ratio", "temp MiB", title=group.title)
    programs, temps = {}, {}
    for name, make in group.programs.items():
        try:
            made = make()
            if isinstance(made, Torch):
                programs[name] = made
                continue
            program = timing.compile(*made)
        except (ImportError, NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as error:
            table.add_row(name, "-", "-", str(error).splitlines()[0][:80])
            continue
        programs[name] = lambda program=program: program.call(*program.arguments)
        temps[name] = program.temp
    seconds = timing.in_turn(programs, repeats)
    first = next(iter(seconds.values()), None)
    for name, time in seconds.items():
        temp = "-" if temps.get(name) is None else f"{temps[name] / 2**20:.1f}"
        table.add_row(name, f"{1e3 * time:.2f}", f"{time / first:.2f}", temp)
    return table


if __name__ == "__main__":
    main()
