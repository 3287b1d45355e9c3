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
from .effects import UNSEEN, Effect, effect
from .names import exposed
from .pieces import DEFINITIONS, IMPORTS, Piece
from .world import World, newest_of


@dataclass
class Gathered:
    """The statements to keep; `missing`: names that no statement makes; `trained`: statements left
    out that trained what is needed before; `drew`: statements left out that may have drawn random
    numbers where those that are kept draw on after a seed; `unseen`: statements that reach names by
    their text, so that what they need or make is not known."""

    kept: list[Piece] = field(default_factory=list)
    missing: set[str] = field(default_factory=set)
    trained: list[Piece] = field(default_factory=list)
    drew: list[Piece] = field(default_factory=list)
    unseen: list[Piece] = field(default_factory=list)


def gather(
    pieces: Sequence[Piece], needed: set[str], trained: str, namespace: Mapping[str, Any]
) -> Gathered:
    """Return what of `pieces` the names `needed` depend on after them.

    Args:
        pieces: the statements of all cells, in the order in which they were run.
        trained: the name, among them, of the model.
        namespace: what the notebook holds now, looked at for kinds only.
    """
    world = World(namespace, newest=newest_of(pieces))
    effects: list[Effect] = []
    given: list[dict[str, Any]] = []  # before each piece
    for place, piece in enumerate(pieces):
        given.append(dict(world.given))
        effects.append(_past(world, piece, place))
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
            waiting += [piece] if seeded and (piece.trained or draws(world, piece.node)) else []
        elif reseeds(world, piece.node):
            seeded, waiting = True, []
        elif draws(world, piece.node):
            found += waiting
            waiting = []
    return found + waiting  # the training itself draws


def world_after(pieces: Sequence[Piece], namespace: Mapping[str, Any]) -> World:
    """Return what names stand for after all of `pieces`."""
    world = World(namespace, newest=newest_of(pieces))
    for place, piece in enumerate(pieces):
        _past(world, piece, place)
    return world


def _past(world: World, piece: Piece, place: int) -> Effect:
    """Let a world go past a statement; return what that does."""
    done = effect(world, piece)
    if not done.trains:
        world.take(piece, place, done.gives)
        for names, stored in done.hold:
            world.hold(names, stored)
    return done


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
        if isinstance(piece.node, ast.Delete):  # so it is none of the cells' that is read later
            needed = needed - {getattr(target, "id", "") for target in piece.node.targets}
        if effect.seeds:
            seeding = ast.unparse(piece.node.value.func)  # type: ignore[attr-defined]
            if seeding in seeded and not piece.binds & needed:
                continue
            seeded.add(seeding)
        elif not (effect.sets_up or _matters(piece, effect, needed, world)):
            found.unseen[:0] = [piece] if effect.unseen else []
            continue
        elif not isinstance(piece.node, (*DEFINITIONS, *IMPORTS)):
            seeded.clear()  # it may draw random numbers
        found.kept.insert(0, piece)
        found.unseen[:0] = [piece] if _reaches_by_text(piece, world) else []
        needed = _before(piece, needed, world) - (effect.gives - world.given.keys())
    found.missing = needed
    return found


def _matters(piece: Piece, effect: Effect, needed: set[str], world: World) -> bool:
    """Return whether a statement makes or changes what is needed after it."""
    return bool(
        (piece.binds | effect.changes) & needed
        or world.objects(effect.changes) & world.objects(needed)
        or effect.changes & world.classes(needed)
    )


def _reaches_by_text(piece: Piece, world: World) -> bool:
    """Return whether a statement, or a function of it, reads names that its text does not show."""
    asked = piece.now | (piece.late - {"locals"})  # in a function these are its own
    return bool(asked & UNSEEN - world.given.keys())


def _before(piece: Piece, needed: set[str], world: World) -> set[str]:
    """Return the names that are needed before a statement that is kept."""
    if isinstance(piece.node, DEFINITIONS):
        return (needed - piece.binds) | world.reached(piece.now)
    own = piece.binds - world.given.keys()  # it was run, so it gave them their values itself
    read = exposed([piece.node]) & piece.now
    return (set(exposed([piece.node], frozenset(needed))) | world.reached(read)) - own
