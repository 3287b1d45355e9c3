"""Undo: what must be put back whatever ends a run, even if what ends it strikes again meanwhile.

Every piece of work pushed here may be done twice and may find nothing to do. `train` calls the
stack twice, one `finally` inside another: an interrupt that cuts the first call short is answered
by the second, which goes on with what is left. Work that fails is done once more, for the error may
have struck it from outside: torch raises the death of a loader's worker wherever the program is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable


class Undo:
    """A stack of work, the newest first; each piece leaves the stack when it was done."""

    def __init__(self) -> None:
        self._works: list[Callable[[], object]] = []
        self._outer = sys.exc_info()[1]  # handled by a person who trains in their `except`

    def push(self, work: Callable[[], object]) -> None:
        self._works.append(work)

    @property
    def error(self) -> BaseException | None:
        """What is ending the run, None while nothing is."""
        error = sys.exc_info()[1]
        return None if error is self._outer else error

    def __call__(self) -> None:
        """Do all that is left.

        Raises:
            The first error of the work itself, after the rest was done; unless another one, which
            the person should rather see, is on its way already.
        """
        under_way = self.error is not None
        failed: Exception | None = None
        while self._works:
            work = self._works[-1]
            for again in (True, False):
                try:
                    work()
                    break
                except Exception as error:  # noqa: BLE001 - raised below, when the rest is done
                    failed = failed if again else failed or error
            self._works.pop()
        if failed is not None and not under_way:
            raise failed
