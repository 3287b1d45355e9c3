"""Whether a training loop trains its model in eval mode, followed through its statements in the
order in which they are run. Runs nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .changing import Scope
from .holding import aliases, behind, handed_on
from .names import bound, own_scope
from .world import World


@dataclass
class Modes:
    """The mode of a model: `cause` is the statement that put it into eval mode, at least in part;
    None while it trains."""

    world: World
    model: str
    cause: ast.AST | None = None
    trained: bool = False  # whether a statement has put all of it into training mode
    _own: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self._own = self.world.objects([self.model])

    def past(self, node: ast.stmt) -> None:
        """Go past a statement."""
        if self.model in bound(node):
            self.cause = node if ".from_pretrained(" in ast.unparse(node) else None
        calls = list(self._calls(node, list(own_scope(node)), frozenset()))
        if not calls:
            return
        last, trains, whole = calls[-1]
        if not trains:
            self.cause = last
        elif whole and isinstance(node, ast.Expr) and node.value is last:
            self.cause, self.trained = None, True

    def _calls(
        self, node: ast.AST, parts: Sequence[ast.AST], seen: frozenset[int]
    ) -> Iterator[tuple[ast.AST, bool, bool]]:
        """Yield the calls that set a mode of the model: the call, whether it is training mode, and
        whether it is all of the model that it is called on."""
        standing = aliases(self.world, parts)
        scope = Scope(self.world, frozenset(), lambda _: None)  # type: ignore[arg-type, return-value]
        for call in filter(lambda part: isinstance(part, ast.Call), parts):
            assert isinstance(call, ast.Call)
            match call.func:
                case ast.Attribute(value=owner, attr="train" | "eval" as attr):
                    names = behind(handed_on(self.world, owner), standing)
                    if seen or self._concerns(names):
                        whole = isinstance(owner, ast.Name) and owner.id == self.model
                        given = [*call.args, *(keyword.value for keyword in call.keywords)]
                        on = all(isinstance(v, ast.Constant) and v.value for v in given)
                        yield call, attr == "train" and on, whole
                        continue
            names = {part.id for part in ast.walk(call) if isinstance(part, ast.Name)}
            if seen or self._concerns(self.world.reached(names)):
                for function in scope.own(call):
                    if id(function) not in seen:
                        inner = [p for p in ast.walk(function) if p is not function]
                        inside = self._calls(node, inner, seen | {id(function)})
                        yield from ((call, trains, False) for _, trains, _ in inside)

    def _concerns(self, names: set[str]) -> bool:
        return self.model in names or bool(self.world.objects(names) & self._own)


def in_eval_mode(
    modes: Modes,
    above: Sequence[ast.stmt],
    batch: Sequence[ast.stmt],
    work: set[int],
    below: Sequence[ast.stmt],
) -> ast.AST | None:
    """Return what has a loop train in eval mode, None where it trains in training mode.

    Args:
        modes: of the model before the loop.
        above, below: the statements of an epoch before and after its batches.
        batch: the statements of the loop over them; `work` the lines of the step in it.
    """
    for _ in range(2):  # a second turn begins as the first one ends
        for node in above:
            modes.past(node)
        for node in [*batch, *batch]:
            modes.past(node)
            if node.lineno in work and modes.cause is not None and not _sets_mode(node):
                return modes.cause
        for node in below:
            modes.past(node)
    return None


def _sets_mode(node: ast.stmt) -> bool:
    match node:
        case ast.Expr(value=ast.Call(func=ast.Attribute(attr="train" | "eval"))):
            return True
    return False
