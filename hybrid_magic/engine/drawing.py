"""What a loader draws from beside the shared random numbers: generators that it or its dataset
holds, and where its samplers stand.

Kept and put back with the shared ones. What stands in a worker process is that worker's own copy
and is not seen here. Reads no data and changes nothing but what it puts back.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .randomness import Boundary, all_states, put_all_back

_WRAPPED = ("dataset", "transform", "transforms", "target_transform")


class Own:
    """A generator of Python's or NumPy's, told like torch's; `drawn` is the thing itself."""

    def __init__(self, drawn: Any) -> None:
        self.drawn = drawn

    def get_state(self) -> Any:
        raise NotImplementedError

    def set_state(self, new_state: Any) -> None:
        raise NotImplementedError

    def manual_seed(self, seed: int) -> None:
        raise NotImplementedError


class _OfPython(Own):
    def get_state(self) -> Any:
        return self.drawn.getstate()

    def set_state(self, new_state: Any) -> None:
        self.drawn.setstate(new_state)

    def manual_seed(self, seed: int) -> None:
        self.drawn.seed(seed)


class _OfNumpy(Own):
    """A Generator, whose bit generator has the state."""

    def get_state(self) -> Any:
        return copy.deepcopy(self.drawn.bit_generator.state)

    def set_state(self, new_state: Any) -> None:
        self.drawn.bit_generator.state = new_state

    def manual_seed(self, seed: int) -> None:
        self.set_state(type(self.drawn.bit_generator)(seed % 2**32).state)


class _OfOldNumpy(Own):
    """A RandomState."""

    def get_state(self) -> Any:
        return self.drawn.get_state(legacy=False)

    def set_state(self, new_state: Any) -> None:
        self.drawn.set_state(new_state)

    def manual_seed(self, seed: int) -> None:
        self.drawn.seed(seed % 2**32)


def _as_generator(value: Any) -> torch.Generator | Own | None:
    if isinstance(value, torch.Generator):
        return value
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return _OfPython(value)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return _OfNumpy(value)
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return _OfOldNumpy(value)
    return None


def generators_of(loader: Any) -> list[Any]:
    """Return the generators that a loader holds, each once, torch's or `Own`: its own and those of
    its samplers, its dataset, datasets that are wrapped by it, and their transforms."""
    return list({**_among(_readers(loader)), **_among(_wrapped(loader))}.values())


def _among(owners: Iterable[Any]) -> dict[int, torch.Generator | Own]:
    """Return the generators that `owners` hold, by their identity."""
    found: dict[int, torch.Generator | Own] = {}
    for owner in owners:
        for value in (getattr(owner, "generator", None), *_held(owner).values()):
            generator = _as_generator(value)
            if generator is not None:
                found.setdefault(id(value), generator)
    return found


def _itself(generator: torch.Generator | Own) -> Any:
    return generator.drawn if isinstance(generator, Own) else generator


def _held(thing: Any) -> dict[str, Any]:
    return vars(thing) if hasattr(thing, "__dict__") else {}


def _readers(loader: Any) -> list[Any]:
    """Return the loader and its samplers, each once."""
    found, waiting = [], [loader]
    while waiting:
        owner = waiting.pop()
        if owner is not None and not any(owner is other for other in found):
            found.append(owner)
            waiting += [getattr(owner, name, None) for name in ("sampler", "batch_sampler")]
    return found


def _wrapped(loader: Any) -> Iterator[Any]:
    """Yield the loader's dataset, those that it wraps, and their transforms."""
    seen, waiting = {id(loader)}, [loader]
    while waiting:
        held = _held(waiting.pop())
        for part in (held.get(name) for name in _WRAPPED):
            for each in part if isinstance(part, (list, tuple)) else [part]:
                if each is not None and id(each) not in seen:
                    seen.add(id(each))
                    waiting.append(each)
                    yield each


class Place:
    """Where a sampler of the person's own stands between two epochs: its `epoch`, and what its
    `state_dict` says."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self._counts = type(getattr(sampler, "epoch", None)) is int
        self._tells = hasattr(sampler, "state_dict") and hasattr(sampler, "load_state_dict")
        self.known = self._counts or self._tells

    @property
    def kind(self) -> str:
        return type(self._sampler).__name__

    def get_state(self) -> Any:
        told = copy.deepcopy(self._sampler.state_dict()) if self._tells else None
        return [self._sampler.epoch if self._counts else None, told]

    def set_state(self, state: Any) -> None:
        """Put it back; random numbers that this draws are the caller's to put back."""
        epoch, told = state
        if self._counts and self._sampler.epoch != epoch:
            self._sampler.epoch = epoch
        if not self._tells:
            return
        self._sampler.load_state_dict(copy.deepcopy(told))
        if next(iter(self._sampler), None) is None:  # it stood at the end of the epoch before
            return
        self._sampler.load_state_dict(copy.deepcopy(told))


def places_of(loader: Any) -> list[Place]:
    """Return the places of the loader's samplers that have one."""
    found = map(Place, _readers(loader)[1:])
    return [place for place in found if place.known]


class Drawing:
    """All random numbers that a run of a loader draws, and where its samplers stand."""

    def __init__(self, loader: Any) -> None:
        self.generators = generators_of(loader)
        self._places = places_of(loader)
        self._loader = loader
        self._boundary = Boundary(self.generators)
        apart = _among([loader, *_wrapped(loader)])
        self._ordering = _among(_readers(loader)[1:]).keys() - apart.keys()  # samplers' alone

    def of_epoch(self) -> dict[str, Any]:
        """Return all as an epoch begins with it."""
        return all_states(self.generators) | {"places": [each.get_state() for each in self._places]}

    def now(self) -> dict[str, Any]:
        """Return it in the midst of an epoch: where samplers stand follows from its beginning."""
        return all_states(self.generators)

    def between_steps(self) -> dict[str, Any]:
        """Return what `now` does, as cheap as it can be had before every step."""
        return self._boundary.states()

    def put_back(self, states: dict[str, Any], *, ordered: bool = False) -> None:
        """Put back what one of the others has returned, also where that went through a file.

        Args:
            ordered: the samplers were just gone through to this moment, and perhaps ahead of it:
                what they alone draw from stays.
        """
        for place, state in zip(self._places, states.get("places", ()), strict=False):
            place.set_state(state)
        now = self.now()["own"]
        own = [
            found if ordered and id(_itself(generator)) in self._ordering else state
            for generator, found, state in zip(self.generators, now, states["own"], strict=True)
        ]
        put_all_back(states | {"own": own}, self.generators)

    def kinds(self) -> list[str]:
        """Return what it is that is kept, in order."""
        drawn = [_itself(each) for each in self.generators]
        drawn = [getattr(each, "bit_generator", each) for each in drawn]
        return [*(type(each).__name__ for each in drawn), *(place.kind for place in self._places)]

    def notes(self) -> list[str]:
        """Return a sentence for each sampler that may hold what nothing here knows of."""
        names = [
            type(each).__name__
            for each in _readers(self._loader)[1:]
            if not type(each).__module__.startswith(("torch.utils.data", "builtins"))
            and not Place(each).known
            and not any(_as_generator(value) is not None for value in _held(each).values())
        ]
        return [
            f"what {name}, the loader's sampler, keeps by itself is in no checkpoint: the order of "
            "an epoch that is gone on with may be another one; to keep it, give it state_dict() "
            "and load_state_dict(), or have it draw from a torch.Generator that it holds"
            for name in dict.fromkeys(names)
        ]
