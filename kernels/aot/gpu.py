"""Compile GPU kernels for an NVIDIA H200 where there is no GPU, and report what the compiler says.

The compiler is the CUDA plug-in of JAX in an environment of its own, whose interpreter the variable TINYJAX_GPU_PYTHON
names. It needs neither a GPU nor CUDA's libraries, only what `jax` itself needs and two wheels of some 200 MB:

    python -m venv ENVIRONMENT
    ENVIRONMENT/bin/pip install jax==VERSION
    ENVIRONMENT/bin/pip install --no-deps jax-cuda12-plugin==VERSION jax-cuda12-pjrt==VERSION

`run` is the call. This file is also what it starts there: `python -m kernels.aot.gpu`, jobs as JSON lines on standard
input, results as JSON lines on standard output.
"""

import collections
import dataclasses
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import typing
from collections.abc import Iterable, Iterator, Mapping

PYTHON = "TINYJAX_GPU_PYTHON"
TARGET = pathlib.Path(__file__).with_name("h200.txtpb")
# Counted in the PTX of all kernels: Hopper's matrix products, those of older tensor cores, copies that overlap with
# arithmetic.
INSTRUCTIONS = {"wgmma": r"\bwgmma\.mma_async", "mma": r"\bmma\.sync", "async_copy": r"\bcp\.async\.c[ag]"}


@dataclasses.dataclass(frozen=True)
class Job:
    """A call to compile: `function` of `module` with `arrays` ((shape, dtype), or None) and keyword `options`.

    `blocks`, a mapping of the fields of module.Blocks, is passed as such; None leaves the choice to the function.
    """

    module: str
    function: str
    arrays: tuple
    options: Mapping
    blocks: Mapping | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """What the compiler said: bytes on the device and counts of INSTRUCTIONS, or an error with its reason.

    error: "registers" (it would spill some to memory), "shared memory" (too much for a block), "compile" (anything
    else), "died" (the compiler took the process with it).
    """

    error: str | None = None
    reason: str = ""
    temp_bytes: int = 0
    argument_bytes: int = 0
    output_bytes: int = 0
    instructions: Mapping = dataclasses.field(default_factory=dict)


def run(jobs: Iterable[Job], python: str, timeout: float = 600.0) -> Iterator[Result]:
    """Yield a result per job, compiled by the interpreter `python`; `timeout` is seconds for all of them."""
    queue = collections.deque(jobs)
    while queue:
        with tempfile.TemporaryDirectory(prefix="kernels-aot-gpu-") as folder:
            lines = "".join(json.dumps(dataclasses.asdict(job)) + "\n" for job in queue)
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[2]),
                "TF_CPP_MIN_LOG_LEVEL": "3",
                # Only PTX: everything that can be dumped is 1000 times as much and takes 10 times as long.
                "XLA_FLAGS": "--xla_gpu_fail_ptx_compilation_on_register_spilling=true "
                f"--xla_dump_to={folder} --xla_dump_emitter_re=ptx",
            }
            done = subprocess.run(
                [python, "-m", "kernels.aot.gpu", folder],
                input=lines,
                capture_output=True,
                text=True,
                env=environment,
                timeout=timeout,
            )
        for line in done.stdout.splitlines():
            queue.popleft()
            yield Result(**json.loads(line))
        if queue:
            queue.popleft()
            said = done.stderr.strip().splitlines() or ["nothing said"]
            yield Result("died", f"exit {done.returncode}: {said[-1][:300]}")


def main(folder: pathlib.Path) -> None:
    """Serve jobs from standard input; `folder` is where XLA_FLAGS tells the compiler to leave its PTX."""
    # Libraries print to standard output; results go where nothing else can.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        result = _compile(Job(**json.loads(line)), folder)
        print(json.dumps(dataclasses.asdict(result)), file=results, flush=True)


def _compile(job, folder):
    import jax
    import numpy as np
    from jax.experimental import topologies

    for left in folder.iterdir():
        left.unlink()
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", topology="1x1x1", target_config=TARGET.read_text()
    )
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("device",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arrays = [None if x is None else jax.ShapeDtypeStruct(tuple(x[0]), x[1], sharding=place) for x in job.arrays]
    function, options = _function(job)
    try:
        # The mesh in context tells Pallas which device it lowers for.
        with jax.set_mesh(mesh):
            compiled = jax.jit(lambda *arrays: function(*arrays, **options)).lower(*arrays).compile()
    except Exception as error:  # whatever Pallas, XLA or ptxas refuse
        return _refusal(str(error))
    memory = compiled.memory_analysis()
    ptx = "".join(path.read_text() for path in folder.glob("*.ptx"))
    return Result(
        temp_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        instructions={name: len(re.findall(pattern, ptx)) for name, pattern in INSTRUCTIONS.items()},
    )


def _function(job):
    if job.module.split(".")[0] != "kernels":
        raise ValueError(f"{job.module} is not a module of kernels")
    module = importlib.import_module(job.module)
    blocks = {} if job.blocks is None else {"blocks": _build(module.Blocks, job.blocks)}
    return getattr(module, job.function), {**job.options, **blocks}


def _build(kind, value):
    """Turn nested mappings into the dataclass `kind` and the dataclasses that its fields are declared as."""
    if not dataclasses.is_dataclass(kind):
        return value
    kinds = typing.get_type_hints(kind)
    return kind(**{name: _build(kinds[name], field) for name, field in value.items()})


def _refusal(message):
    line = next(iter(message.strip().splitlines()), "nothing said")[:300]
    for error, words in (("registers", "register spilling"), ("shared memory", "Shared memory size limit")):
        if words in message:
            return Result(error, line)
    return Result("compile", line)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
