"""The house keeps its shape: who may import whom, where work is done, how large a part may grow.

Read off the syntax trees, so that an import inside a function counts too.
"""

from __future__ import annotations

import ast
import pathlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

import hybrid_magic

PACKAGE = pathlib.Path(hybrid_magic.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A room and the rooms that it may look into, besides itself.
GROUND = {"errors", "config", "records"}
MAY_IMPORT = {
    "errors": set(),
    "records": set(),
    "option_values": set(),
    "config": {"errors", "option_values"},
    "datasets": {"errors"},
    "sizes": set(),
    "writing": set(),
    "policy": GROUND | {"findings", "profiles"},
    "run": {"errors", "records", "report", "sizes", "writing"},
    "ablation": {"errors", "records", "policy", "report", "writing"},
    "findings": set(),
    "profiles": {"errors", "findings", "report", "writing"},
    "report": GROUND | {"policy", "run", "ablation", "findings", "profiles"},
    "telemetry": GROUND,
    "adopt": {"errors"},
    "engine": GROUND | {"policy", "run", "sizes", "ablation", "findings", "profiles", "telemetry"},
    "launch": GROUND | {"policy", "run", "report", "engine", "telemetry"},
    "notebook": GROUND
    | {"option_values", "policy", "run", "ablation", "profiles", "report"}
    | {"telemetry", "adopt", "engine", "launch"},
    "hybrid_magic": {
        "errors",
        "records",
        "run",
        "ablation",
        "profiles",
        "engine",
        "launch",
        "notebook",
    },  # the package's own __init__
}
FRONT_ENDS = {"IPython", "ipywidgets", "ipykernel", "traitlets", "comm", "jupyter_client"}
DRAWING = {"matplotlib", "tqdm"}
GAUGES = {"psutil", "pynvml"}
WITHOUT_TORCH = GROUND | {
    *("option_values", "sizes", "writing", "run", "ablation", "findings", "profiles"),
    *("policy", "report", "telemetry", "adopt"),
}


@dataclass(frozen=True)
class Import:
    """`path:line` imports `module`; `lazy`: inside a function; `typing`: for type checkers only."""

    where: str
    room: str
    module: str
    lazy: bool
    typing: bool

    @property
    def target(self) -> str | None:
        """The room of our own that is imported, None for somebody else's module."""
        first, _, rest = self.module.partition(".")
        if first != "hybrid_magic":
            return None
        return rest.partition(".")[0] or "hybrid_magic"

    def __str__(self) -> str:
        return f"{self.where} ({self.room}) imports {self.module}"


def room_of(path: pathlib.Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return "hybrid_magic" if first == "__init__.py" else first.removesuffix(".py")


def absolute(path: pathlib.Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = ("hybrid_magic", *path.relative_to(PACKAGE).parts[:-1])
    kept = package[: len(package) - node.level + 1]
    return ".".join([*kept, *([node.module] if node.module else [])])


def imports_of(path: pathlib.Path, tree: ast.AST | None = None) -> Iterator[Import]:
    def walk(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            where = f"{path.relative_to(PACKAGE)}:{getattr(child, 'lineno', 0)}"
            if isinstance(child, ast.Import):
                for name in child.names:
                    yield Import(where, room_of(path), name.name, lazy, typing)
            elif isinstance(child, ast.ImportFrom):
                module = absolute(path, child)
                for name in child.names:
                    # `from . import run` names a room; `from .run import Run` does not.
                    full = f"{module}.{name.name}" if module == "hybrid_magic" else module
                    yield Import(where, room_of(path), full, lazy, typing)
            else:
                function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from walk(child, lazy or function, typing or checking)

    yield from walk(tree or ast.parse(path.read_text(encoding="utf-8")), False, False)


IMPORTS = [found for path in FILES for found in imports_of(path)]
AT_RUN_TIME = [found for found in IMPORTS if not found.typing]


def calls_in(room: str) -> Iterator[tuple[str, str, ast.Call]]:
    """Yield (file name, where, call) for every call in a room."""
    for path in FILES:
        if room_of(path) == room:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    yield path.name, f"{path.relative_to(PACKAGE)}:{node.lineno}", node


def outside(found: Import, packages: set[str]) -> bool:
    return found.module.partition(".")[0] in packages


def test_every_room_is_on_the_map():
    assert {room_of(path) for path in FILES} <= set(MAY_IMPORT)


def test_imports_between_rooms_run_one_way():
    wrong = [
        str(found)
        for found in IMPORTS
        if found.target
        and found.target != found.room
        and found.target not in MAY_IMPORT[found.room]
        and found.module != "hybrid_magic.__version__"
    ]
    assert wrong == []


def test_only_loading_the_extension_imports_the_notebook_room():
    found = {
        item.module for item in AT_RUN_TIME if item.target == "notebook" and item.room != "notebook"
    }
    planned = "hybrid_magic.notebook.planned"  # hm.explain: parses, and loads no front end
    assert found == {"hybrid_magic.notebook.magics", planned}
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    load = next(node for node in tree.body if getattr(node, "name", "") == "load_ipython_extension")
    modules = [item.module for item in imports_of(PACKAGE / "__init__.py", load)]
    assert modules == ["hybrid_magic.notebook.magics"]


def test_importing_the_package_reaches_only_errors_config_records_and_run():
    eager = {
        found.target
        for found in AT_RUN_TIME
        if found.room in {"hybrid_magic", "run"} and found.target and not found.lazy
    }
    assert eager <= GROUND | {"run", "sizes", "writing"}


def test_decisions_use_the_standard_library_alone():
    wrong = [
        str(found)
        for found in AT_RUN_TIME
        if found.room in GROUND | {"policy"}
        and not found.target
        and not outside(found, set(sys.stdlib_module_names))
    ]
    assert wrong == []


def test_decisions_have_no_clock_and_no_dice():
    wrong = [
        str(found)
        for found in IMPORTS
        if found.room == "policy"
        and outside(found, {"time", "datetime", "random", "os", "pathlib"})
        and not (found.module == "random" and "comparison.py" in found.where)  # one seed, always
    ]
    assert wrong == []


def test_rooms_that_read_saved_runs_never_import_torch():
    wrong = [
        str(found) for found in IMPORTS if found.room in WITHOUT_TORCH and outside(found, {"torch"})
    ]
    assert wrong == []


def test_only_the_notebook_room_knows_a_front_end():
    wrong = [
        str(found) for found in IMPORTS if found.room != "notebook" and outside(found, FRONT_ENDS)
    ]
    assert wrong == []


def test_the_engine_neither_draws_nor_reads_gauges_nor_prints():
    wrong = [
        str(found)
        for found in IMPORTS
        if found.room == "engine" and outside(found, FRONT_ENDS | DRAWING | GAUGES)
    ]
    wrong += [
        where
        for _, where, call in calls_in("engine")
        if ast.unparse(call.func) in {"print", "input", "sys.stdout.write", "sys.stderr.write"}
    ]
    assert wrong == []


def test_gauges_are_read_in_telemetry_alone_and_loaded_when_a_run_begins():
    importing = re.compile(r"\b(?:import|import_module)\b.*\b(?:" + "|".join(GAUGES) + r")\b")
    found = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        for line in path.read_text(encoding="utf-8").splitlines()
        if importing.search(line.partition("#")[0]) and '"' in line
    }
    assert found == {"telemetry/host.py", "telemetry/nvml.py"}
    named = [str(item) for item in IMPORTS if outside(item, GAUGES)]
    assert named == []


def test_matplotlib_is_imported_when_something_is_drawn_and_never_through_pyplot():
    drawing = [found for found in AT_RUN_TIME if outside(found, {"matplotlib"})]
    assert [str(found) for found in drawing if found.room not in {"report", "notebook"}] == []
    assert [str(found) for found in drawing if not found.lazy] == []
    assert [str(found) for found in drawing if "pyplot" in found.module] == []


def test_the_package_itself_loads_torch_and_ipython_only_when_asked():
    eager = [
        str(found)
        for found in AT_RUN_TIME
        if found.room == "hybrid_magic" and outside(found, {"torch", "IPython"})
    ]
    assert eager == []


def test_one_backward_and_one_optimizer_step_in_the_package():
    backward, steps = [], []
    for room in MAY_IMPORT:
        for name, where, call in calls_in(room):
            if not isinstance(call.func, ast.Attribute):
                continue
            receiver = ast.unparse(call.func.value).lower()
            if call.func.attr == "backward" and "session" not in receiver:
                backward.append((room, name, where))
            elif call.func.attr == "step" and "schedul" not in receiver:
                steps.append((room, name, where))
    assert [place[:2] for place in backward] == [("engine", "step.py")], backward
    assert [place[:2] for place in steps] == [("engine", "step.py")], steps


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_part_stays_small_enough_to_be_read(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 300, f"{path.name} has {text.count(chr(10))} lines; wanted 300"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            most = 90 if (path.name, node.name) == ("train.py", "train") else 60
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= most, f"{path.name}:{node.lineno} {node.name} has {lines} lines"


def test_every_file_says_what_it_is_and_has_a_name_that_says_it():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert not text.strip() or ast.get_docstring(ast.parse(text)), (
            f"{path} opens without a word"
        )
        assert path.stem not in {"utils", "common", "helpers", "misc", "base"}
