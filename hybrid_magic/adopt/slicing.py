"""Cutting a step's statements in two: what the loss depends on, and the rest.

The first part is to run once per micro-batch, the rest once per step. The cut follows names back
from the loss. Where it would change what the person's statements see, it is not made, with the
line and the reason.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable

from .leaves import Leaf, flatten, header_reads, plain, rebuilt, repeatable, short
from .names import base, changed, exposed, own_scope, reads
from .roles import LEAVE, RefusedError, last_name
from .statements import counts, data_only, declared, iterates, reads_gradients
from .units import Unit, reads_ahead

_TAKING = {"append", "appendleft", "add", "clear", "extend", "insert", "pop", "popleft", "put",
           "remove", "setdefault", "update"}  # fmt: skip
_SETTING = {"train", "eval", "requires_grad_", "to", "cuda", "cpu", "float", "double", "zero_grad"}


class UnsliceableError(Exception):
    """Why a step's statements cannot be cut in two, at a line; `lasting`: making the loss changes
    what is there for the next step, too, so that it can only be made once a step."""

    def __init__(self, node: ast.AST, why: str, *, lasting: bool = False) -> None:
        super().__init__(why)
        self.line, self.why, self.lasting = getattr(node, "lineno", 1), why, lasting


class Slicer:
    """The cut of one unit.

    Args:
        unit: the step.
        roots: the names that hold the batch's data.

    `sliced` are the places of the leaves that run once per micro-batch, `early` those that run once
    per step before them (both: unpacking and moving of data that an early leaf reads, too); `end`
    is the leaf that calls `.backward()`.

    Raises:
        UnsliceableError: the cut would change what the rest sees.
        RefusedError: the step depends on what the one before has computed.
    """

    def __init__(self, unit: Unit, roots: set[str]) -> None:
        self.unit, self.roots = unit, set(roots)
        self.leaves = flatten(unit.body)
        self.end = self._end()
        for leaf in self.leaves[: self.end.place]:
            if reads_ahead(leaf.node):
                self.roots |= {name for name in leaf.bound if not iterates(leaf.node, name)}
        self._needed: set[int] = set()  # the leaves that the loss depends on
        self.sliced: set[int] = set()
        self._follow()
        self._collapse()
        self.inputs = self._inputs()
        self._check_carried()
        self._check_work()
        self.early = self._early()
        self._check_headers()

    def _end(self) -> Leaf:
        if len(self.unit.roles.backwards) != 1:
            raise UnsliceableError(
                self.unit.roles.backwards[1].call, "backward() is called more than once in a step"
            )
        call = self.unit.roles.backwards[0].call
        for leaf in self.leaves:
            if isinstance(leaf.node, ast.Expr) and leaf.node.value is call:
                return leaf
        inside = next(leaf for leaf in self.leaves if call in set(ast.walk(leaf.node)))
        kind = type(inside.node).__name__.lower()
        raise UnsliceableError(call, f"backward() stands inside a {kind} statement of the step")

    # -- what belongs to the computation of the loss --

    def _follow(self) -> None:
        """Follow names back from the loss; then leave out what does not depend on the batch."""
        wanted = reads(self.unit.roles.backwards[0].loss) | self.end.header_reads
        for leaf in reversed(self.leaves[: self.end.place]):
            if self._is_zero(leaf) or self._sets(leaf) or not leaf.writes & wanted:
                continue
            self._needed.add(leaf.place)
            always = not any(isinstance(header, ast.If) for header in leaf.headers)
            if always and isinstance(leaf.node, (ast.Assign, ast.AnnAssign)):
                wanted -= leaf.bound
            wanted |= leaf.reads | leaf.header_reads | leaf.changed
        tainted, before = set(self.roots), -1
        while before != len(self.sliced):  # what the work sets out from is made with it
            before, made = len(self.sliced), self.made
            for leaf in self.of(self._needed - self.sliced):
                if reads_ahead(leaf.node) or counts(leaf, tainted):
                    continue
                touched = (leaf.reads | leaf.changed) & tainted or leaf.bound & made
                if touched or not plain(leaf.node):
                    self.sliced.add(leaf.place)
                    tainted |= leaf.writes

    def _collapse(self) -> None:
        """Divide only what the work is in: the rest's own statements stay whole."""
        needed, sliced = self.of(self._needed), self.of(self.sliced)
        self.leaves = flatten(self.unit.body, [leaf.node for leaf in (*sliced, self.end)])
        parts = {id(part): leaf.place for leaf in self.leaves for part in ast.walk(leaf.node)}
        self.end = self.leaves[parts[id(self.end.node)]]
        self._needed = {parts[id(leaf.node)] for leaf in needed}
        self.sliced = {parts[id(leaf.node)] for leaf in sliced}

    def _is_zero(self, leaf: Leaf) -> bool:
        """Return whether a statement only clears gradients, maybe under a condition."""
        zeroed = set(map(id, self.unit.roles.zeroed))
        if id(leaf.node) in zeroed:
            return True
        match leaf.node:
            case ast.If(body=body, orelse=[]):
                return all(id(node) in zeroed for node in body)
        return False

    def _sets(self, leaf: Leaf) -> bool:
        """Return whether a statement only sets up what lasts: `model.train()`."""
        match leaf.node:
            case ast.Expr(value=ast.Call(func=ast.Attribute(attr=attr))) if attr in _SETTING:
                before = self.leaves[: leaf.place]
                return not leaf.changed & self.roots.union(*(other.bound for other in before))
        return False

    def of(self, places: Iterable[int]) -> list[Leaf]:
        """Return the leaves at `places`, in the order of the text."""
        return [self.leaves[place] for place in sorted(places)]

    @property
    def made(self) -> set[str]:
        """The names that the work gives values."""
        return self.end.bound.union(*(leaf.writes for leaf in self.of(self.sliced)))

    def _inputs(self) -> set[str]:
        """Return the names that the work reads before it makes them."""
        work = rebuilt(
            self.unit.body, self.leaves, lambda leaf: [leaf.node] * (leaf.place in self.sliced)
        )
        return set(exposed(work, frozenset(reads(self.unit.roles.backwards[0].loss))))

    # -- what forbids the cut --

    def _check_carried(self) -> None:
        """Refuse a step that reads what the step before has computed."""
        inputs = self.inputs - self.roots
        for leaf in self.of(self.sliced):
            for name in sorted(leaf.bound & inputs):
                raise RefusedError(
                    leaf.node,
                    f"{name} is carried from one batch to the next (hidden state); wanted batches "
                    f"that stand for themselves; make {name} anew for every batch, {LEAVE}",
                )

    def _check_work(self) -> None:
        """Raise UnsliceableError where the work does more than compute."""
        fresh = self.roots | set().union(*(leaf.bound for leaf in self.of(self.sliced)))
        for leaf in self.of(self.sliced):
            for part in own_scope(leaf.node):
                if isinstance(part, (ast.Yield, ast.YieldFrom, ast.Await)):
                    raise UnsliceableError(part, "the loss is computed across an await or a yield")
                lasts = (
                    last_name(getattr(part, "func", part)) in _TAKING and base(part) not in fresh
                )
                if isinstance(part, ast.Call) and lasts:
                    raise UnsliceableError(part, f"{short(part)} changes what lasts", lasting=True)
                if isinstance(part, ast.Expr) and not (changed(part) and changed(part) <= fresh):
                    raise UnsliceableError(
                        part, f"{short(part)} stands among the statements that make the loss"
                    )
            if lasting := leaf.changed - fresh:
                names = ", ".join(sorted(lasting))
                raise UnsliceableError(
                    leaf.node, f"making the loss changes {names}, which lasts", lasting=True
                )
            if leaf.jumps:
                raise UnsliceableError(
                    leaf.node, "the loss is made by a statement that may leave it"
                )
        if outer := self.made & declared(self.unit):
            raise UnsliceableError(
                self.end.node, f"{', '.join(sorted(outer))} belongs to an outer scope"
            )

    def _check_headers(self) -> None:
        """Raise UnsliceableError where a header would run twice that must not."""
        runs: dict[int, set[str]] = {}
        made, data = self.made, self.made | self.roots
        for leaf in self.leaves:
            part = "work" if leaf.place in self.sliced or leaf is self.end else "rest"
            part = "before" if leaf.place in self.early else part
            for header in leaf.headers:
                seen = runs.setdefault(id(header), set())
                seen.add(part)
                if len(seen) > 1 and not repeatable(header):
                    raise UnsliceableError(
                        header, f"{short(header)} holds more than the loss's making"
                    )
                if "work" in seen and len(seen) > 1 and header_reads(header) & made:
                    raise UnsliceableError(header, f"{short(header)} decides by what is computed")
        for header in self.end.headers:
            if isinstance(header, ast.If) and header_reads(header) & data:
                raise UnsliceableError(header, "whether backward() is called depends on the batch")

    # -- the rest: before the work or after it --

    def _early(self) -> set[int]:
        """Return the leaves that run before the work, once per step."""
        first = min(self.sliced, default=self.end.place)
        early: set[int] = set()
        waiting = [
            leaf
            for leaf in self.leaves[: self.end.place]
            if leaf.place not in self.sliced
            and (
                self._is_zero(leaf)
                or self._sets(leaf)
                or leaf.place in self._needed
                or leaf.jumps
                or reads_gradients(leaf)
                or leaf.place < first
            )
        ]
        while waiting:
            leaf = waiting.pop()
            if leaf.place in early:
                continue
            early.add(leaf.place)
            for other in self.leaves[: leaf.place]:  # what it reads comes before it
                if not other.writes & (leaf.reads | leaf.header_reads):
                    continue
                if other.place in self.sliced and not data_only(other):
                    raise UnsliceableError(
                        leaf.node,
                        f"{short(leaf.node)} stands before the loss and reads what is computed",
                    )
                waiting.append(other)
        return early

    def counts_batches(self) -> bool:
        """Return whether how much is trained is measured in batches: a `break` that no result
        decides, or a step taken every few batches."""
        computed = self.made | self.roots
        for leaf in self.leaves:
            ends = any(isinstance(part, (ast.Break, ast.Return)) for part in own_scope(leaf.node))
            if leaf.jumps and ends and not leaf.reads & computed:
                return True
        steps = {call for call, _ in self.unit.roles.steps}
        for leaf in self.leaves:
            if steps & set(ast.walk(leaf.node)):
                own = [header for header in leaf.headers if header not in self.end.headers]
                if isinstance(leaf.node, ast.If) or any(isinstance(h, ast.If) for h in own):
                    return True
        return False
