"""What the names of a notebook stand for, followed from statement to statement.

An object is known by the statement that made it. What a call returns may hold whatever the call
was given: a change to the one counts as a change to the other. Runs nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .names import FUNCTIONS, base, closure
from .pieces import DEFINITIONS, IMPORTS, Piece

_SIMPLE = (int, float, complex, str, bytes, bool, type(None))

SHOWING = {"matplotlib", "seaborn", "plotly", "bokeh", "altair", "IPython", "ipywidgets", "wandb",
           "tensorboard", "tqdm", "time", "gc", "pprint", "torchinfo", "torchsummary",
           "torchviz"}  # fmt: skip


@dataclass(frozen=True)
class Given:
    """What a name stands for at some place: the objects that it may reach, the package that it was
    imported from, or the definition that made it; `classes`: those of the notebook that its
    objects may be of; `shows`: a picture, which nobody asks for what it holds."""

    objects: frozenset[str]
    package: str | None = None
    made_by: Piece | None = None
    classes: frozenset[str] = frozenset()
    shows: bool = False


_NONE = Given(frozenset())


@dataclass
class World:
    """What the names of a notebook stand for, followed from statement to statement."""

    namespace: Mapping[str, Any]  # what it holds now, looked at for kinds only
    given: dict[str, Given] = field(default_factory=dict)
    newest: dict[str, Piece] = field(default_factory=dict)  # what gave names what they hold now
    called: dict[Any, Any] = field(default_factory=dict)  # what its functions do, once read

    def reached(self, names: Iterable[str]) -> set[str]:
        """Return `names`, and those that their functions and classes read."""

        def read_by(name: str) -> Iterable[str]:
            made_by = self.given.get(name, _NONE).made_by
            return () if made_by is None else (*made_by.now, *made_by.late)

        return closure(names, read_by)

    def objects(self, names: Iterable[str]) -> frozenset[str]:
        """Return what the objects of `names` may be, or hold."""
        return frozenset().union(*(self.given.get(name, _NONE).objects for name in names))

    def classes(self, names: Iterable[str]) -> frozenset[str]:
        """Return the notebook's classes that `names` are, or that their objects may be of."""
        reached = self.reached(names)
        own = frozenset(n for n in reached if isinstance(self.definition(n), ast.ClassDef))
        return own.union(*(self.given.get(name, _NONE).classes for name in reached))

    def methods(self, owners: Iterable[str], name: str) -> list[ast.stmt]:
        """Return what a call of `name` on `owners` may run of the notebook's classes."""
        if not self.methods_named(name):
            return []
        kinds = [self.definition(kind) for kind in self.classes(owners)]
        return [
            node
            for kind in kinds
            if isinstance(kind, ast.ClassDef)
            for node in kind.body
            if isinstance(node, FUNCTIONS) and node.name == name
        ]

    def methods_named(self, name: str) -> list[ast.stmt]:
        """Return the methods of that name of all the notebook's classes."""
        if "methods" not in self.called:
            found: dict[str, list[ast.stmt]] = {}
            for given in self.given.values():
                kind = given.made_by.node if given.made_by is not None else None
                for node in kind.body if isinstance(kind, ast.ClassDef) else ():
                    if isinstance(node, FUNCTIONS):
                        found.setdefault(node.name, []).append(node)
            self.called["methods"] = found
        return self.called["methods"].get(name, [])

    def holds(self, names: Iterable[str], name: str) -> bool:
        """Return whether `name` is among `names`, or in what they hold."""
        own = {made for made in self.objects([name]) if made.split()[-1] == name}
        return name in names or bool(self.objects(names) & own)

    def take(self, piece: Piece, place: int, gives: Iterable[str] = ()) -> None:
        """Go past a statement: give the names that it binds what they stand for from now on.

        Args:
            gives: names that the functions it calls give a value.
        """
        node = piece.node
        if isinstance(node, ast.Delete):
            for target in node.targets:
                self.given.pop(getattr(target, "id", ""), None)
                self.called.clear()
        if isinstance(node, IMPORTS):
            for alias in node.names:
                package = (getattr(node, "module", None) or alias.name).partition(".")[0]
                name = alias.asname or alias.name.partition(".")[0]
                self.given[name] = Given(frozenset({f"import {package}"}), package)
            return
        if isinstance(node, DEFINITIONS):
            self.given[node.name] = Given(frozenset({f"{place} {node.name}"}), None, piece)
            self.called.clear()
            return
        held = {name for name in self.reached(piece.now) if self.is_data(name)}
        objects, classes = self.objects(held), self.classes(piece.now)
        for name in piece.binds.union(gives):
            own = frozenset({f"{place} {name}"})
            is_newest = self.newest.get(name, piece) is piece
            simple = is_newest and isinstance(self.namespace.get(name, self), _SIMPLE)
            found = Given(own | objects, classes=classes, shows=self._shows(node))
            self.given[name] = _NONE if simple else found

    def hold(self, names: Iterable[str], stored: Iterable[str]) -> None:
        """Let the objects of `names` hold those of `stored` from now on."""
        objects, classes = self.objects(stored), self.classes(stored)
        targets = self.objects(filter(self.is_data, names))
        for name, old in self.given.items() if objects or classes else ():
            if self.is_data(name) and old.objects & targets and not old.shows:
                held = old.objects | objects
                self.given[name] = replace(old, objects=held, classes=old.classes | classes)

    def _shows(self, node: ast.stmt) -> bool:
        """Return whether a statement makes a picture: `fig, axes = plt.subplots(2, 2)`."""
        value = getattr(node, "value", None)
        given = self.given.get(base(value)) if isinstance(value, ast.Call) else None
        return given is not None and given.package in SHOWING

    def definition(self, name: str) -> ast.stmt | None:
        """Return the function or the class that a name stands for, if it is the notebook's."""
        made_by = self.given.get(name, _NONE).made_by
        return made_by.node if made_by is not None else None

    def is_data(self, name: str) -> bool:
        """Return whether a name is neither imported nor defined."""
        given = self.given.get(name)
        return given is not None and given.package is None and given.made_by is None

    def is_package(self, name: str) -> bool:
        """Return whether a name was imported."""
        return self.given.get(name, _NONE).package is not None

    def is_module(self, name: str) -> bool:
        """Return whether a name is a network's, as far as the notebook holds it."""
        return "Module" in self.kinds(name)

    def kinds(self, name: str) -> set[str]:
        """Return the names of the classes of what the notebook holds under a name."""
        return {kind.__name__ for kind in type(self.namespace.get(name)).__mro__}


def newest_of(pieces: Sequence[Piece]) -> dict[str, Piece]:
    """Return the statement that gave each name its last value."""
    return {name: piece for piece in pieces for name in piece.binds}
