"""What would happen to a program: its form, its loops, how each is run, or why it is refused.

Parses only. A plan is what `hm.explain` shows and what the rewriting goes by.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .cutting import Split, written_out
from .names import FUNCTIONS, bound, own_scope, reads
from .roles import Kinds, RefusedError, holds_training, last_name, text_of
from .slicing import Slicer, UnsliceableError
from .units import Unit, counter, find, parameters, reads_ahead

_COUNTING = ("range", "trange", "count", "repeat")
_NO_MODELS = ("torch", "F", "nn", "np", "numpy", "math", "functional")


@dataclass
class Loop:
    """How one training step of a program is run.

    `mode` is "sliced" or "verbatim" (then `why` says why not sliced); `loader`, `model`,
    `optimizer` and `loss` are the person's own words, None where nothing was found; `per_micro` and
    `per_step` are lines of the text. `grows`: the loader may be read at other batch sizes;
    `divides`: a batch may be cut.
    """

    unit: Unit
    mode: str
    why: str | None
    split: Split | None
    loader: str | None
    model: str | None
    grows: bool
    divides: bool
    own_precision: bool

    @property
    def line(self) -> int:
        return self.unit.line

    @property
    def optimizer(self) -> str:
        return self.unit.roles.optimizer

    @property
    def loss(self) -> str:
        return text_of(self.unit.roles.backwards[0].loss)

    @property
    def per_micro(self) -> list[int]:
        return self.split.work_lines if self.split else [node.lineno for node in self.unit.body]

    @property
    def per_step(self) -> list[int]:
        if self.split:
            return self.split.rest_lines
        roles = self.unit.roles
        held = [call for call, _ in (*roles.steps, *roles.advances)]
        return sorted({node.lineno for node in [*held, *roles.clipped, *roles.zeroed]})


@dataclass(repr=False)
class Plan:
    """A program's form ("loop", "step" or "bare"), its loops, or its refusal (line and text).

    The loops are made of nodes of `tree`: it is this one that can be rewritten.
    """

    form: str
    tree: ast.Module
    loops: list[Loop] = field(default_factory=list)
    refusal: RefusedError | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.refusal is not None:
            return f"refused, line {self.refusal.line}: {self.refusal.text}"
        if self.form != "loop":
            what = "the forward pass of one step" if self.form == "step" else "empty"
            rest = "`batch` is what the loader yields" if self.form == "step" else "it is inferred"
            return f"form: {self.form} (the cell is {what}; {rest})"
        return "\n".join(["form: loop", *map(told, self.loops), *self.notes])

    __repr__ = __str__


def told(loop: Loop) -> str:
    """Return how a step is run, in a few lines."""
    what = {"loop": "loop", "function": "function", "statements": "steps"}[loop.unit.kind]
    rows = [
        f"line {loop.line}: {what}{f' over {loop.loader}' if loop.loader else ''}, {loop.mode}"
        + (f" ({loop.why})" if loop.why else ""),
        f"  model {loop.model or 'unnamed'}, optimizer {loop.optimizer}, loss {loop.loss}",
        f"  per micro-batch: {_ranges(loop.per_micro)}",
        f"  per step: {_ranges(loop.per_step)}",
    ]
    if loop.mode == "sliced" and not loop.grows:
        rows.append("  the loader's batches stay as they are, and are cut")
    if loop.own_precision:
        rows.append("  the loop's own mixed precision is kept")
    if not loop.unit.roles.zeroed:
        rows.append("  no zero_grad in this step: gradients add up from step to step, as written")
    return "\n".join(rows)


def _ranges(lines: Iterable[int]) -> str:
    found: list[list[int]] = []
    for line in sorted(lines):
        if found and line == found[-1][1] + 1:
            found[-1][1] = line
        else:
            found.append([line, line])
    told = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in found)
    return f"line{'s' * (len(found) != 1 or '-' in told)} {told}" if found else "nothing"


def plan_of(
    tree: ast.Module, namespace: Mapping[str, Any] | None = None, *, calls_training: bool = False
) -> Plan:
    """Return the plan of a program.

    Args:
        namespace: what the notebook holds, looked at for the kinds of names only.
        calls_training: it calls a function, made earlier, that trains.
    """
    if not tree.body:
        return Plan("bare", tree)
    if not holds_training(tree):
        return Plan("loop" if calls_training else "step", tree)
    kinds = Kinds(tree, namespace)
    try:
        units = find(tree, kinds)
        return Plan("loop", tree, [_loop(unit, namespace) for unit in units])
    except RefusedError as refused:
        return Plan("loop", tree, refusal=refused)


def _loop(unit: Unit, namespace: Mapping[str, Any] | None) -> Loop:
    roots = _roots(unit)
    split, why, lasting = None, None, False
    if roots is None:
        why = "no loader: its batch is left alone"
    else:
        try:
            split = written_out(Slicer(unit, roots), _outside(unit))
        except UnsliceableError as error:
            why, lasting = f"line {error.line}: {error.why}", error.lasting
    loader = text_of(unit.loader) if unit.loader is not None and roots else None
    taken = loader is not None and not unit.aside
    mixed = unit.roles.scaler is not None or any(
        isinstance(node, ast.Call) and last_name(node.func) == "autocast"
        for node in ast.walk(unit.scope)
    )
    return Loop(
        unit=unit,
        mode="sliced" if split else "verbatim",
        why=why,
        split=split,
        loader=loader,
        model=_model(unit, namespace or {}),
        grows=taken and split is not None and split.growable,
        divides=split is not None or (taken and not lasting),
        own_precision=mixed,
    )


def _roots(unit: Unit) -> set[str] | None:
    """Return the names that hold a step's batch, None where there is no loader."""
    if unit.kind == "function":
        return parameters(unit)
    if unit.kind == "statements":
        return None
    by_hand = any(map(reads_ahead, unit.body))
    if not hasattr(unit.node, "iter"):
        return set() if by_hand else None
    read = unit.loader
    if isinstance(read, ast.Call) and last_name(read.func) in _COUNTING:
        return set() if by_hand else None
    return bound(unit.node.target) - counter(unit)


def _outside(unit: Unit) -> set[str]:
    """Return the names that are read beyond the step's own statements."""
    inside = {id(node) for node in unit.body}

    def walk(node: ast.AST) -> set[str]:
        found: set[str] = set()
        for child in ast.iter_child_nodes(node):
            if id(child) in inside:
                continue
            if isinstance(child, (ast.stmt, ast.Name)) and not _holds(child, inside):
                found |= reads(child)
            else:
                found |= walk(child)
        return found

    found = walk(unit.scope) if unit.kind != "function" else set()
    for node in ast.walk(unit.scope) if unit.kind == "function" else ():
        if isinstance(node, FUNCTIONS) and node is not unit.node:
            found |= reads(node)
    return found


def _holds(node: ast.AST, inside: set[int]) -> bool:
    return any(id(part) in inside for part in ast.walk(node))


def _model(unit: Unit, namespace: Mapping[str, Any]) -> str | None:
    """Return what the step calls first that can be a model."""
    for statement in unit.body:
        for node in own_scope(statement):
            if not isinstance(node, ast.Call) or not (node.args or node.keywords):
                continue
            text = text_of(node.func).removesuffix(".forward")
            root = text.partition(".")[0]
            if not text.replace(".", "").isidentifier() or root in _NO_MODELS:
                continue
            if text in namespace:
                kinds = {kind.__name__ for kind in type(namespace[text]).__mro__}
                if "Module" in kinds and "_Loss" not in kinds:
                    return text
            elif (
                (
                    isinstance(node.func, ast.Name)
                    and any(
                        word in text.lower()
                        for word in ("model", "net", "encoder", "clf", "classifier")
                    )
                )
                or (text.startswith("self.") and "net" in text)
                or text == "self.model"
            ):
                return text
    return None
