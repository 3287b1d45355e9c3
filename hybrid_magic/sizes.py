"""StepSizes: the sizes of every step of a run, in little memory, so that they can be replayed.

Steps in a row that were cut alike with the same factor on the learning rate are one entry.
Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


class StepSizes:
    """For each step, oldest first: its micro-batch sizes and the factor on its learning rate."""

    def __init__(self) -> None:
        self._entries: list[tuple[int, tuple[int, ...], float]] = []  # steps, sizes, factor
        self._last: tuple[Sequence[int], float] | None = None
        self._count = 0  # of the newest entry, which is still growing

    def append(self, sizes: Sequence[int], factor: float) -> None:
        """Take in one more step."""
        if self._last is not None and self._last[1] == factor and self._last[0] == sizes:
            self._count += 1
            return
        self._fold()
        self._last, self._count = (sizes, factor), 1

    def _fold(self) -> None:
        if self._last is not None:
            self._entries.append((self._count, tuple(self._last[0]), self._last[1]))
            self._last = None

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], float]]:
        for count, sizes, factor in self.entries():
            for _ in range(count):
                yield sizes, factor

    def __len__(self) -> int:
        return sum(count for count, _, _ in self._entries) + (self._count if self._last else 0)

    def entries(self) -> list[tuple[int, tuple[int, ...], float]]:
        """Return (steps, sizes, factor) of every stretch of equal steps."""
        self._fold()
        return self._entries

    @classmethod
    def from_entries(cls, entries: Any) -> StepSizes:
        """Return the sizes that `entries` gave, also after a trip through JSON."""
        found = cls()
        found._entries = [(int(n), tuple(sizes), float(factor)) for n, sizes, factor in entries]
        return found
