"""The step of an exported script: the function that a training cell's text makes.

Keeps the person's own lines. Knows no shell.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from ..adopt.chance import draws
from ..adopt.gathering import world_after
from ..adopt.loop_step import left_out, loop_step
from ..adopt.names import bound, reads
from ..adopt.pieces import Piece, indented, lines_of, pieces_of, reads_of
from ..adopt.plan import Loop, plan_of
from ..adopt.roles import RefusedError
from ..errors import HybridMagicError

_FIRST_LINE = 2  # the magic's line is the first of the cell


@dataclass
class Step:
    """What is to be trained and how. `names`: what the notebook calls model, loader, ...; `text`
    the step's function, "" where it is inferred; `options` expressions by the option's name;
    `before` statements of the same cell that were run before; `left` lines that are left out."""

    names: dict[str, str]
    text: str = ""
    options: dict[str, str] = field(default_factory=dict)
    interval: str | None = None
    before: list[Piece] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    drew: bool = False  # whether what is left out of a loop may have drawn random numbers

    def needs(self) -> set[str]:
        """Return the names of the notebook that the step and the options read."""
        found = {
            part.id
            for text in self.options.values()
            for part in ast.walk(ast.parse(text))
            if isinstance(part, ast.Name)
        }
        if self.text:
            now, late = reads_of(self.text, ast.parse(self.text).body[0])
            found |= now | late
        return found


def step_of_cell(text: str, log: Sequence[str], names: dict[str, str]) -> Step:
    """Return the step of a cell in the step form, or of an empty one."""
    tree = ast.parse(text)
    if not tree.body:
        return Step(names)
    rows, last = lines_of(text.rstrip()), tree.body[-1]
    values = "{" + ", ".join(f'"{name}": {name}' for name in log) + "}"
    result = f"loss, {values}" if log else "loss"
    if "loss" in bound(tree):
        rows.append(f"return {result}")
    else:  # its last expression is the loss
        row = rows[last.lineno - 1].encode()
        head, tail = row[: last.col_offset].decode(), row[last.col_offset :].decode()
        rows[last.lineno - 1] = head + ("loss = " if log else "return ") + tail
        rows += [f"return {result}"] if log else []
    return Step(names, _function(names["model"], "\n".join(rows).strip("\n")))


def _function(model: str, body: str) -> str:
    says = '    """Return the loss of one batch, and what is recorded beside it."""'
    if "return loss, {" not in body:
        says = '    """Return the loss of one batch."""'
    return "\n".join([f"def step({model}, batch):", says, indented(body)])


def step_of_loop(
    text: str,
    number: int,
    pieces: Sequence[Piece],
    namespace: Mapping[str, Any],
    evals: Set[str] = frozenset(),
) -> Step:
    """Return the step of a cell in the loop form.

    Args:
        text: the cell, below its magic line.
        number: of the cell.
        pieces: what was run before the cell.
        namespace: what the notebook holds, looked at for kinds.
        evals: the names of networks in eval mode before the cell.
    Raises:
        HybridMagicError: the loop decides more than a step can say.
    """
    tree = ast.parse(text)
    own = pieces_of(text, number, first_line=_FIRST_LINE)
    plan = plan_of(tree, namespace)
    if len(plan.loops) != 1:
        raise HybridMagicError(
            f"cell [{number}] holds {len(plan.loops)} training loops of its own; wanted one, or a "
            "step; write the lines up to the loss as a cell under %%hybrid_train --epochs N, run "
            "it, and export that"
        )
    try:
        outer = next(
            place
            for place, node in enumerate(tree.body)
            if any(part is plan.loops[0].unit.node for part in ast.walk(node))
        )
        before = own[:outer]
        world = world_after([*pieces, *before], namespace)
        found = loop_step(tree, plan.loops[0], _model_of(plan.loops[0], namespace), world, evals)
    except RefusedError as refused:
        line = refused.line + _FIRST_LINE - 1
        raise HybridMagicError(f"cell [{number}], line {line}: {refused.text}") from None
    names = {"model": found.model, "loader": found.loader, "optimizer": found.optimizer}
    options = {"epochs": found.epochs} | ({"clip": found.clip} if found.clip else {})
    if found.scheduler:
        names["scheduler"] = found.scheduler
    body = [] if found.target == "batch" else [f"{found.target} = batch"]
    body += [_written(text, node, plan.loops[0].unit.body) for node in found.work]
    body.append(f"return {found.loss}")
    step = _function(found.model, "\n".join(body))
    if found.in_training_mode and any(".eval()" in piece.text for piece in [*pieces, *before]):
        before = [*before, *pieces_of(f"{found.model}.train()  # as the loop does", number)]
    drew = any(draws(world, node) for node in found.left)
    return Step(names, step, options, found.interval, before, list(left_out(found)), drew)


def _model_of(loop: Loop, namespace: Mapping[str, Any]) -> str | None:
    """Return the name in a loop's step of the model that its optimizer trains, None where there is
    none that holds all that it trains."""
    optimizer = namespace.get(loop.optimizer)
    held = {id(p) for group in getattr(optimizer, "param_groups", []) for p in group["params"]}
    named = set().union(*map(reads, loop.split.work if loop.split else []))
    for name in [loop.model or "", *sorted(named)]:
        model: Any = namespace.get(name)
        if hasattr(model, "state_dict") and hasattr(model, "parameters"):
            own = {id(parameter) for parameter in model.parameters()}
            if held and held <= own:
                return name
    return None


def _written(text: str, node: ast.stmt, body: Sequence[ast.stmt]) -> str:
    """Return a statement of the loop as it was written, where it has its lines for itself."""
    others = [other for other in body if other is not node]
    taken = {line for other in others for line in (other.lineno, other.end_lineno)}
    rows = lines_of(text)[node.lineno - 1 : node.end_lineno]
    if node not in body or taken & {node.lineno, node.end_lineno} or '"""' in "".join(rows):
        return ast.unparse(node)
    return textwrap.dedent("\n".join(rows))
