"""StepSizes: the sizes of every step of a run, in little memory, so that they can be replayed.

Steps in a row that were cut alike with the same factor on the learning rate are one entry, and
equal cuts are one tuple. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Entry = tuple[int, tuple[int, ...], float]  # steps, micro-batch sizes, learning-rate factor


class StepSizes:
    """For each step, oldest first: its micro-batch sizes and the factor on its learning rate."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._cuts: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._last: tuple[Sequence[int], float] | None = None
        self._count = 0  # of the newest entry, which is still growing

    def append(self, sizes: Sequence[int], factor: float) -> None:
        """Take in one more step; `sizes` stay as they are from now on."""
        if self._last is not None and self._last[1] == factor and self._last[0] == sizes:
            self._count += 1
            return
        self._fold()
        self._last, self._count = (sizes, factor), 1

    def _fold(self) -> None:
        """Make the newest steps an entry, or part of the one before if they are like it."""
        if self._last is None:
            return
        sizes, factor = tuple(self._last[0]), self._last[1]
        if self._entries and self._entries[-1][1:] == (sizes, factor):
            self._count += self._entries.pop()[0]
        self._entries.append((self._count, self._cuts.setdefault(sizes, sizes), factor))
        self._last = None

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], float]]:
        for count, sizes, factor in self.entries():
            for _ in range(count):
                yield sizes, factor

    def __len__(self) -> int:
        return sum(count for count, _, _ in self._entries) + (self._count if self._last else 0)

    def entries(self) -> list[Entry]:
        """Return (steps, sizes, factor) of every stretch of equal steps."""
        self._fold()
        return list(self._entries)

    @classmethod
    def from_entries(cls, entries: Any) -> StepSizes:
        """Return the sizes that `entries` gave, also after a trip through JSON.

        Raises:
            ValueError, TypeError: these are no entries.
        """
        found = cls()
        for count, sizes, factor in entries:
            numbers = [count, *sizes]
            if not sizes or any(type(n) is not int or n < 1 for n in numbers):
                raise ValueError(f"{count} steps of {sizes}; wanted whole numbers from 1")
            if isinstance(factor, bool) or not isinstance(factor, (int, float)):
                raise TypeError(f"a factor that is a {type(factor).__name__}; wanted a number")
            cut = tuple(sizes)
            found._entries.append((count, found._cuts.setdefault(cut, cut), float(factor)))
        return found
