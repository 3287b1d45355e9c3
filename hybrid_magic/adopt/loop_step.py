"""The step, the epochs and the schedule of a training loop, written as hm.train takes them.

Only where that says all that trains in the loop: whatever else in it decides what is learned is
refused, at its line. What only tells (prints, running losses, evaluation) is left out, and listed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Set
from dataclasses import dataclass, field

from .effects import effect
from .modes import Modes, in_eval_mode
from .names import base, bound, own_scope, reads
from .pieces import Piece
from .plan import Loop
from .roles import RefusedError, last_name, text_of
from .units import LOOPS, WRAPPERS, counter
from .world import World

_INSTEAD = (
    "write the lines up to the loss as a cell of their own, under %%hybrid_train --epochs N, run "
    "it, and export that"
)
_RANGES = ("range", "trange")


@dataclass
class LoopStep:
    """A loop as a step. `target` is what the loop binds to a batch, `work` the statements up to the
    loss; `model`, `optimizer`, `loader` names; `epochs`, `clip` expressions; `left` the lines that
    are left out, `scheduler` and whether it goes by "batch" or "epoch"."""

    model: str
    optimizer: str
    loader: str
    target: str
    work: list[ast.stmt]
    loss: str
    epochs: str
    outer: ast.stmt  # the cell's statement that holds the loop
    scheduler: str | None = None
    interval: str | None = None
    clip: str | None = None
    left: list[ast.stmt] = field(default_factory=list)
    in_training_mode: bool = False  # whether the loop puts all of the model into training mode

    def needs(self) -> set[str]:
        """Return the names of the notebook that the step reads, besides model and batch."""
        made = bound(ast.parse(self.target))
        found = reads(ast.parse(self.loss))
        for node in reversed(self.work):
            found = (found - bound(node)) | reads(node)
        return found - made - {self.model}


def loop_step(
    tree: ast.Module, loop: Loop, model: str | None, world: World, evals: Set[str] = frozenset()
) -> LoopStep:
    """Return a planned loop of a cell as a step.

    Args:
        model: the name of what it trains, None where that is not one model with a name.
        world: what names stand for before the loop.
        evals: the names of networks in eval mode before the cell.
    Raises:
        RefusedError: what trains is more than the step; its line, and what to do instead.
    """
    unit = loop.unit
    if unit.kind != "loop" or unit.function is not None or not isinstance(unit.node, ast.For):
        where = f"in {unit.function.name}()" if unit.function is not None else "outside a for loop"
        raise _refusal(unit.node or unit.body[0], f"the training stands {where}")
    if loop.split is None or not loop.grows or loop.own_precision:
        what = loop.why or ("it has mixed precision of its own" if loop.own_precision else None)
        raise _refusal(
            unit.node, f"this loop is more than a step ({what or 'it counts its batches'})"
        )
    if unit.guards or unit.node.orelse or not isinstance(loop.split.work[-1], ast.Return):
        raise _refusal(unit.node, "the loop has a condition, or an else, around its step")
    outer, epochs, above = _around(tree, unit.node)
    loader, above = _unwrapped(loop.loader, above)
    names = {"model": model, "optimizer": loop.optimizer, "loader": loader}
    for role, name in names.items():
        if name is None or not name.isidentifier():
            raise _refusal(unit.node, f"the loop's {role} is {name or 'not one with a name'}")
    target = unit.node.target
    if counter(unit) and isinstance(target, ast.Tuple):
        target = target.elts[1]
    work = [node for node in loop.split.work[:-1] if not _ours(node)]
    found = LoopStep(
        **names,  # type: ignore[arg-type]
        target=text_of(target).strip("()") if isinstance(target, ast.Tuple) else text_of(target),
        work=work,
        loss=loop.loss,
        epochs=epochs,
        outer=outer,
    )
    _look_through(found, loop, above, world)
    modes = Modes(world, found.model, tree if found.model in evals else None)
    for node in tree.body[: tree.body.index(outer)]:
        modes.past(node)
    modes.trained = False
    at = unit.node.lineno
    first, last = ([n for n in above if (n.lineno < at) is early] for early in (True, False))
    lines = {part.lineno for node in loop.split.work for part in _plain(node)}
    cause = in_eval_mode(modes, first, unit.body, lines, last)
    if cause is tree:
        raise _refusal(unit.node, f"the loop trains {found.model} in eval mode, as it was before")
    if cause is not None:
        raise _refusal(cause, f"`{_first(cause)}` has {found.model} train in eval mode, or parts")
    found.in_training_mode = modes.trained
    return found


def _refusal(node: ast.AST, text: str) -> RefusedError:
    return RefusedError(node, f"{text}; wanted a step that says all of the training; {_INSTEAD}")


def _ours(node: ast.stmt) -> bool:
    return any(name.startswith("_hybrid_") for name in bound(node))


def _around(tree: ast.Module, loop: ast.For) -> tuple[ast.stmt, str, list[ast.stmt]]:
    """Return the statement of the cell around a loop, the epochs, and the epoch loop's others."""
    if loop in tree.body:
        return loop, "1", []
    for node in tree.body:
        if isinstance(node, ast.For) and loop in node.body and not node.orelse:
            turns = node.iter
            while isinstance(turns, ast.Call) and last_name(turns.func) not in _RANGES:
                turns = turns.args[0] if turns.args else None
            if isinstance(turns, ast.Call) and turns.args and not loop.orelse:
                given = ", ".join(map(text_of, turns.args))
                epochs = given if len(turns.args) == 1 else f"len(range({given}))"
                return node, epochs, [other for other in node.body if other is not loop]
    raise _refusal(loop, "how often this loop is run is not written as `for _ in range(N)` on it")


def _unwrapped(loader: str | None, above: list[ast.stmt]) -> tuple[str | None, list[ast.stmt]]:
    """Return the loader that `bar = tqdm(loader)` reads, and the epoch loop's other statements."""
    for node in above:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call() as call) if (
                name == loader and last_name(call.func) in WRAPPERS and call.args
            ):
                return text_of(call.args[0]), [other for other in above if other is not node]
    return loader, above


def _look_through(found: LoopStep, loop: Loop, above: list[ast.stmt], world: World) -> None:
    """Refuse what decides, beside the step, what is learned; list what only tells."""
    roles, split = loop.unit.roles, loop.split
    assert split is not None
    if not roles.zeroed:
        raise _refusal(loop.unit.node, "no zero_grad in this loop: gradients add up")
    needs = found.needs() | {found.model, found.optimizer, found.loader}
    turns = found.outer is not loop.unit.node and isinstance(found.outer, ast.For)
    turning = bound(found.outer.target) if turns else set()  # type: ignore[attr-defined]
    known = {id(call) for call, _ in (*roles.steps, *roles.advances)}
    known |= set(map(id, roles.clipped)) | {id(back.call) for back in roles.backwards}
    zeroes = set(map(id, roles.zeroed))
    work = {part.lineno for node in split.work for part in _plain(node)}
    for call, owner in roles.advances:
        _schedule(found, call, text_of(owner), "batch")
    for call in roles.clipped:
        found.clip = _norm(call, found)
        needs |= reads(ast.parse(found.clip))
    if taken := sorted((turning | counter(loop.unit)) & needs):
        raise _refusal(loop.unit.node, f"the loss reads {taken[0]}, which counts the loop's turns")
    for node in [*above, *loop.unit.body]:
        if id(node) in zeroes or (_in_work(node, work, known) and node in loop.unit.body):
            continue
        if node in above and (owner := _advance(node)) is not None:
            _schedule(found, node, owner, "epoch")
            continue
        parts = [part for part in own_scope(node) if id(part) in known]
        if isinstance(node, ast.Expr) and parts:
            continue
        if parts or any(part.lineno in work for part in _plain(node)):
            raise _refusal(node, f"`{_first(node)}` holds the step, and decides about it")
        _check_telling(node, needs, found.model, world)
        found.left.append(node)


def _plain(node: ast.AST) -> list[ast.stmt]:
    """Return the statements in `node` that hold no others."""
    parts = [part for part in own_scope(node) if isinstance(part, ast.stmt)]
    return [part for part in parts if not hasattr(part, "body")]


def _in_work(node: ast.stmt, work: set[int], known: set[int]) -> bool:
    """Return whether a statement of the loop is nothing but part of the step."""
    parts = _plain(node)
    return any(part.lineno in work for part in parts) and all(
        part.lineno in work or any(id(inner) in known for inner in ast.walk(part)) for part in parts
    )


def _check_telling(node: ast.stmt, needs: set[str], model: str, world: World) -> None:
    """Raise RefusedError where a statement of the loop does more than tell."""
    match node:
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=attr))):
            if name == model and attr in ("train", "eval"):
                return
    for part in own_scope(node):
        ends = isinstance(part, (ast.Break, ast.Continue, ast.Return))
        if ends and not _within_loop(node, part):
            raise _refusal(part, f"`{_first(node)}` decides how long is trained")
    done = effect(world, Piece(node, text_of(node), 0, 0, 0, apart=False))
    if done.trains or done.seeds:
        raise _refusal(node, f"`{_first(node)}` {'trains' if done.trains else 'seeds'}, too")
    written = bound(node) & needs
    touched = world.objects(done.changes)
    known = {name for name in needs if world.objects([name]) & touched and world.is_data(name)}
    written |= known & done.changes or known
    if written:
        raise _refusal(node, f"`{_first(node)}` changes {min(written)} while it trains")


def _within_loop(node: ast.stmt, jump: ast.AST) -> bool:
    inner = [part for part in own_scope(node) if isinstance(part, LOOPS)]
    return not isinstance(jump, ast.Return) and any(jump in own_scope(part) for part in inner)


def _advance(node: ast.stmt) -> str | None:
    """Return the scheduler that a statement of the epoch loop steps."""
    match node:
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=owner, attr="step"))):
            return text_of(owner)
    return None


def _schedule(found: LoopStep, call: ast.AST, name: str, interval: str) -> None:
    given = call.value if isinstance(call, ast.Expr) else call
    plain = isinstance(given, ast.Call) and not (given.args or given.keywords)
    if found.scheduler is not None or not plain or not name.isidentifier():
        raise _refusal(call, f"`{_first(call)}` is not the plain step of one scheduler")
    found.scheduler, found.interval = name, interval


def _norm(call: ast.Call, found: LoopStep) -> str:
    """Return the norm that gradients are clipped to.

    Raises:
        RefusedError: they are clipped otherwise than by the norm of all of them.
    """
    match call:
        case ast.Call(args=[ast.Call(func=ast.Attribute(value=owner, attr="parameters")), limit]):
            plain = not call.keywords
        case ast.Call(
            args=[ast.Call(func=ast.Attribute(value=owner, attr="parameters"))],
            keywords=[ast.keyword(arg="max_norm", value=limit)],
        ):
            plain = True
        case _:
            raise _refusal(call, f"`{_first(call)}` is no clipping of the whole norm")
    if not plain or base(owner) != found.model or "norm" not in last_name(call.func):
        raise _refusal(call, f"`{_first(call)}` is no clipping of the whole norm")
    return text_of(limit)


def _first(node: ast.AST) -> str:
    text = text_of(node).splitlines()[0]
    return text if len(text) <= 60 else text[:57] + "..."


def left_out(found: LoopStep) -> Iterator[str]:
    """Yield the first lines of what a script leaves out of a loop."""
    for node in found.left:
        yield _first(node)
