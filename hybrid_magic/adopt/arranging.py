"""Where the statements of a script stand: at the top of the module, or in its main function.

They keep the order in which they were run. Imports, functions, classes and constants stand in the
module; so does whatever these functions read as globals, and all that was run before it; the rest
is for main(): worker processes of a DataLoader import the module and must not run that again.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .names import FUNCTIONS, base, exposed, own_scope
from .pieces import DEFINITIONS, IMPORTS, Piece

_DRAWING = re.compile(r"(rand|perm|sampl|choice|shuffle|normal|uniform)\w*\Z|\bnn\.[A-Z]\w*\Z")
_SURROUNDINGS = {"environ", "putenv", "path", "chdir"}  # what an import may depend on


@dataclass
class Arranged:
    """The parts of a script: imports (text) and pieces of the module, and pieces of main()."""

    imports: list[str]
    module: list[Piece]
    main: list[Piece]


def arrange(kept: Sequence[Piece], needed: set[str]) -> Arranged:
    """Return where each of `kept` stands.

    Args:
        kept: in the order in which they were run.
        needed: names that are needed in the end; others are left out of imports.
    """
    wanted = needed.union(*(piece.now | piece.late for piece in kept))
    imports, rest = _imports(kept, wanted)
    late = set().union(*(piece.late for piece in rest))
    times = [name for piece in rest for name in piece.binds]
    cut = 0
    while True:
        after = rest[cut:]
        hoisted = _hoisted(after, times)
        main = [piece for piece in after if piece not in hoisted]
        body = [piece.node for piece in main]
        local = set().union(*(piece.binds for piece in main))
        outer = (late | exposed(body)) & local  # a function's own names are none of the module's
        inside = [place for place, piece in enumerate(rest) if piece in main]
        binding = [n for n in inside if rest[n].binds & outer or _draws_at_once(rest[n].node)]
        if not binding:
            return Arranged(imports, [*rest[:cut], *hoisted], main)
        cut = max(binding) + 1


def _imports(kept: Sequence[Piece], wanted: set[str]) -> tuple[list[str], list[Piece]]:
    """Return the imports that can stand first, each once, and the other pieces."""
    found: list[str] = []
    rest: list[Piece] = []
    made: dict[str, set[str]] = {}  # what gives a name its values
    for piece in kept:
        for name in piece.binds:
            made.setdefault(name, set()).add(_source(piece, name))
    for piece in kept:
        node = piece.node
        settled = not any(_sets_surroundings(other.node) for other in rest)
        alone = all(len(made[name]) == 1 for name in piece.binds)
        if not (isinstance(node, IMPORTS) and settled and alone):
            rest.append(piece)
            continue
        names = [a for a in node.names if (a.asname or a.name.partition(".")[0]) in wanted]
        text = piece.text
        if len(names) < len(node.names):
            text = ast.unparse(_with_names(node, names))
        found += [text] if text not in found else []
    future = [text for text in found if text.startswith("from __future__")]
    return future + [text for text in found if text not in future], rest


def _source(piece: Piece, name: str) -> str:
    """Return what gives `name` its value in `piece`: the same text for the same import."""
    node = piece.node
    if not isinstance(node, IMPORTS):
        return str(id(piece))
    names = [a for a in node.names if (a.asname or a.name.partition(".")[0]) == name]
    if isinstance(node, ast.Import) and not names[0].asname:
        return f"import {name}"  # torch, of `import torch.nn` and of `import torch`
    return ast.unparse(_with_names(node, names))


def _with_names(node: ast.Import | ast.ImportFrom, names: list[ast.alias]) -> ast.stmt:
    if isinstance(node, ast.Import):
        return ast.Import(names)
    return ast.ImportFrom(node.module, names, node.level)


def _sets_surroundings(node: ast.stmt) -> bool:
    """Return whether a statement may decide what an import after it does."""
    return any(
        isinstance(part, ast.Attribute)
        and part.attr in _SURROUNDINGS
        and base(part) in ("os", "sys")
        for part in own_scope(node)
    )


def _hoisted(pieces: Sequence[Piece], times: Sequence[str]) -> list[Piece]:
    """Return the definitions and constants that may as well stand before all of `pieces`."""
    found: list[Piece] = []
    local: set[str] = set()
    for piece in pieces:
        once = all(times.count(name) == 1 for name in piece.binds)
        stays = _draws_at_once(piece.node) or piece.now & local
        if _defines(piece.node) and once and not stays:
            found.append(piece)
        else:
            local |= piece.binds
    return found


def _draws_at_once(node: ast.stmt) -> bool:
    """Return whether a definition draws random numbers where it stands, so that its place counts:
    `class Net: mask = torch.rand(3)`."""
    inside = node.body if isinstance(node, ast.ClassDef) else []
    parts = [part for each in inside for part in own_scope(each)]
    parts += ast.walk(node.args) if isinstance(node, FUNCTIONS) else []
    calls = [part for part in parts if isinstance(part, ast.Call)]
    return any(_DRAWING.search(ast.unparse(call.func)) for call in calls)


def _defines(node: ast.stmt) -> bool:
    if isinstance(node, DEFINITIONS):
        return True
    if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
        return False
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    if not all(isinstance(target, ast.Name) for target in targets):
        return False
    try:
        ast.literal_eval(node.value)
    except ValueError:
        return False
    return True
