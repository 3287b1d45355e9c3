"""Whether a statement of a notebook trains: itself, in what it calls, or by a library's trainer.

What is not known to train is taken not to: a statement that is kept is run by the script, too.
"""

from __future__ import annotations

import ast

from .names import FUNCTIONS, base, reads
from .roles import holds_training, last_name
from .world import World

_FITTING = {"fit", "train", "fit_one_cycle", "fine_tune"}


def trains(world: World, node: ast.AST, seen: set[ast.AST] | None = None) -> bool:
    """Return whether a statement trains something, itself or in what it calls.

    Args:
        seen: the functions that were read already; filled.
    """
    if holds_training(node):
        return True
    inside = seen is not None
    seen = seen if seen is not None else set()
    for call in ast.walk(node):
        if not isinstance(call, ast.Call):
            continue
        name, root = last_name(call.func), base(call.func)
        given = world.given.get(root)
        if given is not None and given.package == "hybrid_magic":
            return name in ("train", "ablate")
        if isinstance(call.func, ast.Attribute):
            methods = _methods(world, call.func, inside=inside)
            if not methods and name in _FITTING and _is_trainer(world, root, call):
                return True
        else:
            made = world.definition(root)
            methods = [made] if made is not None else []
        for function in methods:
            if isinstance(function, FUNCTIONS) and function not in seen:
                seen.add(function)
                if trains(world, function, seen):
                    return True
    return False


def _methods(world: World, func: ast.Attribute, *, inside: bool) -> list[ast.stmt]:
    """Return the methods of the notebook's classes that a call may run; `inside`: in a function,
    where a name may be of any class."""
    roots = reads(func.value)
    if inside:
        return world.methods_named(func.attr)
    if not any(map(world.definition, roots)) and roots and not _may_be_own(world, base(func)):
        return []
    return world.methods(roots, func.attr)


def _may_be_own(world: World, root: str) -> bool:
    """Return whether what a name holds may be of a class of the notebook."""
    return root not in world.namespace or type(world.namespace[root]).__module__ != "builtins"


def _is_trainer(world: World, root: str, call: ast.Call) -> bool:
    """Return whether `root.fit(...)` or `root.train(...)` trains a network."""
    if world.is_module(root):
        return last_name(call.func) != "train" and len(call.args) > 1
    held = world.objects({root, *reads(call)})
    return any(world.is_module(made.split()[-1]) for made in held)
