"""A cut step, written out: the work, what runs before it and what runs after it.

The rest finds every name as it would have found it in the loop as written: names that the work
makes are bound from what came back, in the version of their place.
"""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass
from typing import Any

from .leaves import Leaf, rebuilt
from .names import exposed
from .slicing import Slicer
from .statements import data_only

KEPT, VALUES = "_hybrid_kept", "_hybrid_values"
_AFTER_ALL = 10**9


@dataclass
class Split:
    """A cut step. `params` carry the batch's data, `kept` names come back, merged, for the rest.

    `work` returns (loss, its names). `captured` are those of `params` that `before`
    keeps as the batch brought them. `growable`: how much is trained is not measured in batches.
    """

    params: list[str]
    work: list[ast.stmt]
    before: list[ast.stmt]
    after: list[ast.stmt]
    kept: list[str]
    captured: list[str]
    growable: bool
    work_lines: list[int]
    rest_lines: list[int]


def written_out(cut: Slicer, outside: set[str]) -> Split:
    """Return the parts of a cut step; `outside` are the names that are read beyond the step."""
    return _Writer(cut, outside).split()


class _Writer:
    def __init__(self, cut: Slicer, outside: set[str]) -> None:
        self.cut, self.outside = cut, outside
        self.made_at = {leaf.place: leaf.writes for leaf in cut.of(cut.sliced)}
        self.made_at[cut.end.place] = cut.end.bound  # (loss := ...).backward()
        self.rest = [
            leaf
            for leaf in cut.leaves
            if leaf is not cut.end and leaf.place not in cut.sliced | cut.early
        ]
        self.binding: dict[int, list[tuple[str, str]]] = {}  # before a leaf: name, where it is kept
        self.snapshots: dict[int, set[str]] = {}
        self._held: dict[str, int | None] = {}  # the version that a name holds

    def split(self) -> Split:
        cut = self.cut
        ends = self._ends()
        for leaf in self.rest:
            names = leaf.reads | leaf.changed | (ends if leaf.jumps else set())
            if not isinstance(leaf.node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
                names |= leaf.bound  # it may not come to that
            self._bind_for(leaf, names)
            for name in leaf.bound | _deleted(leaf.node):
                self._held[name] = leaf.place
        self._bind_at(_AFTER_ALL, sorted(ends))
        kept = sorted({source for pairs in self.binding.values() for _, source in pairs if source})
        made = self._work(ends=False)
        self.certain = set(kept) - (set(exposed(made, frozenset(kept))) - cut.roots)
        hoisted = set().union(*map(_certainly_bound, cut.of(cut.early - cut.sliced)))
        self.params = sorted(cut.inputs & (cut.roots | hoisted))
        captured = [name for name in self.params if name in cut.roots and cut.early & cut.sliced]
        return Split(
            params=self.params,
            work=self._work(),
            before=rebuilt(cut.unit.body, cut.leaves, self._before),
            after=rebuilt(cut.unit.body, cut.leaves, self._after)
            + [self._bound(*pair) for pair in self.binding.get(_AFTER_ALL, ())],
            kept=kept,
            captured=captured,
            growable=not cut.counts_batches(),
            work_lines=sorted({leaf.node.lineno for leaf in [*cut.of(cut.sliced), cut.end]}),
            rest_lines=sorted(
                {leaf.node.lineno for leaf in [*self.rest, *cut.of(cut.early - cut.sliced)]}
            ),
        )

    def _ends(self) -> set[str]:
        """Return the names of the work that must stand as in the loop when the step is over."""
        cut = self.cut
        made = cut.made
        early = set().union(*(leaf.reads for leaf in cut.of(cut.early - cut.sliced)))
        before_made = {
            name
            for leaf in self.rest
            for name in leaf.reads & made
            if self._last(name, leaf.place) is None
        }
        if cut.unit.function is None:  # the next cell may look at any of them
            return made
        return made & (self.outside | ((early | before_made) - cut.roots))

    def _last(self, name: str, place: int) -> int | None:
        return max((at for at, names in self.made_at.items() if name in names and at < place),
                   default=None)  # fmt: skip

    def _bind_for(self, leaf: Leaf, names: set[str]) -> None:
        gone = {name for name in _deleted(leaf.node) if self._held.get(name) is None}
        self._bind_at(leaf.place, sorted(names & self.cut.made))
        for name in sorted(gone & self.cut.made - names):
            self.binding.setdefault(leaf.place, []).append((name, ""))

    def _bind_at(self, place: int, names: list[str]) -> None:
        for name in names:
            version = self._last(name, place)
            rebound = max(
                (leaf.place for leaf in self.rest if leaf.place < place
                 and name in leaf.bound | _deleted(leaf.node)), default=-1
            )  # fmt: skip
            if version is None or rebound > version or self._held.get(name) == version:
                continue
            source = name
            if version != self._last(name, _AFTER_ALL):
                source = f"_hybrid_{name}_{version}"
                self.snapshots.setdefault(version, set()).add(name)
            self.binding.setdefault(place, []).append((name, source))
            self._held[name] = version

    def _work(self, *, ends: bool = True) -> list[ast.stmt]:
        def chosen(leaf: Leaf) -> list[ast.stmt]:
            if leaf is self.cut.end and not ends:
                return [leaf.node]
            if leaf is self.cut.end:
                loss = self.cut.unit.roles.backwards[0].loss
                names = ast.Call(ast.Name("locals", ast.Load()), [], [])
                return [_at(leaf, ast.Return(ast.Tuple([loss, names], ast.Load())))]
            if leaf.place not in self.cut.sliced:
                return []
            return [leaf.node] + [
                _at(leaf, _parsed(f"_hybrid_{name}_{leaf.place} = {name}"))
                for name in sorted(self.snapshots.get(leaf.place, ()))
            ]

        return rebuilt(self.cut.unit.body, self.cut.leaves, chosen)

    def _before(self, leaf: Leaf) -> list[ast.stmt]:
        if leaf.place not in self.cut.early:
            return []
        if leaf.place == min(self.cut.early & self.cut.sliced, default=None):
            return [_at(leaf, self._capture()), leaf.node]
        if leaf.jumps:
            made = self.cut.of(self.cut.sliced - self.cut.early)
            names = [other.node for other in made if other.place < leaf.place and data_only(other)]
            return [_Leaving(names).visit(copy.deepcopy(leaf.node))]
        return [leaf.node]

    def _capture(self) -> ast.stmt:
        """Return the statement that keeps the batch's data as it came."""
        pairs = (f"{name!r}: {name}" for name in self.params if name in self.cut.roots)
        return _parsed(f"{VALUES} = {{{', '.join(pairs)}}}")

    def _after(self, leaf: Leaf) -> list[ast.stmt]:
        if leaf not in self.rest:
            return []
        return [self._bound(*pair) for pair in self.binding.get(leaf.place, ())] + [leaf.node]

    def _bound(self, name: str, source: str) -> ast.stmt:
        """Return the statement that binds `name`; one without a source is about to be deleted."""
        if not source:
            return _parsed(f"{name} = None")
        text = f"{name} = {KEPT}[{source!r}]"
        return _parsed(text if source in self.certain else f"if {source!r} in {KEPT}: {text}")


class _Leaving(ast.NodeTransformer):
    """Makes a batch that is passed over leave the names that it would have left."""

    def __init__(self, names: list[ast.stmt]) -> None:
        self._names = names

    def visit_Continue(self, node: ast.Continue) -> list[ast.stmt]:
        return [*copy.deepcopy(self._names), node]

    def visit_Break(self, node: ast.Break) -> list[ast.stmt]:
        return [*copy.deepcopy(self._names), node]

    def visit_For(self, node: ast.For) -> ast.For:
        return node  # its own breaks

    def visit_While(self, node: ast.While) -> ast.While:
        return node


def _certainly_bound(leaf: Leaf) -> set[str]:
    """Return the names that a leaf before the work gives a value whatever happens."""
    maybe = any(isinstance(header, ast.If) for header in leaf.headers)
    return set() if maybe or isinstance(leaf.node, ast.If) else leaf.bound


def _deleted(node: ast.AST) -> set[str]:
    return {
        part.id
        for part in ast.walk(node)
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Del)
    }


def _parsed(text: str) -> ast.stmt:
    return ast.parse(text).body[0]


def _at(leaf: Leaf, made: Any) -> Any:
    """Return a statement of ours at the person's line, so that tracebacks show it."""
    for part in ast.walk(made):
        if isinstance(part, (ast.stmt, ast.expr)) and not hasattr(part, "_own"):
            ast.copy_location(part, leaf.node)
    return ast.fix_missing_locations(made)
