"""One optimizer step of a small decoder on CPU: tinyjax against PyTorch, processes taking turns.

Question: how many tokens a second does each of them train, and how far is that from what the machine can multiply?
Command: `python -m experiments.bench train_step` (about 5 minutes on 2 cores, most of it torch.compile).
All contenders start from the same parameters and batch; one whose first loss differs is refused.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import statistics
import subprocess
import sys

import jax.numpy as jnp
from rich.console import Console

from experiments.bench.contenders.process import Contender, Running
from experiments.bench.contenders.workload import Workload
from tinyjax.errors import UserError, nearest
from tinyjax.report.console import print_table
from tinyjax.report.document import Table

BASELINE = "torch"
PEAK = Contender("matmul peak", "peak", {})


def contenders(assignments: list[str]) -> dict[str, Contender]:
    """Return all contenders by name; `assignments` override the config of ours."""

    def ours(name, packed=False, **where):
        return Contender(name, "ours", {"packed": packed, "set": assignments}, **where)

    def torch(name, compiled=False, bf16=False, **where):
        return Contender(name, "pytorch", {"compile": compiled, "bf16": bf16}, **where)

    found = (
        ours("ours"),
        ours("ours_packed", packed=True),
        ours("ours_small_pages", huge_pages=False),
        torch(BASELINE),
        torch("torch_small_pages", huge_pages=False),
        torch("torch_compile", compiled=True),
        torch("torch_bf16", bf16=True),
        torch("torch_compile_bf16", compiled=True, bf16=True),
    )
    return {c.name: c for c in found}


@dataclasses.dataclass(frozen=True)
class Result:
    """Every timed step of one contender, over all rounds."""

    name: str
    first_loss: float  # nats per token, before the first update
    wall: tuple[float, ...]  # seconds
    cpu: tuple[float, ...]  # seconds, summed over threads; spinning threads count too


def torch_version(python: str) -> str | None:
    """Return the version of PyTorch that `python` has, or None. Raises UserError when there is no such interpreter."""
    code = "import importlib.metadata as m; print(m.version('torch'))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"--torch_python={python}: {error.strerror}; give the path of a Python interpreter") from None
    return done.stdout.strip() if done.returncode == 0 else None


def check_same(results: list[tuple[str, float]], tolerance: float) -> None:
    """Raise UserError when first losses (nats) differ by more than `tolerance`: they would not be the same work."""
    (first, expected), *rest = results
    for name, loss in rest:
        if not abs(loss - expected) <= tolerance:
            raise UserError(f"{name} has loss {loss:.5f} on the parameters with which {first} has {expected:.5f}")


def measure(
    chosen: list[Contender], work: Workload, rounds: int, steps: int, torch_python: str
) -> tuple[list[Result], float]:
    """Return the results, and the matmul peak in FLOP/s seen in the same rounds.

    Every round gives each contender `steps` steps in turn, so that a change in the machine's speed meets all of them.
    """
    wall: dict[str, list[float]] = {c.name: [] for c in chosen}
    cpu: dict[str, list[float]] = {c.name: [] for c in chosen}
    best = 0.0
    with contextlib.ExitStack() as stack:
        peak = stack.enter_context(Running(PEAK, work, sys.executable))
        running = []
        for contender in chosen:
            python = torch_python if contender.module == "pytorch" else sys.executable
            running.append(stack.enter_context(Running(contender, work, python)))
        whole = [r for r in running if not r.contender.options.get("packed")]
        # bfloat16 has 8 bits: 0.4 % of a loss of about 9. Float32 contenders agree to 1e-5.
        check_same([(r.contender.name, r.first_loss) for r in whole], 0.02)
        for _ in range(rounds):
            best = max(best, peak.steps(5)["loss"])
            for process in running:
                times = process.steps(steps)
                wall[process.contender.name] += times["wall"]
                cpu[process.contender.name] += times["cpu"]
    names = {r.contender.name: r.first_loss for r in running}
    return [Result(name, loss, tuple(wall[name]), tuple(cpu[name])) for name, loss in names.items()], best


def table(results: list[Result], work: Workload, peak: float, caption: str) -> Table:
    """Return the table of rates; `peak` in FLOP/s."""
    flops = flops_per_step(work)
    baseline = next((min(r.wall) for r in results if r.name == BASELINE), None)
    rows = []
    for r in results:
        best = min(r.wall)
        rows.append(
            (
                r.name,
                1e3 * best,
                1e3 * statistics.median(r.wall),
                1e3 * min(r.cpu),
                work.tokens / best,
                flops / best / 1e9,
                100 * flops / best / peak,
                None if baseline is None else baseline / best,
            )
        )
    columns = ("contender", "best ms", "median ms", "CPU ms", "tokens/s", "GFLOP/s", "% of peak", f"x {BASELINE}")
    return Table("One train step", columns, tuple(rows), caption)


def flops_per_step(work: Workload) -> int:
    """Return matmul FLOPs of forward and backward, attention over all pairs and the head included."""
    from experiments.bench.contenders.ours import run_config
    from tinyjax.models.model import Model

    per_token = Model(run_config(work, []).model, work.vocab, jnp.float32).flops_per_token(work.sequence)
    return work.tokens * sum(per_token.values())


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the options. Exits with status 2 and a usage line on a malformed one, as argparse does."""
    parser = argparse.ArgumentParser("python -m experiments.bench train_step", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=_positive, default=5, help="turns of each contender")
    parser.add_argument("--steps", type=_positive, default=4, help="timed steps per turn")
    parser.add_argument("--contenders", help=f"comma-separated, of {', '.join(contenders([]))}; default: all")
    parser.add_argument("--torch_python", default=sys.executable, help="interpreter that has PyTorch")
    parser.add_argument(
        "--set", action="append", default=[], help="override of our config, for example model.remat=full"
    )
    parser.add_argument("--json", type=pathlib.Path, help="also write all times to this file")
    for field in dataclasses.fields(Workload):
        parser.add_argument(f"--{field.name}", type=_positive, default=field.default)
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def choose(names: str | None, assignments: list[str], have_torch: bool) -> list[Contender]:
    """Return the contenders of a comma-separated list that can run. Raises UserError for an unknown name."""
    known = contenders(assignments)
    wanted = list(known) if names is None else names.split(",")
    for name in wanted:
        if name not in known:
            raise UserError(f"--contenders: no contender {name}{nearest(name, known)}")
    chosen = [known[name] for name in wanted if have_torch or known[name].module != "pytorch"]
    if not chosen:
        raise UserError("--contenders: all of them need PyTorch; add ours, or pip install 'tinyjax[rivals]'")
    return chosen


def write_json(path: pathlib.Path, data: dict) -> None:
    """Write the file in one piece. Raises UserError when the place cannot be written."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"--json={path}: {error.strerror}; choose a file in a folder that exists") from None


def main(argv: list[str]) -> None:
    """Measure and print the table."""
    options = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 100)
    work = Workload(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Workload)})
    if work.width % (2 * work.heads):
        raise UserError(f"--heads={work.heads}: heads of an even width must fill --width={work.width}")
    version = torch_version(options.torch_python)
    if version is None:
        console.print(
            f"only ours: {options.torch_python} has no PyTorch; pip install 'tinyjax[rivals]', or name an interpreter "
            "that has it with --torch_python",
            markup=False,
        )
    chosen = choose(options.contenders, options.set, version is not None)
    results, peak = measure(chosen, work, options.rounds, options.steps, options.torch_python)
    versions = {"jax": importlib.metadata.version("jax"), "torch": version}
    caption = (
        f"{work.tokens} tokens and {flops_per_step(work) / 1e9:.1f} GFLOP a step; peak {peak / 1e9:.0f} GFLOP/s "
        f"(float32 matmul, same run); JAX {versions['jax']}, PyTorch {version or 'absent'}, {os.cpu_count()} cores"
    )
    print_table(table(results, work, peak, caption), console)
    if options.json:
        data = {"work": dataclasses.asdict(work), "set": options.set, "versions": versions, "peak_flops": peak}
        write_json(options.json, data | {"results": [dataclasses.asdict(r) for r in results]})
