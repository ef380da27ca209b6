"""`python -m kernels.aot.child FOLDER`: jobs as JSON lines on standard input, results as JSON lines on standard output.

Started by `parent.run`, which sets the environment and names the folder that libtpu writes its dumps to. What a user
can cause (too little VMEM, a chip libtpu does not know, no libtpu) is a result, not a traceback.
"""

import dataclasses
import importlib
import importlib.util
import os
import pathlib
import sys

import numpy as np

from kernels.aot import calls, jobs, llo, profile, steering, tables
from kernels.chips import CHIPS

# XLA's placing of arrays in VMEM, by family of chips: v5e and v5p, v6e.
PREFETCH = ("xla_vf_vmem_memory_space_assignment", "xla_gf_vmem_memory_space_assignment")


class Failure(Exception):
    """A job that cannot be done: (word of jobs.Error, one line)."""


def main(folder: pathlib.Path) -> None:
    """Answer each job read from standard input, one line each way, until the input ends."""
    # Libraries print to standard output; results go where nothing else can.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(jobs.encode(perform(jobs.decode_job(line), folder)), file=results, flush=True)


def perform(job: jobs.Job, folder: pathlib.Path) -> jobs.Result:
    """Compile what the job names and return its figures."""
    try:
        function, arguments = _program(job)
        mesh = _mesh(job.chip)
        if job.want == "memory":
            return jobs.Result(memory=_memory(_compile(function, arguments, mesh, "program")))
        measure = _bundles if job.want == "bundles" else _cycles
        found = _calls(function, arguments, mesh)
        return jobs.Result(kernels=tuple(measure(call, job, mesh, folder) for call in found))
    except Failure as failure:
        return jobs.Result(*failure.args)


def _program(job):
    try:
        cases = importlib.import_module(job.cases)
        shape = cases.SHAPES[job.shape]
        return cases.program(job.program, shape, job.implementation, _blocks(job))
    except KeyError as error:
        raise Failure("case", f"{job.cases} has no shape {error}; known: {', '.join(cases.SHAPES)}") from None
    except (ImportError, NotImplementedError, ValueError, TypeError) as error:
        raise Failure("case", _line(error)) from None


def _blocks(job):
    if job.blocks is None:
        return None
    values = dict(job.blocks)
    package = job.cases.rpartition(".")[0]
    module = importlib.import_module(f"{package}.{job.implementation}" if package else job.cases)
    kind = getattr(module, values.pop("kind"), None)
    if not dataclasses.is_dataclass(kind):
        raise ValueError(f"{module.__name__} has no dataclass {job.blocks['kind']}")
    return kind(**values)


def _mesh(chip):
    import jax
    from jax.experimental import topologies

    if chip not in CHIPS:
        raise Failure("chip", f"no chip {chip!r}; known: {', '.join(CHIPS)}")
    if importlib.util.find_spec("libtpu") is None:
        raise Failure("libtpu", "libtpu is not installed; it is in the extra `aot`")
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip].topology)
    except Exception as error:  # libtpu raises different kinds for what it does not know
        raise Failure("chip", _line(error)) from None
    return jax.sharding.Mesh(np.array(topology.devices[:1]), ("device",))


def _calls(function, arguments, mesh):
    import jax

    try:
        return calls.find(function, arguments)
    except Exception:  # a kernel that asks which chip it is for, see below
        pass
    try:
        # Not for all: what is traced so cannot be evaluated here, which kernels with prefetched scalars need.
        with jax.set_mesh(mesh):
            return calls.find(function, arguments)
    except Exception as error:  # whatever the kernel refuses while it is traced
        raise Failure("compile", _line(error)) from None


def _compile(function, arguments, mesh, name, alone=False):
    """Compile for the mesh's device. `alone`: arrays lie in HBM in the order of their axes, as a kernel wants them.

    Otherwise XLA copies arrays whose width is not a multiple of 128 around the kernel, and puts small ones into VMEM
    ahead of it, which libtpu would estimate too, and which may leave the kernel less VMEM than it asks for.
    """
    import jax
    from jax.experimental.layout import Format, Layout

    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def placed(x):
        kept = Format(Layout(tuple(range(x.ndim))), place) if alone else place
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=kept)

    def program(*arrays):
        return function(*arrays)

    program.__name__ = name  # what libtpu's files are called after where the kernel has no name of its own
    try:
        # The mesh in context tells kernels that ask, and Pallas itself, which chip they are lowered for.
        with jax.set_mesh(mesh):
            outputs = jax.tree.map(lambda x: placed(x).format, jax.eval_shape(program, *arguments)) if alone else None
            lowered = jax.jit(program, out_shardings=outputs).lower(*jax.tree.map(placed, arguments))
            return lowered.compile(compiler_options=dict.fromkeys(PREFETCH, False) if alone else None)
    except Exception as error:  # whatever the kernel, Pallas, XLA or libtpu refuse
        if "RESOURCE_EXHAUSTED" in str(error) and "vmem" in str(error).lower():
            raise Failure("vmem", _line(error, "memory space vmem")) from None
        raise Failure("compile", _line(error)) from None


def _memory(compiled):
    found = compiled.memory_analysis()
    return jobs.Memory(found.temp_size_in_bytes, found.argument_size_in_bytes, found.output_size_in_bytes)


def _kernel(call, **figures):
    return jobs.Kernel(name=call.name, grid=call.grid, traffic=call.traffic, prefetched=call.prefetched, **figures)


def _bundles(call, job, mesh, folder):
    report = _read(llo.read, call, call.alone(), mesh, folder)
    return _kernel(call, **dataclasses.asdict(report))


def _cycles(call, job, mesh, folder):
    plan = profile.plan(call.grid, job.simulate)
    try:
        steering.check(call.scalars, tables.version())
    except ValueError as error:
        raise Failure("compile", _line(error)) from None
    cycles = [_read(profile.read, call, call.part(grid), mesh, folder) for grid in plan.grids]
    return _kernel(call, cycles=profile.total(plan, cycles))


def _read(reader, call, program, mesh, folder):
    """Compile a program of one kernel and read what libtpu wrote about the kernel."""
    for left in folder.iterdir():  # a wide kernel's dump is 20 MB
        left.unlink()
    _compile(*program, mesh, call.name, alone=True)
    try:
        return reader(folder, call.name)
    except ValueError as error:
        raise Failure("compile", _line(error)) from None


def _line(error, about=""):
    """Return the first line of an error that says something (`about` what is given), at most 300 characters of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and about in line]
    return (lines[0] if lines else type(error).__name__)[:300]


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
