"""Find a benchmark by name and run it; without a name, list them."""

import ast
import importlib
import pathlib
import sys

from tinyjax.errors import UserError, nearest


def benchmarks() -> dict[str, str]:
    """Return {name: first line of the docstring} of the modules beside this one that define `main`; imports none."""
    found = {}
    for path in sorted(pathlib.Path(__file__).parent.glob("[!_]*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in module.body):
            found[path.stem] = (ast.get_docstring(module) or "").partition("\n")[0]
    return found


def main(argv: list[str]) -> int:
    """Run `argv` = [name, options ...] and return the exit status: 0, or 2 after one line on bad input."""
    known = benchmarks()
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m experiments.bench NAME [options]\n")
        for name, summary in known.items():
            print(f"  {name:<12} {summary}")
        return 0
    try:
        if argv[0] not in known:
            raise UserError(f"no benchmark {argv[0]}{nearest(argv[0], known)}")
        importlib.import_module(f"experiments.bench.{argv[0]}").main(argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
