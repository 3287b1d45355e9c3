"""A training cell of the corpus, and what is expected of it."""

from __future__ import annotations

from dataclasses import dataclass

SLICED, VERBATIM = "sliced", "verbatim"
RUNS = "runs"  # either way


@dataclass(frozen=True)
class Refused:
    """The cell is refused at a line that begins with one of `at`, in words that hold `words`."""

    at: tuple[str, ...]
    words: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """A cell's text and the cells around it.

    `setup` is an earlier cell, `after` a later one, both plain. `whole` is why pieces of a batch
    do not add up to the batch (dropout, batch statistics): then only the uncut run is compared.
    `piecewise`: the body runs once a piece, so that in pieces the weights alone are the same.
    """

    name: str
    source: str
    setup: str
    expect: str | Refused = SLICED
    after: str = ""
    whole: str = ""
    piecewise: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", self.source.strip("\n") + "\n")

    def lines_at(self, starts: tuple[str, ...]) -> list[int]:
        """Return the numbers of the lines that begin with one of `starts`; the magic's is 1."""
        return [
            number
            for number, line in enumerate(self.source.splitlines(), 2)
            if line.strip().startswith(starts)
        ]


def refused(at: str | tuple[str, ...], *words: str) -> Refused:
    return Refused((at,) if isinstance(at, str) else at, words)
