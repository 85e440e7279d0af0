"""The rules of the house: what may import what, what is public, what ships.

The rules are functions of a house, a mapping of module names to parsed sources. Each is tried on a
small house that breaks it, so that it is known to notice, and then holds for psframe.
"""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
House = Mapping[str, ast.Module]

# What a number is; who may do what, and when; how bytes move. All else is the front hall, above
# them, and psframe/__init__.py is above that.
FLOORS = (
    ("errors", "layout", "packing", "snapshots", "optim", "stale", "codecs"),
    (
        "consistency",
        "batches",
        "pacing",
        "coding",
        "reads",
        "paired",
        "device_store",
        "state",
        "blocks",
        "draws",
        "keeping",
        "marking",
        "deciding",
        "leases",
        "work",
        "waves",
        "store",
        "events",
        "ledger",
        "server",
        "leader",
        "follower",
        "worker",
    ),
    ("wire", "devices", "server_device", "launcher", "alarm", "transports"),
)
PURE = FLOORS[1]
IMPURE_MODULES = frozenset(
    "asyncio cupy datetime logging mpi4py multiprocessing os random secrets select signal socket"
    " subprocess sys threading time uuid".split()
)
IMPURE_CALLS = frozenset(("print", "input", "open"))
# Read or run a pickle or any other code that arrives as data.
CODE_FROM_DATA_MODULES = frozenset(
    "pickle cPickle _pickle dill cloudpickle joblib marshal shelve".split()
)
CODE_FROM_DATA_CALLS = frozenset(("eval", "exec"))
CODE_FROM_DATA_EXEMPT: frozenset[str] = frozenset()  # modules, each with its reason beside it
# mpi4py's methods for Python objects, which pickle. Those for buffers begin with a capital.
PICKLING_METHODS = frozenset(
    "send recv isend irecv issend ssend bsend ibsend sendrecv bcast gather allgather scatter"
    " alltoall reduce allreduce scan exscan".split()
)
HEAVY = (
    *("cupy", "greenlet", "matplotlib", "mpi4py", "numba", "pyarrow", "rich", "safetensors"),
    *("tensorboard", "tyro"),
)


# ---- reading the house ----


def read_house() -> House:
    house = {}
    for path in sorted((ROOT / "psframe").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        house[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return house


def house_of(**sources: str) -> House:
    """A small house: ``house_of(optim__sgd="import time")`` has the module psframe.optim.sgd."""
    names = {name: "psframe." + name.replace("__", ".") for name in sources if name != "init"}
    return {names.get(name, "psframe"): ast.parse(text) for name, text in sources.items()}


class Import(NamedTuple):
    module: str  # the module of the house that imports
    target: str  # what it imports, with the name after `from x import` where there is one
    line: int
    lazy: bool  # inside a function
    for_types: bool  # under `if TYPE_CHECKING`


def imports_of(module: str, tree: ast.Module) -> Iterator[Import]:
    def visit(node: ast.AST, lazy: bool, for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno, lazy, for_types)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import (ruff's TID252)"
            for alias in node.names:
                target = f"{node.module}.{alias.name}"
                yield Import(module, target, node.lineno, lazy, for_types)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                yield from visit(child, lazy, True)
            for child in node.orelse:
                yield from visit(child, lazy, for_types)
        else:
            lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, lazy, for_types)

    yield from visit(tree, False, False)


def all_imports(house: House) -> list[Import]:
    return [found for module, tree in house.items() for found in imports_of(module, tree)]


def inside(house: House, found: Import) -> str | None:
    """The module of the house that an import names: itself or, for `from x import name`, x."""
    if found.target in house:
        return found.target
    parent = found.target.rpartition(".")[0]
    return parent if parent in house else None


def top(dotted: str) -> str:
    return dotted.partition(".")[0]


def room(module: str) -> str:
    """The part of a module's name that decides its floor: optim for psframe.optim.sgd."""
    return module.split(".")[1] if "." in module else ""


def floor(module: str) -> int:
    if module == "psframe":
        return len(FLOORS) + 1
    return next((i for i, rooms in enumerate(FLOORS) if room(module) in rooms), len(FLOORS))


# ---- the rules: each returns what breaks it ----


def imports_going_up(house: House) -> list[str]:
    targets = [(found, inside(house, found)) for found in all_imports(house)]
    return [
        f"{found.module}:{found.line} imports {target}, which is on a higher floor"
        for found, target in targets
        if target is not None and floor(target) > floor(found.module) and floor(found.module) < 3
    ]


def import_cycles(house: House) -> list[str]:
    edges: dict[str, set[str]] = {module: set() for module in house}
    for found in all_imports(house):
        target = inside(house, found)
        # What the package imports for types it does import, when it is asked for.
        if target is not None and (found.module == "psframe" or not found.for_types):
            edges[found.module].add(target)
    cycles: list[str] = []
    state: dict[str, str] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        state[module] = "open"
        for target in sorted(edges[module]):
            if state.get(target) == "open":
                route = (*path, module)
                cycles.append(" -> ".join((*route[route.index(target) :], target)))
            elif target not in state:
                visit(target, (*path, module))
        state[module] = "done"

    for module in sorted(edges):
        if module not in state:
            visit(module, ())
    return cycles


def strangers_to_mpi4py(house: House) -> list[str]:
    return [
        f"{found.module}:{found.line} imports mpi4py; only psframe.transports.mpi does"
        for found in all_imports(house)
        if top(found.target) == "mpi4py" and found.module != "psframe.transports.mpi"
    ]


def eager_or_strange_cupy(house: House) -> list[str]:
    return [
        f"{found.module}:{found.line} imports {found.target}: CuPy is imported inside functions of"
        " devices, server_device and optim only"
        for found in all_imports(house)
        if top(found.target) in ("cupy", "cupyx")
        and not found.for_types
        and not (found.lazy and room(found.module) in ("devices", "server_device", "optim"))
    ]


def impurities(house: House) -> list[str]:
    broken = []
    for module, tree in house.items():
        if room(module) not in PURE:
            continue
        found = list(imports_of(module, tree))
        broken += [
            f"{module}:{one.line} imports {one.target}"
            for one in found
            if top(one.target) in IMPURE_MODULES or one.target.startswith("numpy.random")
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "random":
                broken.append(f"{module}:{node.lineno} uses {ast.unparse(node)}")
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in IMPURE_CALLS:
                broken.append(f"{module}:{node.lineno} calls {ast.unparse(node.func)}()")
    return broken


def code_from_data(house: House) -> list[str]:
    broken = []
    for module, tree in house.items():
        if module in CODE_FROM_DATA_EXEMPT:
            continue
        for found in imports_of(module, tree):
            if top(found.target) in CODE_FROM_DATA_MODULES:
                broken.append(f"{module}:{found.line} imports {found.target}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                broken += [f"{module}:{node.lineno} {what}" for what in _unsafe_call(module, node)]
    return broken


def _unsafe_call(module: str, call: ast.Call) -> Iterator[str]:
    function = ast.unparse(call.func)
    if function.removeprefix("builtins.") in CODE_FROM_DATA_CALLS:
        yield f"calls {function}()"
    for keyword in call.keywords:
        if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False":
            yield f"passes {ast.unparse(keyword)}"
    owner, _, method = function.rpartition(".")
    if (
        module == "psframe.transports.mpi"
        and method in PICKLING_METHODS
        and re.search(r"comm(unicator)?(world|self)?$", owner.lower().replace("_", ""))
    ):
        yield f"calls {function}(), which pickles"


def names_defined(tree: ast.Module) -> set[str]:
    """The names that a module's top level binds, those under an if or a try included."""
    names: set[str] = set()
    stack: list[ast.stmt] = list(tree.body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.If | ast.Try | ast.With):
            stack += [child for child in ast.walk(node) if isinstance(child, ast.stmt)][1:]
    return names


def names_imported(tree: ast.Module) -> set[str]:
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {(alias.asname or top(alias.name)) for node in nodes for alias in node.names}


def declared_all(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [str(name) for name in ast.literal_eval(node.value)]
    return None


def wrong_all(house: House) -> list[str]:
    broken = []
    for module, tree in house.items():
        defined, names = names_defined(tree), declared_all(tree)
        public = {name for name in defined if not name.startswith("_")}
        if names is None:
            if public and not module.endswith(".__main__"):
                broken.append(f"{module} defines {', '.join(sorted(public))} and no __all__")
            continue
        broken += [
            f"{module}.__all__ has {name}, which the module does not define"
            for name in names
            if name not in defined | names_imported(tree)
            and f"{module}.{name}" not in house
            and "__getattr__" not in defined
        ]
    return broken


def undeclared_dependencies(house: House) -> list[str]:
    """What is imported must be required or, if only when it is needed, an extra."""
    declared = {"numpy", "psframe", "cupy", "cupyx"} | names_of(PROJECT["dependencies"])
    extras = names_of(t for texts in PROJECT["optional-dependencies"].values() for t in texts)
    return [
        f"{found.module}:{found.line} imports {top(found.target)}, not a dependency in pyproject"
        for found in all_imports(house)
        if top(found.target)
        not in declared
        | set(sys.stdlib_module_names)
        | {"tomllib"}
        | (extras if found.lazy or found.for_types else set())
    ]


def names_of(requirements: Iterable[str]) -> set[str]:
    return {re.split(r"[^\w-]", text, maxsplit=1)[0] for text in requirements}


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PSFRAME = read_house()

Rule = Callable[[House], list[str]]
BROKEN: list[tuple[Rule, House]] = [
    (imports_going_up, house_of(layout="from psframe.store import Store", store="")),
    (imports_going_up, house_of(store="def f():\n from psframe import wire", wire="")),
    (imports_going_up, house_of(wire="from psframe.runtime import run", runtime="")),
    (imports_going_up, house_of(optim__sgd="from psframe import run", init="")),
    (import_cycles, house_of(runtime="import psframe.trainer", trainer="import psframe.runtime")),
    (import_cycles, house_of(optim="import psframe.optim.sgd", optim__sgd="import psframe.optim")),
    (import_cycles, house_of(init="from psframe.trainer import fit", trainer="import psframe")),
    (
        import_cycles,
        house_of(
            init="if TYPE_CHECKING:\n from psframe.trainer import fit",
            trainer="from psframe import fit",
        ),
    ),
    (strangers_to_mpi4py, house_of(bench="def f():\n from mpi4py import MPI")),
    (eager_or_strange_cupy, house_of(devices="import cupy")),
    (eager_or_strange_cupy, house_of(runtime="def f():\n import cupy")),
    (impurities, house_of(server="from time import monotonic")),
    (impurities, house_of(leases="def f(n):\n import numpy as np\n return np.random.rand(n)")),
    (impurities, house_of(leases="from numpy.random import default_rng")),
    (impurities, house_of(worker="print(1)")),
    (code_from_data, house_of(checkpoint="import pickle")),
    (code_from_data, house_of(data__files="import numpy\nnumpy.load('x', allow_pickle=True)")),
    (code_from_data, house_of(optim__sgd="def f(text):\n exec(text)")),
    (code_from_data, house_of(transports__mpi="def f(self, x):\n self._comm.bcast(x)")),
    (wrong_all, house_of(layout="class Layout: pass")),
    (wrong_all, house_of(layout="__all__ = ['Layout', 'lost']\nclass Layout: pass")),
    (undeclared_dependencies, house_of(data="from sklearn.datasets import load_digits")),
    (undeclared_dependencies, house_of(report="import matplotlib")),
]


@pytest.mark.parametrize(("rule", "house"), BROKEN)
def test_a_house_that_breaks_the_rule_is_noticed(rule: Rule, house: House) -> None:
    assert rule(house)


def test_what_is_allowed_is_not_noticed() -> None:
    house = house_of(
        errors="__all__ = ['Stopped']\nclass Stopped(Exception): pass",
        devices="def _f():\n import cupy",
        server="from psframe.errors import Stopped\nif TYPE_CHECKING:\n import psframe.worker",
        worker="import psframe.server\nfrom psframe import errors",
        init="from psframe.worker import errors\n__all__ = ['errors']",
    )
    assert [broken for rule in {rule for rule, _ in BROKEN} for broken in rule(house)] == []


@pytest.mark.parametrize("rule", dict.fromkeys(rule for rule, _ in BROKEN))
def test_psframe_keeps_the_rule(rule: Rule) -> None:
    assert len(PSFRAME) > 1
    assert rule(PSFRAME) == []


# ---- the front door ----


def test_import_psframe_imports_nothing_heavy() -> None:
    code = "import sys, psframe; [getattr(psframe, name) for name in psframe.__all__]; "
    code += f"print(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_public_names_resolve() -> None:
    psframe = importlib.import_module("psframe")
    assert len(psframe.__all__) == len(set(psframe.__all__)) > 0
    assert [name for name in psframe.__all__ if not hasattr(psframe, name)] == []


def test_the_package_s_version_is_the_project_s() -> None:
    psframe = importlib.import_module("psframe")
    assert getattr(psframe, "__version__", PROJECT["version"]) == PROJECT["version"]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# ---- what ships ----


def test_digits_are_whole_and_need_no_pickle() -> None:
    """1797 images; the digit counts of optdigits.tes are in its own description."""
    with np.load(ROOT / "psframe/data/digits.npz", allow_pickle=False) as arrays:
        x, y = arrays["x"], arrays["y"]
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((1797, 8, 8), np.uint8, (1797,), np.uint8)
    assert (x.min(), x.max()) == (0, 16)
    assert np.bincount(y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_package_data_exists() -> None:
    toml = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = toml["tool"]["setuptools"]["package-data"]["psframe"]
    assert [one for one in patterns if not list((ROOT / "psframe").glob(one))] == []
