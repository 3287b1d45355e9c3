"""The modules of a profile as a tree with as many rows as there is room for.

What takes most time is opened first, siblings keep the order of the model, and those that get no
row of their own share one, so that a level always adds up. Knows no layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from ..findings import Module

_Number = TypeVar("_Number", int, float)

SMALL, LARGE = 0.01, 0.1  # of the whole: siblings below share a row; parts above are looked into


@dataclass(frozen=True, slots=True)
class Branch:
    """A row: a module, or several summed up. `opened`: what is in it has the rows below it."""

    name: str
    depth: int
    module: Module
    opened: bool

    @property
    def label(self) -> str:
        """What tells the row apart where no others stand around it: "features.0 Conv2d"."""
        path, kind = self.module.path or self.name, self.module.kind
        return f"{path} {kind}" if path.rpartition(".")[2].isdigit() else path


@dataclass(slots=True)
class _Node:
    name: str
    module: Module
    parts: list[_Node] = field(default_factory=list)
    shown: list[_Node] = field(default_factory=list)


def branches(
    modules: Iterable[Module], root: str, most: int, *, brief: bool = True
) -> list[Branch]:
    """Return at most `most` rows, in the order of the model.

    Args:
        modules: those that were never called are left out, unless none was.
        root: the name of the whole model.
        most: rows, at least 2.
        brief: siblings that take less than 1 % of the whole share a row, and what takes less than
            10 % is not looked into, though there be room.
    """
    listed = list(modules)
    held = [module for module in listed if module.calls] or listed
    weigh = _seconds if any(map(_seconds, held)) else _bytes
    whole = max(map(weigh, held), default=0.0) if brief else 0.0
    least = SMALL * whole
    top = shown = _folded(_grown(held, root), most, least, weigh)
    left = most - len(top)
    while openable := [node for node in shown if node.parts and not node.shown]:
        heaviest = max(openable, key=lambda node: weigh(node.module))
        if weigh(heaviest.module) < LARGE * whole:
            break
        parts = _folded(heaviest.parts, most, least, weigh)
        if len(parts) > left:
            if 2 * left < most:
                break  # what weighs less would distract from what cannot be shown
            parts = _folded(heaviest.parts, left, least, weigh)
        heaviest.shown = parts
        shown = [*shown, *parts]
        left -= len(parts)
    return list(_rows(top, 0))


def parts(modules: Iterable[Module], root: str, most: int) -> list[Branch]:
    """Return rows of the tree, none of which is in another, as far as their time is known."""
    found = branches(modules, root, most)
    return [row for row in found if not row.opened and row.module.seconds is not None]


def _grown(modules: Sequence[Module], root: str) -> list[_Node]:
    """Return the modules that are in no other, with all that is in them."""
    nodes = {module.path: _Node(module.path or root, module) for module in modules}
    tops = []
    for path, node in nodes.items():
        above = path
        while above:
            above = above.rpartition(".")[0]
            if above in nodes:
                nodes[above].parts.append(node)
                node.name = path[len(above) :].lstrip(".")
                break
        else:
            tops.append(node)
    return tops


def _folded(
    nodes: Sequence[_Node], room: int, least: float, weigh: Callable[[Module], float]
) -> list[_Node]:
    """Return the nodes in at most `room` rows; the last may stand for several."""
    heavy = [node for node in nodes if weigh(node.module) >= least]
    kept = heavy if len(nodes) - len(heavy) > 1 else list(nodes)
    if len(kept) + (len(kept) < len(nodes)) > room:
        ranked = sorted(kept, key=lambda node: weigh(node.module), reverse=True)
        kept = ranked[: room - 1]
    chosen = {id(node) for node in kept}
    rest = [node.module for node in nodes if id(node) not in chosen]
    return [node for node in nodes if id(node) in chosen] + ([_summed(rest)] if rest else [])


def _summed(modules: Sequence[Module]) -> _Node:
    kinds = {module.kind for module in modules}
    name = f"{len(modules)} " + (f"more {kinds.pop()}" if len(kinds) == 1 else "smaller")
    whole = Module(
        path="",
        kind="",
        calls=sum(module.calls for module in modules),
        forward_s=_sum(module.forward_s for module in modules),
        backward_s=_sum(module.backward_s for module in modules),
        parameter_bytes=sum(module.parameter_bytes for module in modules),
        activation_bytes=_sum(module.activation_bytes for module in modules),
        peak_bytes=max((m.peak_bytes for m in modules if m.peak_bytes is not None), default=None),
        flops=_sum(module.flops for module in modules),
    )
    return _Node(name, whole)


def _sum(values: Iterable[_Number | None]) -> _Number | None:
    known = [value for value in values if value is not None]
    return sum(known[1:], known[0]) if known else None


def _seconds(module: Module) -> float:
    return module.seconds or 0.0


def _bytes(module: Module) -> float:
    return float(module.parameter_bytes)


def _rows(nodes: Iterable[_Node], depth: int) -> Iterator[Branch]:
    for node in nodes:
        yield Branch(node.name, depth, node.module, bool(node.shown))
        yield from _rows(node.shown, depth + 1)
