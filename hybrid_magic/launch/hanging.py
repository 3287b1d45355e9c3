"""Which process hangs: a decision from what is known of each. Has no clock and looks at nothing.

Only the difference between processes counts: a first batch that takes minutes makes all wait alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PATIENCE_S = 20.0  # that others wait for one that does nothing
IDLE_S = 10.0  # of it, in which it did nothing
BUSY_S, BUSY_STEPS = 600.0, 20.0  # that others wait for one that is busy, at least; of the longest
# What still counts as nothing, a second: of a core (signs of life take a tenth of that), bytes read
# and written (they are some hundred), and times that it went on after a wait (polls are a few).
IDLE_RATIO, IDLE_BYTES, IDLE_WAITS = 0.03, 1 << 16, 20

Activity = tuple[float, int, int]  # so far: processor seconds, bytes, waits that ended


@dataclass(frozen=True, slots=True)
class Hang:
    """`rank` has kept the others waiting for `waited_s`, and is `busy` or does nothing."""

    rank: int
    waited_s: float
    busy: bool


class Hangs:
    """Watches the ranks of a run; to be told of them about once a second."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, Activity]] = {}
        self._idle_since: dict[int, float] = {}

    def look(
        self,
        now: float,
        waiting: Mapping[int, float | None],
        activity: Mapping[int, Activity | None],
        longest_step_s: float = 0.0,
    ) -> Hang | None:
        """Return the rank that hangs, None where none does.

        Args:
            now: seconds of a steady clock.
            waiting: since when each rank waits for the others, None where it does not.
            activity: what those that do not wait have done so far; None is unknown, and busy.
            longest_step_s: the longest step so far.
        """
        since = [each for each in waiting.values() if each is not None]
        late = [rank for rank, each in waiting.items() if each is None]
        for rank in self._seen.keys() - set(late):
            del self._seen[rank]
        if not since:
            return None
        waited = now - min(since)
        limit = max(BUSY_S, BUSY_STEPS * longest_step_s)
        for rank in late:
            idle = self._idle(now, rank, activity.get(rank))
            if waited > PATIENCE_S and idle >= IDLE_S:
                return Hang(rank, waited, busy=False)
            if waited > limit:
                return Hang(rank, waited, busy=True)
        return None

    def _idle(self, now: float, rank: int, activity: Activity | None) -> float:
        """Return for how long a rank has done nothing, as far as it was looked at."""
        before = self._seen.pop(rank, None)
        if activity is None:
            return 0.0
        self._seen[rank] = now, activity
        if before is None or not _nothing(before[1], activity, now - before[0]):
            self._idle_since[rank] = now
        return now - self._idle_since[rank]


def _nothing(before: Activity, after: Activity, seconds: float) -> bool:
    """Return whether next to nothing was done in between; children that ended took theirs along,
    which leaves less than before."""
    done = (new - old for old, new in zip(before, after, strict=True))
    most = (IDLE_RATIO, IDLE_BYTES, IDLE_WAITS)
    return all(0 <= each <= limit * seconds for each, limit in zip(done, most, strict=True))
