"""The statements of a notebook that some names depend on, in the order in which they were run.

Followed back from the last statement: what gives a needed name its value, what changes its object
in place, what seeds; functions and classes with the names that they read when they are called.
What trains is left out. Decides nothing about where a statement is to stand.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .chance import draws, reseeds
from .effects import Effect, effect
from .names import exposed
from .pieces import DEFINITIONS, IMPORTS, Piece
from .world import World


@dataclass
class Gathered:
    """The statements to keep; `missing`: names that no statement makes; `trained`: statements left
    out that trained what is needed before; `drew`: statements left out that may have drawn random
    numbers where those that are kept draw on after a seed."""

    kept: list[Piece] = field(default_factory=list)
    missing: set[str] = field(default_factory=set)
    trained: list[Piece] = field(default_factory=list)
    drew: list[Piece] = field(default_factory=list)


def gather(
    pieces: Sequence[Piece], needed: set[str], trained: str, namespace: Mapping[str, Any]
) -> Gathered:
    """Return what of `pieces` the names `needed` depend on after them.

    Args:
        pieces: the statements of all cells, in the order in which they were run.
        trained: the name, among them, of the model.
        namespace: what the notebook holds now, looked at for kinds only.
    """
    world = World(namespace)
    effects: list[Effect] = []
    given: list[dict[str, Any]] = []  # before each piece
    for place, piece in enumerate(pieces):
        effects.append(effect(world, piece))
        given.append(dict(world.given))
        if not effects[-1].trains:
            world.take(piece, place)
    made = frozenset(world.given)
    while True:  # what kept functions read late stands as it does in the end
        before = World(namespace, world.given).reached(needed) & (made | needed)
        found = _backwards(pieces, effects, given, before, trained, namespace)
        late = frozenset().union(*(piece.late for piece in found.kept)) & made
        if late <= needed:
            found.drew = _drew(pieces, found.kept, [World(namespace, each) for each in given])
            return found
        needed = needed | late


def _drew(pieces: Sequence[Piece], kept: Sequence[Piece], worlds: Sequence[World]) -> list[Piece]:
    """Return the pieces left out that may have drawn what is drawn otherwise without them."""
    stays = set(map(id, kept))
    waiting: list[Piece] = []
    found: list[Piece] = []
    seeded = False
    for piece, world in zip(pieces, worlds, strict=True):
        if isinstance(piece.node, (*DEFINITIONS, *IMPORTS)):
            continue
        if id(piece) not in stays:
            waiting += [piece] if seeded and (piece.trained or draws(piece.node)) else []
        elif reseeds(world, piece.node):
            seeded, waiting = True, []
        elif draws(piece.node):
            found += waiting
            waiting = []
    return found + waiting  # the training itself draws


def world_after(pieces: Sequence[Piece], namespace: Mapping[str, Any]) -> World:
    """Return what names stand for after all of `pieces`."""
    world = World(namespace)
    for place, piece in enumerate(pieces):
        if not effect(world, piece).trains:
            world.take(piece, place)
    return world


def _backwards(
    pieces: Sequence[Piece],
    effects: Sequence[Effect],
    given: Sequence[dict[str, Any]],
    needed: set[str],
    trained: str,
    namespace: Mapping[str, Any],
) -> Gathered:
    found, seeded = Gathered(), set[str]()
    for place in range(len(pieces) - 1, -1, -1):
        piece, effect = pieces[place], effects[place]
        world = World(namespace, given[place])
        if effect.trains:
            touched = world.reached(piece.now) if piece.trained is None else piece.trained
            if trained in needed and world.holds(touched, trained):
                found.trained.insert(0, piece)
            continue
        if effect.seeds:
            seeding = ast.unparse(piece.node.value.func)  # type: ignore[attr-defined]
            if seeding in seeded:
                continue
            seeded.add(seeding)
        elif not (piece.binds & needed or world.objects(effect.changes) & world.objects(needed)):
            continue
        elif not isinstance(piece.node, (*DEFINITIONS, *IMPORTS)):
            seeded.clear()  # it may draw random numbers
        found.kept.insert(0, piece)
        needed = _before(piece, needed, world)
    found.missing = needed
    return found


def _before(piece: Piece, needed: set[str], world: World) -> set[str]:
    """Return the names that are needed before a statement that is kept."""
    if isinstance(piece.node, DEFINITIONS):
        return (needed - piece.binds) | world.reached(piece.now)
    return set(exposed([piece.node], frozenset(needed))) | world.reached(piece.now)
