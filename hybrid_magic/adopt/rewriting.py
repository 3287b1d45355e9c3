"""A planned program, rewritten: every batch loop asks the engine for its steps.

What the person wrote keeps its lines, so that tracebacks show their own text. Names of ours begin
with `_hybrid_`.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Mapping
from typing import Any

from .cutting import KEPT, VALUES
from .names import FUNCTIONS, bound
from .nodes import attribute, both, is_path, only, placed
from .plan import Loop
from .roles import last_name, text_of
from .units import LOOPS, steady

RUNTIME, LOOP, WORK = "_hybrid_magic", "_hybrid_loop", "_hybrid_step"
FULL = "_hybrid_full"
_ROLE, _PART = "_hybrid_role", "_hybrid_part"


def rewritten(
    tree: ast.Module, loops: list[Loop], sites: Mapping[int, int], trainers: set[str]
) -> ast.Module:
    """Return a program whose steps run on the engine; `tree` itself is not changed.

    Args:
        loops: the plan's loops.
        sites: the number of each loop (by its line) under which the runtime knows it.
        trainers: names of functions, made earlier, that train when they are called.
    """
    for loop in loops:
        _mark(loop, sites[loop.line])
    own = {loop.unit.function.name for loop in loops if loop.unit.function is not None}
    shadowed = any(isinstance(n, ast.Name) and n.id == "len" and isinstance(n.ctx, ast.Store)
                   for n in ast.walk(tree))  # fmt: skip
    by_site = {sites[loop.line]: loop for loop in loops}
    made = _Rewriter(by_site, own | trainers, lengths=not shadowed).visit(copy.deepcopy(tree))
    return ast.fix_missing_locations(made)


def _mark(loop: Loop, site: int) -> None:
    """Write on the nodes of a unit what they are; copies of them carry it along."""
    unit = loop.unit
    marked: list[tuple[Any, Any]] = [(call, ("step", owner)) for call, owner in unit.roles.steps]
    marked += [(call, ("advance", owner)) for call, owner in unit.roles.advances]
    marked += [(call, ("drop", None)) for call in unit.roles.dropped]
    if loop.mode == "verbatim":
        marked += [(found.call, ("backward", found.loss)) for found in unit.roles.backwards]
        ends = unit.roles.backwards[-1].call.lineno
        for node in unit.roles.zeroed:
            setattr(node, _ROLE, ("first" if node.lineno <= ends else "last", None))
        for node in unit.roles.clipped:
            setattr(node, _ROLE, ("clip", None))
    for node, role in marked:
        setattr(node, _ROLE, role)
    if unit.node is not None:
        unit.node._hybrid_site = site
    else:
        calls = {call for call, _ in unit.roles.steps} | {b.call for b in unit.roles.backwards}
        for statement in unit.body:
            if calls & set(ast.walk(statement)) or statement in unit.roles.zeroed:
                setattr(statement, _PART, site)
    if unit.loader is not None and not unit.aside:
        setattr(unit.loader, _ROLE, ("loader", None))


class _Rewriter(ast.NodeTransformer):
    def __init__(self, loops: dict[int, Loop], trainers: set[str], *, lengths: bool) -> None:
        self._loops, self._trainers, self._lengths = loops, trainers, lengths

    # -- the units --

    def visit(self, node: ast.AST) -> Any:
        site = getattr(node, "_hybrid_site", None)
        if site is not None and isinstance(node, (*LOOPS, *FUNCTIONS)):
            del node._hybrid_site  # type: ignore[attr-defined]
            return self._unit(node, site)
        role = getattr(node, _ROLE, None)
        if role is not None:
            return self._role(node, *role)
        return super().visit(node)

    def visit_Module(self, node: ast.Module) -> ast.Module:
        for site in {getattr(item, _PART) for item in node.body if hasattr(item, _PART)}:
            node.body = self._statements(node.body, site)
        self.generic_visit(node)
        return node

    def _unit(self, node: Any, site: int) -> Any:
        loop = self._loops[site]
        if isinstance(node, FUNCTIONS):
            head = node.body[: ast.get_docstring(node, clean=False) is not None]
            original = copy.deepcopy(node.body[len(head) :])
            body = self._body(loop, len(head))
            taken = self._within(site, self._work(loop) + body, original[0])
            node.body = [*head, self._guarded(loop, taken, original)]
            return node
        original = copy.deepcopy(node)
        node.body = self._body(loop)
        if hasattr(node, "iter"):
            node.iter = self.visit(node.iter)
        else:
            node.test = both(f"{LOOP}.going", self.visit(node.test))
        node.orelse = self._visited(node.orelse)
        taken: ast.stmt = self._within(site, [*self._work(loop), node], node)
        return self._guarded(loop, taken, [original])

    def _guarded(self, loop: Loop, taken: ast.stmt, original: list[Any]) -> ast.stmt:
        """Return what trains, in the loop's own words where it decides beforehand not to train."""
        guards = copy.deepcopy(loop.unit.guards)
        if not guards or not steady(loop.unit, loop.unit.guards):
            return taken
        test = guards[0] if len(guards) == 1 else ast.BoolOp(ast.And(), guards)
        return placed(ast.If(test, [taken], list(map(_unmarked, original))), taken)

    def _within(self, site: int, body: list[ast.stmt], at: ast.stmt) -> ast.stmt:
        opened: Any = ast.parse(f"with {RUNTIME}.loop({site}) as {LOOP}: pass").body[0]
        opened.body = body
        return placed(opened, at)

    def _work(self, loop: Loop) -> list[ast.stmt]:
        """Return the definition of what runs per micro-batch."""
        split = loop.split
        if split is None:
            return []
        made: Any = ast.parse(f"def {WORK}({', '.join(split.params)}): pass").body[0]
        body = self._visited(copy.deepcopy(split.work))
        # without a backward() on the way there is no loss; the names are handed back all the same
        none: Any = ast.parse("def f():\n return None, locals()").body[0]
        ended = placed(none.body[0], loop.unit.body[-1])
        made.body = [*body, ended] if loop.unit.guards else body
        return [placed(made, loop.unit.body[0])]

    def _body(self, loop: Loop, head: int = 0) -> list[ast.stmt]:
        split = loop.split
        if split is None:
            return self._verbatim(copy.deepcopy(loop.unit.body[head:]))
        before = self._visited(copy.deepcopy(split.before))
        after = self._visited(copy.deepcopy(split.after))
        kept = [f"**{VALUES}"] if split.captured else []
        late = [f"{name!r}: {name}" for name in split.params if name not in split.captured]
        handed = f"{{{', '.join([*kept, *late])}}}"
        text = f"{KEPT} = {LOOP}.accumulate({WORK}, {handed}, {tuple(split.kept)!r})"
        end = loop.unit.roles.backwards[0].call
        return [*before, placed(ast.parse(text).body[0], end), *after]

    def _verbatim(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """Return the body as written, with autocast up to the statement that calls backward()."""
        at = next(
            (
                n
                for n, node in enumerate(body)
                if any(_is_backward(part) for part in ast.walk(node))
            ),
            0,
        )
        alone = isinstance(body[at], ast.Expr)
        inside, rest = (body[:at], body[at:]) if alone else (body[: at + 1], body[at + 1 :])
        inside, rest = self._visited(inside), self._visited(rest)
        if not inside:
            return rest
        assigned = [n for n in inside if isinstance(n, (ast.Assign, ast.AnnAssign))]
        names = sorted(set().union(*map(bound, assigned)))
        opened: Any = ast.parse(f"with {LOOP}.forwarding() as {FULL}: pass").body[0]
        opened.body = inside
        full = [ast.parse(f"{name} = {FULL}({name})").body[0] for name in names]
        return [placed(opened, inside[0]), *rest[:1], *(placed(n, inside[-1]) for n in full),
                *rest[1:]]  # fmt: skip

    def _statements(self, body: list[ast.stmt], site: int) -> list[ast.stmt]:
        """Return plain statements with those of the step, below its optimizer, taken over."""
        loop = self._loops[site]
        steps = [n for n, node in enumerate(body) if getattr(node, _PART, None) == site]
        optimizer = loop.optimizer
        made = [
            n
            for n, node in enumerate(body)
            if isinstance(node, ast.Assign) and optimizer in map(text_of, node.targets)
        ]
        first, last = max(made, default=-1) + 1, max(steps)
        head = [
            n for n in range(first, last) if not isinstance(body[n], (ast.Import, ast.ImportFrom))
        ]
        start = min(head, default=last)
        for node in body:
            if getattr(node, _PART, None) == site:
                delattr(node, _PART)
        taken = self._within(site, self._verbatim(body[start : last + 1]), body[start])
        return [*body[:start], taken, *body[last + 1 :]]

    # -- what its statements become --

    def _visited(self, body: list[ast.stmt]) -> list[ast.stmt]:
        found: list[ast.stmt] = []
        for node in body:
            made = self.visit(node)
            found += made if isinstance(made, list) else [made]
        return found

    def _role(self, node: Any, role: str, other: Any) -> Any:
        delattr(node, _ROLE)
        if role in ("first", "last"):
            return only(attribute(LOOP, role), self.visit(node))
        if role == "clip":
            return self.visit(node)  # its statement is wrapped in visit_Expr / visit_Assign
        if role == "loader":
            return placed(ast.Call(attribute(LOOP, "loader"), [self.visit(node)], []), node)
        if role == "drop":
            return ast.copy_location(ast.Constant(None), node)
        arguments = [copy.deepcopy(other)]
        if role == "advance":
            arguments += [self.visit(item) for item in node.args]
        keywords = node.keywords if role == "advance" else []
        return placed(ast.Call(attribute(LOOP, role), arguments, keywords), node)

    def visit_Expr(self, node: ast.Expr) -> Any:
        return self._clipping(node)

    def visit_Assign(self, node: ast.Assign) -> Any:
        return self._clipping(node)

    def _clipping(self, node: Any) -> Any:
        held = getattr(node.value, _ROLE, (None,))[0] == "clip"
        self.generic_visit(node)
        return only(attribute(LOOP, "last"), node) if held else node

    def visit_Call(self, node: ast.Call) -> Any:
        counted = self._lengths and isinstance(node.func, ast.Name) and node.func.id == "len"
        if counted and len(node.args) == 1 and is_path(node.args[0]):
            node.func = placed(attribute(RUNTIME, "length"), node.func)
            return node
        self.generic_visit(node)
        return node

    # -- the loops around them --

    def visit_For(self, node: ast.For) -> Any:
        if self._trains(node):
            read = ast.Call(attribute(RUNTIME, "epochs"), [node.iter], [])
            node.iter = placed(read, node.iter)
        self.generic_visit(node)
        return node

    def visit_While(self, node: ast.While) -> Any:
        if not self._trains(node):
            self.generic_visit(node)
            return node
        mark = f"_hybrid_mark_{node.lineno}"
        begun = placed(ast.parse(f"{mark} = {RUNTIME}.mark()").body[0], node)
        node.test = both(f"{RUNTIME}.going({mark})", node.test)
        self.generic_visit(node)
        return [begun, node]

    def _trains(self, node: ast.AST) -> bool:
        for part in ast.walk(node):
            if hasattr(part, "_hybrid_site") and not isinstance(part, FUNCTIONS):
                return True
            if isinstance(part, ast.Call) and last_name(part.func) in self._trainers:
                return True
        return False


def _unmarked(node: Any) -> Any:
    for part in ast.walk(node):
        for name in (_ROLE, "_hybrid_site"):
            if hasattr(part, name):
                delattr(part, name)
    return node


def _is_backward(node: ast.AST) -> bool:
    return getattr(node, _ROLE, (None,))[0] == "backward"
