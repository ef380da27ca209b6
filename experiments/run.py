"""The only entry point: run an experiment, continue it, show what it would do, or make its page again.

python -m experiments.run NAME [--preset=cpu] [--set path=value ...] [--workdir=DIR] [--dry_run]
"""

import argparse
import errno
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import machine
from tinyjax.errors import UserError

EXPERIMENT = "experiment.json"
# What a user can mend, told in one line: no room, no permission, no such folder.
MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="python -m experiments.run", description=__doc__, allow_abbrev=False)
    parser.add_argument("name", nargs="?", help="the experiment; see --list")
    parser.add_argument("--list", action="store_true", help="list the experiments and their questions")
    parser.add_argument("--preset", default="cpu", help="a size that the experiment offers (default: %(default)s)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="PATH=VALUE", help="override a config field"
    )
    parser.add_argument("--workdir", type=Path, help="where the run is kept (default: runs/NAME/IDENTITY)")
    parser.add_argument(
        "--cache_dir", type=Path, help="tokenised corpora, compiled programs (default: ~/.cache/tinyjax)"
    )
    parser.add_argument("--dry_run", action="store_true", help="show the resolved config and its cost; run nothing")
    parser.add_argument("--report", action="store_true", help="make the page again from what is stored; train nothing")
    parser.add_argument("--no_huge_pages", action="store_true", help="do not restart with huge pages for malloc")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 2 for bad input, which is told in one line."""
    try:
        return _main(_arguments(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        return _refuse(str(error))
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        return _refuse(
            f"{error.filename or 'a file of the run'}: {os.strerror(error.errno)}; make room or choose others"
        )
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues the run", file=sys.stderr)
        return 130


def _refuse(line: str) -> int:
    print(f"error: {' '.join(line.split())}", file=sys.stderr)
    return 2


def _main(args: argparse.Namespace) -> int:
    from experiments import experiment

    if args.list:
        for name in experiment.names():
            print(f"{name:20} {experiment.load(name).__doc__.splitlines()[0]}")
        return 0
    if not args.name:
        raise UserError(f"name an experiment: {', '.join(experiment.names())}; or see --help")
    module = experiment.load(args.name)
    from tinyjax.config import identity, override

    configs = [override(config, args.set) for config in experiment.trials(module, args.preset)]
    if args.dry_run:
        return _dry_run(args, configs)
    identities = [identity(config) for config in configs]
    folder = args.workdir or Path("runs") / args.name / _joint(identities)[:8]
    if not args.report:
        _restart(args)
    machine.set_up(args.cache_dir or machine.default_cache())
    _own(folder, args.name, configs, write=False)
    page = _report(args, module, configs, folder) if args.report else _run(args, module, configs, folder)
    print(f"page: {page.resolve()}")
    return 0


def _joint(identities: list[str]) -> str:
    import hashlib

    return identities[0] if len(identities) == 1 else hashlib.sha256(" ".join(identities).encode()).hexdigest()


def _restart(args: argparse.Namespace) -> None:
    if args.no_huge_pages or os.environ.get("TINYJAX_HUGE_PAGES") == "0":
        return
    if found := machine.with_huge_pages(dict(os.environ)):
        print(found[0], flush=True)
        machine.restart(found[1])


def _own(folder: Path, name: str, configs: list, write: bool) -> None:
    """Check that `folder` is free or holds these trials, and with `write` note them down in it."""
    from tinyjax.config import differences, identity, to_json
    from tinyjax.train.workdir import read_json, write_json

    mine = {"experiment": name, "trials": {identity(config): to_json(config) for config in configs}}
    if (folder / EXPERIMENT).exists():
        theirs = read_json(folder / EXPERIMENT)
        if theirs == mine:
            return
        held, wanted = (list(x.get("trials", {}).values())[:1] for x in (theirs, mine))
        changed = [f"experiment: {theirs.get('experiment')} -> {name}"] if theirs.get("experiment") != name else []
        changed += differences(held[0], wanted[0]) if held else []
        raise UserError(f"{folder}: holds a run of another config ({'; '.join(changed[:3])}); choose another --workdir")
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / EXPERIMENT, mine)


def _run(args: argparse.Namespace, module, configs: list, folder: Path) -> Path:
    from rich.console import Console

    from tinyjax.decode.sample import samples
    from tinyjax.train import workdir
    from tinyjax.train.loop import Run
    from tinyjax.train.progress import Shown

    cache = args.cache_dir or machine.default_cache()
    for config in configs:
        place = _place(folder, config)
        workdir.inspect(place, config)
        if (place / "measured.json").exists():
            continue
        with Shown(Console()) as progress:
            progress.say(f"run {place}")
            run = Run(config, place, cache, progress)
            _own(folder, args.name, configs, write=True)
            run.train(samples)
            measured = module.measure(run) if hasattr(module, "measure") else {}
            workdir.write_json(place / "measured.json", measured)
    return _report(args, module, configs, folder)


def _place(folder: Path, config) -> Path:
    from tinyjax.config import identity

    return folder / "trials" / identity(config)


def _report(args: argparse.Namespace, module, configs: list, folder: Path) -> Path:
    import dataclasses

    from rich.console import Console

    from experiments.experiment import Trial
    from tinyjax.report import console, document, page
    from tinyjax.report.provenance import provenance
    from tinyjax.train import metrics, workdir

    trials = []
    for config in configs:
        place = _place(folder, config)
        if not (place / "measured.json").exists():
            raise UserError(f"{place}: the run is not finished; run the same command without --report")
        measured = workdir.read_json(place / "measured.json")
        trials.append(Trial(config, workdir.result(place), metrics.read(place), measured))
    report = module.analyse(trials)
    seeds = {"seed": ", ".join(str(seed) for seed in sorted({config.train.seed for config in configs}))}
    identities = {"identity": ", ".join(trial.result["identity"] for trial in trials)}
    report = dataclasses.replace(
        report,
        command=_command(args),
        provenance=provenance(Path(__file__).resolve().parent) | seeds | identities,
    )
    written = page.write(report, folder)
    out = Console()
    for item in report.items:
        if isinstance(item, document.Table):
            console.print_table(item, out)
            break
    for claim in report.claims:
        out.print(f"{claim.verdict}: {claim.sentence} {claim.evidence}", highlight=False, markup=False, soft_wrap=True)
    return written


def _command(args: argparse.Namespace) -> str:
    parts = ["python", "-m", "experiments.run", args.name, f"--preset={args.preset}"]
    parts += ["--set", *args.set] if args.set else []
    parts += [f"--workdir={args.workdir}"] if args.workdir else []
    return shlex.join(parts)


def _dry_run(args: argparse.Namespace, configs: list) -> int:
    import dataclasses

    from rich.console import Console

    from experiments.describe import derived_tables, memory_table
    from tinyjax.config import identity, to_json
    from tinyjax.report.console import print_table
    from tinyjax.train.derived import derive

    machine.set_up(args.cache_dir or machine.default_cache())
    out = Console()
    for config in configs:
        print(json.dumps(to_json(config), indent=2))
        derived = derive(config, config.tokenizer.vocab_size)
        for table in derived_tables(dataclasses.asdict(derived)):
            print_table(table, out)
        print_table(memory_table(config), out)
        if config.tokenizer.kind == "char":
            print("vocabulary: taken at its limit; with kind=char the text may hold fewer characters")
        print(f"identity: {identity(config)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
