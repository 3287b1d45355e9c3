"""What calls and stores change in place, at the top of a cell and in what the notebook's own
functions and methods do when they are called.

A call that stands for itself is taken to change what it is called on, unless its words say that it
looks. Runs nothing.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .holding import aliases, behind, handed_on
from .names import FUNCTIONS, arguments, bound, reads
from .roles import last_name
from .world import SHOWING, World

_LOOKING = re.compile(
    r"(print|pprint|display|show|plot|hist|draw|view|visuali[sz]e|summar|describe|info|head|tail"
    r"|save|export|dump|watch|log|write|evaluat|validat|test|close|sleep|empty_cache|synchronize"
    r"|reset_peak|memory_|add_(graph|scalar|image|figure|hist)|zero_grad|item|numpy|tolist|unique"
    r"|value_counts|size|numel|mean|sum|min|max|argmax|state_dict|count|check|inspect|len|type)"
    r"\w*\Z",
    re.IGNORECASE,
)
_CHANGING = re.compile(  # whatever becomes of what they return
    r"(load_state_dict|register_|add_(tokens|special|module|param|hook)|set_|setdefault|apply\Z"
    r"|fit\Z|fit_transform|partial_fit|pop|resize_token|remove|shuffle|append|insert|extend"
    r"|manual_seed|seed|use_deterministic|__(set|del)\w+__\Z)"
)
_MOVING = {"to", "cuda", "cpu", "half", "float", "double", "bfloat16", "type"}
_MODES = {"train", "eval", "zero_grad"}
_GENERATORS = {"Generator", "RandomState", "Random"}  # each draw changes them


@dataclass(frozen=True)
class Called:
    """What a call of a function changes: `given`, parameters; `outside`, names of the notebook's;
    `gives`: names of the notebook's that it gives a value."""

    given: frozenset[str] = frozenset()
    outside: frozenset[str] = frozenset()
    gives: frozenset[str] = frozenset()


@dataclass
class Change:
    """Names whose objects a statement changes, and those whose objects these hold from then on."""

    names: set[str]
    stored: set[str]


Lookup = Callable[[ast.stmt], Called]


@dataclass
class Scope:
    """Where statements stand: their `local` names are none of the notebook's; `done` says what a
    call of a function does; `turning` are the variables of loops."""

    world: World
    local: frozenset[str]
    done: Lookup
    turning: frozenset[str] = frozenset()

    def package(self, names: set[str]) -> str | None:
        """Return the package that one of `names` was imported from."""
        found = (self.world.given[n].package for n in names - self.local if n in self.world.given)
        return next(filter(None, found), None)

    def data(self, *parts: ast.AST) -> set[str]:
        """Return the names in `parts` that are neither imported nor defined."""
        names = set().union(*map(reads, parts))
        given = self.world.given
        return {n for n in names if n in self.local or n not in given or self.world.is_data(n)}

    def own(self, call: ast.Call) -> list[ast.stmt]:
        """Return the functions of the notebook that a call may run."""
        match call.func:
            case ast.Name(id=name) if name not in self.local:
                found = self.world.definition(name)
                if isinstance(found, ast.ClassDef):
                    return list(_named(found, "__init__"))
                return [found] if isinstance(found, FUNCTIONS) else []
            case ast.Attribute(value=owner, attr=attr):
                roots = handed_on(self.world, owner, held=True)
                if roots & self.local:  # of which kind is not known
                    return self.world.methods_named(attr)
                return self.world.methods(roots, attr)
        return []


def _named(kind: ast.ClassDef, name: str) -> list[ast.stmt]:
    return [node for node in kind.body if isinstance(node, FUNCTIONS) and node.name == name]


def changes(scope: Scope, parts: Sequence[ast.AST], top: ast.AST | None = None) -> Iterator[Change]:
    """Yield what the nodes `parts` of a scope change; `top`: the statement that they are."""
    world = scope.world
    for part in parts:
        match part:
            case ast.Expr(value=ast.Call() as call):
                yield from _for_effect(scope, call, nested=part is not top)
            case (
                ast.Expr(value=ast.ListComp(elt=ast.Call() as call))
                | ast.Assign(targets=[ast.Name(id="_")], value=ast.ListComp(elt=ast.Call() as call))
            ):
                yield from _for_effect(scope, call, nested=True)
            case ast.Call():
                yield from _of_call(scope, part)
            case ast.Assign(targets=targets, value=value):
                stores = [n for t in targets for n in ast.walk(t) if _is_store(n)]
                for store in stores:
                    yield Change(handed_on(world, store), handed_on(world, value, held=True))
            case ast.AugAssign(target=target, value=value):
                yield Change(handed_on(world, target), handed_on(world, value))
            case ast.Attribute() | ast.Subscript() if _is_store(part):
                yield Change(handed_on(world, part), set())


def _is_store(node: ast.AST) -> bool:
    is_part = isinstance(node, (ast.Attribute, ast.Subscript))
    return is_part and isinstance(node.ctx, (ast.Store, ast.Del))


def _for_effect(scope: Scope, call: ast.Call, *, nested: bool) -> Iterator[Change]:
    """Yield what a call changes that stands for itself, beside what any call would."""
    attr, world = last_name(call.func), scope.world
    if scope.own(call):
        return
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    stored = set().union(*(handed_on(world, part, held=True) for part in given))
    if not isinstance(call.func, ast.Attribute):
        defined = isinstance(call.func, ast.Name) and world.definition(call.func.id) is not None
        own = {attr} if scope.package({attr}) else set()  # set_default_dtype(torch.float64)
        if not (defined or _LOOKING.match(attr) or scope.package(own) in SHOWING):
            yield Change(scope.data(*given) | own, stored)
        return
    roots = handed_on(world, call.func.value, held=True)
    package = scope.package(roots)
    moves = attr in _MOVING and any(map(world.is_module, roots))
    looks = _LOOKING.match(attr) and not moves
    is_whole = isinstance(call.func.value, ast.Name) and call.func.value.id not in scope.turning
    if looks or package in SHOWING or (nested and attr in _MODES and is_whole):
        return
    yield Change(roots | (scope.data(*given) if package else set()), stored)


def _of_call(scope: Scope, call: ast.Call) -> Iterator[Change]:
    """Yield what a call changes, wherever it stands."""
    world, attr = scope.world, last_name(call.func)
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    stored = set().union(*(handed_on(world, part, held=True) for part in given))
    roots = handed_on(world, owner, held=True)
    for function in scope.own(call):
        yield _of_function(scope, call, function, roots, stored)
    inplace = any(k.arg == "inplace" and _is_true(k.value) for k in call.keywords)
    moves = attr in _MOVING and any(map(world.is_module, roots))
    if owner is not None and (_CHANGING.match(attr) or inplace or moves):
        if not scope.own(call):
            package = scope.package(roots)
            yield Change(roots | (scope.data(*given) if package else set()), stored)
    elif _in_place(attr):
        yield Change(roots | scope.data(*given), stored)
    elif owner is None and attr in ("setattr", "delattr") and call.args:
        yield Change(handed_on(world, call.args[0]), stored)
    elif owner is None and attr == "next" and call.args and isinstance(call.args[0], ast.Name):
        yield Change({call.args[0].id}, set())
    drawn = roots.union(*(handed_on(world, part) for part in given))
    yield Change({name for name in drawn if world.kinds(name) & _GENERATORS}, set())


def _of_function(
    scope: Scope, call: ast.Call, function: ast.stmt, owner: set[str], stored: set[str]
) -> Change:
    """Return what a call of one of the notebook's functions changes."""
    assert isinstance(function, FUNCTIONS)
    done = scope.done(function)
    given = function.args
    plain = [argument.arg for argument in [*given.posonlyargs, *given.args]]
    static = any(last_name(mark) == "staticmethod" for mark in function.decorator_list)
    is_method = isinstance(call.func, ast.Attribute) or function.name == "__init__"
    names = set(done.outside)
    if is_method and not static and plain:
        names |= owner if plain[0] in done.given else set()
        plain = plain[1:]
    rest = given.vararg.arg if given.vararg is not None else ""
    for place, argument in enumerate(call.args):
        name = plain[place] if place < len(plain) else rest
        if name in done.given or (isinstance(argument, ast.Starred) and done.given):
            names |= scope.data(argument)
    named = {argument.arg for argument in arguments(function)}
    for keyword in call.keywords:
        name = keyword.arg if keyword.arg in named else given.kwarg.arg if given.kwarg else ""
        if name in done.given or (keyword.arg is None and done.given):
            names |= scope.data(keyword.value)
    return Change(names, (stored | owner) if names else set())


def called(world: World, function: ast.stmt) -> Called:
    """Return what a call of a function of the notebook does."""
    if function in world.called:
        return world.called[function]
    found: dict[ast.stmt, Called] = {}
    asked = [function]

    def done(other: ast.stmt) -> Called:
        if other not in found and other not in asked:
            asked.append(other)
        return found.get(other, Called())

    while True:  # until nothing new is found: functions may call each other
        before = dict(found)
        for each in asked:  # grows meanwhile
            found[each] = _read(world, each, done)
        if before == found:
            world.called.update(found)
            return found[function]


def _read(world: World, function: ast.stmt, done: Lookup) -> Called:
    """Return what one function does, as far as what it calls is known."""
    assert isinstance(function, FUNCTIONS)
    parts = [part for node in function.body for part in ast.walk(node)]
    inner = [part for part in parts if isinstance(part, (*FUNCTIONS, ast.Lambda))]
    parameters = {argument.arg for argument in arguments(function)}
    theirs = {n for part in parts if isinstance(part, ast.Global) for n in part.names}
    made = {p.id for p in parts if isinstance(p, ast.Name) and not isinstance(p.ctx, ast.Load)}
    own = {p.name for p in inner if not isinstance(p, ast.Lambda)}
    others = {argument.arg for part in inner for argument in arguments(part)}
    local = (parameters | made | own | others) - theirs
    scope = Scope(world, frozenset(local), done, turning_in(parts))
    found = list(changes(scope, parts))
    standing = aliases(world, parts)
    names = behind(set().union(*(change.names for change in found)), standing)
    given = gives(scope, parts) | (made & theirs)
    return Called(frozenset(names & parameters), frozenset(names - local), given)


def gives(scope: Scope, parts: Sequence[ast.AST]) -> frozenset[str]:
    """Return the names of the notebook's that the functions called in `parts` give a value."""
    calls = [part for part in parts if isinstance(part, ast.Call)]
    own = {function for call in calls for function in scope.own(call)}
    return frozenset().union(*(scope.done(function).gives for function in own))


def turning_in(parts: Sequence[ast.AST]) -> frozenset[str]:
    """Return the variables of the loops among `parts`."""
    loops = [part for part in parts if isinstance(part, (ast.For, ast.comprehension))]
    return frozenset().union(*(bound(loop.target) for loop in loops))


def _is_true(node: ast.expr) -> bool:
    return not (isinstance(node, ast.Constant) and not node.value)


def _in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__") and not name.startswith("_")
