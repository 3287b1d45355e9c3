"""What the names of a notebook stand for, followed from statement to statement.

An object is known by the statement that made it. What a call returns may hold whatever the call
was given: a change to the one counts as a change to the other. Runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .pieces import DEFINITIONS, IMPORTS, Piece

_SIMPLE = (int, float, complex, str, bytes, bool, type(None))


@dataclass(frozen=True)
class Given:
    """What a name stands for at some place: the objects that it may reach, the package that it was
    imported from, or the definition that made it."""

    objects: frozenset[str]
    package: str | None = None
    made_by: Piece | None = None


@dataclass
class World:
    """What the names of a notebook stand for, followed from statement to statement."""

    namespace: Mapping[str, Any]  # what it holds now, looked at for kinds only
    given: dict[str, Given] = field(default_factory=dict)

    def reached(self, names: Iterable[str]) -> set[str]:
        """Return `names`, and those that their functions and classes read."""
        found: set[str] = set()
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                made_by = self.given[name].made_by if name in self.given else None
                waiting += [*made_by.now, *made_by.late] if made_by is not None else []
        return found

    def objects(self, names: Iterable[str]) -> frozenset[str]:
        """Return what the objects of `names` may be, or hold."""
        none = Given(frozenset())
        return frozenset().union(*(self.given.get(name, none).objects for name in names))

    def holds(self, names: Iterable[str], name: str) -> bool:
        """Return whether `name` is among `names`, or in what they hold."""
        own = {made for made in self.objects([name]) if made.split()[-1] == name}
        return name in names or bool(self.objects(names) & own)

    def take(self, piece: Piece, place: int) -> None:
        """Go past a statement: give the names that it binds what they stand for from now on."""
        node = piece.node
        if isinstance(node, IMPORTS):
            for alias in node.names:
                package = (getattr(node, "module", None) or alias.name).partition(".")[0]
                name = alias.asname or alias.name.partition(".")[0]
                self.given[name] = Given(frozenset({f"import {package}"}), package)
            return
        if isinstance(node, DEFINITIONS):
            self.given[node.name] = Given(frozenset({f"{place} {node.name}"}), None, piece)
            return
        held = {name for name in self.reached(piece.now) if self.is_data(name)}
        objects = self.objects(held)
        for name in piece.binds:
            own = frozenset({f"{place} {name}"})
            simple = isinstance(self.namespace.get(name, self), _SIMPLE)
            self.given[name] = Given(frozenset() if simple else own | objects)

    def is_data(self, name: str) -> bool:
        """Return whether a name is neither imported nor defined."""
        given = self.given.get(name)
        return given is not None and given.package is None and given.made_by is None

    def is_module(self, name: str) -> bool:
        """Return whether a name is a network's, as far as the notebook holds it."""
        kinds = {kind.__name__ for kind in type(self.namespace.get(name)).__mro__}
        return "Module" in kinds
