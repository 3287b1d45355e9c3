"""Which names a piece of a program gives values, reads, and changes in place.

Reads the syntax tree alone. What runs later (bodies of functions, lambdas) reads names and binds
none of this scope's.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Sequence

SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def own_scope(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what runs in the scope of `node`, in the order of the text: no body of a function, no
    variable of a comprehension."""
    yield node
    if isinstance(node, SCOPES):
        return
    for child in ast.iter_child_nodes(node):
        if not (isinstance(node, ast.comprehension) and child is node.target):
            yield from own_scope(child)


def own_scopes(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    for node in nodes:
        yield from own_scope(node)


def bound(node: ast.AST) -> set[str]:
    """Return the names that `node` and what is in it give a value in its own scope."""
    return set().union(*map(binds, own_scope(node)))


def binds(node: ast.AST) -> set[str]:
    """Return the names that this one node gives a value."""
    match node:
        case ast.Name(id=name, ctx=ast.Store()):
            return {name}
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.alias(name=name, asname=other):
            return {other or name.partition(".")[0]}
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
            return {name}
        case ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
            return {name}
        case ast.Global(names=names) | ast.Nonlocal(names=names):
            return set(names)
    return set()


def reads(node: ast.AST) -> set[str]:
    """Return the names that `node` reads, now or (in functions made here) later."""
    found: set[str] = set()
    _read(node, frozenset(), found)
    return found


def _read(node: ast.AST, local: frozenset[str], found: set[str]) -> None:
    if isinstance(node, ast.Name):
        if isinstance(node.ctx, ast.Load) and node.id not in local:
            found.add(node.id)
        return
    if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
        found.update({node.target.id} - local)
    if isinstance(node, _COMPREHENSIONS):
        local = local.union(*(bound(part.target) for part in node.generators))
    elif isinstance(node, (*FUNCTIONS, ast.Lambda)):
        for outside in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
            _read(outside, local, found)
        local = local | _locals_of(node)
    for child in ast.iter_child_nodes(node):
        _read(child, local, found)


def _locals_of(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> set[str]:
    names = {argument.arg for argument in arguments(function)}
    if isinstance(function, ast.Lambda):
        return names
    inner = list(own_scopes(function.body))
    declared = {
        name
        for node in inner
        if isinstance(node, (ast.Global, ast.Nonlocal))
        for name in node.names
    }
    return (names | set().union(*map(binds, inner))) - declared


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> list[ast.arg]:
    """Return every parameter of a function."""
    given = function.args
    stars = [star for star in (given.vararg, given.kwarg) if star is not None]
    return [*given.posonlyargs, *given.args, *given.kwonlyargs, *stars]


def changed(node: ast.AST) -> set[str]:
    """Return the names whose objects `node` may change in place: `x[0] = 1`, `o.a = 1`,
    `found.append(1)` as a statement, `x.clamp_(0)`, `x += 1`, `del d[k]`."""
    found: set[str] = set()
    for part in own_scope(node):
        match part:
            case (
                ast.Subscript(ctx=ast.Store() | ast.Del())
                | ast.Attribute(ctx=ast.Store() | ast.Del())
            ):
                found.add(base(part))
            case ast.AugAssign(target=target):
                found.add(base(target))
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=value))):
                found.add(base(value))
            case ast.Call(func=ast.Attribute(value=value, attr=attr)) if _in_place(attr):
                found.add(base(value))
    return found - {""}


def _in_place(attr: str) -> bool:
    return attr.endswith("_") and not attr.startswith("_") and not attr.endswith("__")


def base(node: ast.AST) -> str:
    """Return the name at the root of `a.b[c].d()`, "" where there is none."""
    while True:
        match node:
            case ast.Name(id=name):
                return name
            case ast.Attribute(value=inner) | ast.Subscript(value=inner) | ast.Starred(value=inner):
                node = inner
            case ast.Call(func=ast.Attribute(value=inner)):
                node = inner
            case _:
                return ""


def exposed(body: Sequence[ast.stmt], after: frozenset[str] = frozenset()) -> frozenset[str]:
    """Return the names that `body` may read before it has given them a value itself.

    Args:
        body: statements, run in order.
        after: names that are read after them.
    """
    live = after
    for statement in reversed(body):
        live = _exposed(statement, live)
    return live


def _exposed(node: ast.stmt, live: frozenset[str]) -> frozenset[str]:
    match node:
        case ast.If():
            return exposed(node.body, live) | exposed(node.orelse, live) | reads(node.test)
        case ast.With() | ast.AsyncWith():
            inner = exposed(node.body, live)
            for item in reversed(node.items):
                inner -= bound(item.optional_vars) if item.optional_vars is not None else set()
                inner |= reads(item.context_expr)
            return inner
        case ast.For() | ast.AsyncFor():
            skipped = exposed(node.orelse, live) | live
            again = exposed(node.body, skipped) - bound(node.target)
            again = exposed(node.body, skipped | again) - bound(node.target)
            return skipped | again | reads(node.iter) | reads(node.target)
        case ast.While():
            skipped = exposed(node.orelse, live) | live
            again = exposed(node.body, skipped) | reads(node.test)
            return skipped | exposed(node.body, skipped | again) | reads(node.test)
        case ast.Try():
            inner = exposed([*node.body, *node.orelse, *node.finalbody], live) | live
            handlers = (exposed([*h.body, *node.finalbody], live) - binds(h) for h in node.handlers)
            return inner.union(*handlers)
        case ast.Return() | ast.Raise():
            return frozenset(reads(node))
        case ast.Match():
            last = node.cases[-1]
            always = last.guard is None and isinstance(last.pattern, ast.MatchAs)
            found = frozenset() if always and last.pattern.pattern is None else live  # type: ignore[attr-defined]
            for case in node.cases:
                guard = reads(case.guard) if case.guard is not None else set()
                found |= (exposed(case.body, live) | guard) - bound(case.pattern)
            return found | reads(node.subject)
    return (live - bound(node)) | reads(node)


def closure(names: Iterable[str], following: Callable[[str], Iterable[str]]) -> set[str]:
    """Return `names`, and all that follows from them, step by step."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += following(name)
    return found
