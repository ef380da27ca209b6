"""House rules read from the source: which way imports run, how long files are, what no module may do."""

import ast
import importlib.util
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ("kernels", "tinyjax", "experiments", "colab")  # each may import itself and those before it

# Inside tinyjax: a room may import itself and the rooms of the levels before its own.
LEVELS = (
    {"errors", "tree", "config", "sharding"},
    {"models", "data"},
    {"objectives", "optim", "adapt", "surgery"},
    {"train"},
    {"evals", "decode", "scaling", "probes"},
    {"report"},
)
# The level of data comes first, but models and data know nothing of each other; of data, objectives need the packing.
EXCEPT = {("objectives", "tinyjax.data"): {"tinyjax.data.packing"}}
HIGHEST_LINES = 400


def sources(*packages):
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def name_of(path):
    return str(path.relative_to(ROOT))


def imports(path, tree=None):
    """Return the full names that a file imports, wherever in the file, relative ones resolved."""
    tree = tree or ast.parse(path.read_text(encoding="utf-8"))
    package = list(path.relative_to(ROOT).parent.parts)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join(above + ([node.module] if node.module else []))
            found += [f"{base}.{alias.name}" for alias in node.names]
    return found


def level_of(room):
    return next((i for i, rooms in enumerate(LEVELS) if room in rooms), None)


def wrong_arrows(path, names):
    """Return the imports that run against the order of packages or rooms."""
    package, *rest = path.relative_to(ROOT).with_suffix("").parts
    found = []
    for name in names:
        other, *parts = name.split(".")
        if other not in LIBRARY:
            continue
        if LIBRARY.index(other) > LIBRARY.index(package):
            found.append(name)
        elif package == other == "tinyjax" and rest[0] != "__init__" and parts:
            here, there = rest[0], parts[0]
            allowed = EXCEPT.get((here, f"tinyjax.{there}"))
            if here == there:
                continue
            if (
                level_of(there) is None
                or level_of(there) > level_of(here)
                or (level_of(there) == level_of(here) > 0)
                or (allowed and not any(name.startswith(a) for a in allowed))
            ):
                found.append(name)
    return found


def test_every_room_has_its_level():
    rooms = {p.stem if p.is_file() else p.name for p in (ROOT / "tinyjax").iterdir() if p.suffix == ".py" or p.is_dir()}
    unknown = {r for r in rooms if not r.startswith((".", "__"))} - set.union(*LEVELS)
    assert not unknown, f"give {sorted(unknown)} a place in LEVELS"


@pytest.mark.parametrize("path", sources(*LIBRARY), ids=name_of)
def test_imports_run_one_way(path):
    wrong = wrong_arrows(path, imports(path))
    assert not wrong, f"{name_of(path)} imports {', '.join(wrong)}, which stands to its right"


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("tinyjax/models/x.py", "from tinyjax.train import state"),
        ("tinyjax/models/x.py", "def f():\n    import tinyjax.report.page"),
        ("tinyjax/models/x.py", "from ..train import state"),
        ("tinyjax/models/x.py", "from tinyjax.data.store import Split"),
        ("tinyjax/models/x.py", "import experiments.run"),
        ("tinyjax/objectives/x.py", "from tinyjax.data.batches import Batches"),
        ("tinyjax/config.py", "from tinyjax.models.model import Model"),
        ("tinyjax/decode/x.py", "from tinyjax.evals import compression"),
        ("kernels/attention/x.py", "from tinyjax import errors"),
        ("experiments/x.py", "from colab import y"),
    ],
)
def test_a_wrong_arrow_is_found(file, source):
    assert wrong_arrows(ROOT / file, imports(ROOT / file, ast.parse(source)))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("tinyjax/objectives/x.py", "from tinyjax.data.packing import IGNORE"),
        ("tinyjax/train/x.py", "from tinyjax import sharding, tree"),
        ("tinyjax/config.py", "from tinyjax.errors import UserError"),
        ("tinyjax/report/x.py", "from tinyjax.decode import sample\nimport jax\nfrom kernels.attention import api"),
    ],
)
def test_a_right_arrow_is_not(file, source):
    assert not wrong_arrows(ROOT / file, imports(ROOT / file, ast.parse(source)))


@pytest.mark.parametrize("path", sources(*LIBRARY), ids=name_of)
def test_files_hold_one_idea(path):
    assert path.stem not in ("utils", "util", "helpers", "misc", "common")
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= HIGHEST_LINES, f"{lines} lines are two ideas"


MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}


def dangers(tree):
    """Return what in a file could execute data."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [n for n in names if n.split(".")[0] in MODULES]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            found += [called] if called in CALLS else []
            for keyword in node.keywords:
                literal = getattr(keyword.value, "value", None)
                if keyword.arg in ("shell", "allow_pickle") and literal is not False:
                    found.append(f"{called}({keyword.arg}={ast.unparse(keyword.value)})")
    return found


@pytest.mark.parametrize("path", sources("kernels", "tinyjax", "experiments"), ids=name_of)
def test_nothing_executes_data(path):
    assert not dangers(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "exec(text)",
        "import os\nos.system('ls')",
        "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=flag)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_a_danger_is_found(source):
    assert dangers(ast.parse(source))


def test_what_only_looks_dangerous_is_not():
    assert not dangers(ast.parse("np.load(p, allow_pickle=False); model.eval(); f.lower().compile(); re.compile('x')"))


def modules(*packages):
    found = []
    for package in packages:
        found += [package, *(m.name for m in pkgutil.walk_packages([str(ROOT / package)], package + "."))]
    return found


def test_importing_everything_starts_nothing():
    """No backend is started and no option of JAX is changed by any module of the library.

    Modules whose optional dependencies are absent are left out, each by its own ImportError.
    """
    names = modules("kernels", "tinyjax")
    assert "tinyjax.train.step" in names
    code = f"""
import importlib
import jax
before = dict(jax.config.values)
for name in {names!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert error.name.split(".")[0] not in {LIBRARY!r}, error
        print("left out", name, error.name)
from jax._src import xla_bridge
assert not xla_bridge._backends, "a backend is initialised"
changed = [k for k, v in dict(jax.config.values).items() if before.get(k, v) != v]
assert not changed, changed
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    left_out = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("left out")}
    assert not left_out & {"tinyjax.train.step", "tinyjax.models.model", "kernels.cross_entropy.api"}


@pytest.mark.parametrize("path", sources(*LIBRARY), ids=name_of)
def test_public_modules_say_what_they_are(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{name_of(path)} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name_of(path)}: {node.name} has no docstring"


def test_this_package_is_the_one_under_test():
    assert Path(importlib.util.find_spec("tinyjax").origin).is_relative_to(ROOT)
