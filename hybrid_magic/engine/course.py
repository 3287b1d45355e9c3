"""The course of a profile: how closely to look at each step, and when enough was seen.

First a few steps to warm up, then some that are only timed, then some with modules, one with the
ledger, and the same for smaller micro-batches. All within a few seconds, fewer where steps are
slow. Trains nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

from ..config import ProfileConfig
from ..findings import Setting
from . import precision as precisions
from . import tracing
from .control import RunControl, hand_on
from .lens import Lens, Look
from .setting import setting_of

WARM_STEPS = 3
TIMED_STEPS = 30
# when to go on: warming up, timing, following modules, timing smaller micro-batches, all
WARM_S, TIMED_S, MODULES_S, CUT_S, WHOLE_S = 1.0, 3.0, 1.5, 0.7, 11.0
GROWN, FLAT = 4, 0.75  # a larger step, tried where the whole batch costs less than this a sample
CUTS = (2, 4)  # into how many micro-batches a step is cut for the line over sizes


class Course:
    """`looks` are all steps, `timed` those that count, `followed` those with modules, `ledgers`
    those with a ledger; `cut` hold the timed ones of steps that were cut smaller."""

    def __init__(self, config: ProfileConfig, outer: RunControl | None) -> None:
        self.control = RunControl(poll=self._poll)
        self.looks: list[Look] = []
        self.timed: list[Look] = []
        self.followed: list[Look] = []
        self.ledgers: list[Look] = []
        self.cut: list[Look] = []
        self.notes: list[str] = []
        self.setting: Setting | None = None
        self.lens: Lens | None = None
        self.over = False
        self._config, self._outer = config, outer
        self._began = time.perf_counter()
        self._tracer: tracing.Tracer | None = None
        self._look: Look | None = None
        self._asked: str | None = None
        self._pieces: int | None = None  # asked for
        self.stopped = False
        self._plan = self._planned()

    def choose(self, look: Look | None) -> str:
        """Return how to look at the next step, after `look` was taken (None: a run begins)."""
        if look is None and self._pieces is not None:  # a new run has not heard of it
            self.control.set("accum", self._pieces)
        if look is None or self.over:
            return "pass"
        self.looks.append(look)
        if self._asked is not None and look.mode != self._asked:
            return self._asked  # a run has begun in between
        self._look = look
        self._asked = next(self._plan, None)
        if self._asked is None:
            self.over = True
            self.control.ask("stop")
        return self._asked or "pass"

    # -- the plan --

    def _planned(self) -> Iterator[str]:
        """Yield the mode of the step after each, in turn."""
        for _ in range(WARM_STEPS - 1):
            if time.perf_counter() - self._began < WARM_S:
                yield "pass"
        yield from self._timing()
        yield from self._following()
        yield from self._writing(self.timed)
        if self._config.snapshot is not None:
            with tracing.recorded():  # until the step is taken, or the profile ends in it
                yield "pass"
                tracing.write_snapshot(self._config.snapshot)
        if self._config.trace is not None:
            on_gpu = self.setting is not None and self.setting.device_type == "cuda"
            self._tracer = tracing.Tracer(self._config.trace, device_too=on_gpu)
            for _ in range(tracing.STEPS):
                yield "trace"
            self.notes += [self._tracer.note] if self._tracer.note else []
        if self._config.accum == self._config.micro == "auto":
            yield from self._cutting()

    def _timing(self) -> Iterator[str]:
        began, most = time.perf_counter(), self._config.steps or TIMED_STEPS
        while len(self.timed) < most:
            yield "time"
            assert self._look is not None
            self.timed.append(self._look)
            if self.setting is None and self.lens is not None:
                self.setting = setting_of(self.lens)
            if self._config.steps is not None:
                continue
            enough = len(self.timed) >= 3 and time.perf_counter() - began > TIMED_S
            if enough or time.perf_counter() - self._began > WHOLE_S / 2:
                return

    def _following(self) -> Iterator[str]:
        began = time.perf_counter()
        for _ in range(5):
            yield "modules"
            assert self._look is not None
            self.followed.append(self._look)
            if time.perf_counter() - began > MODULES_S:
                return

    @property
    def late(self) -> bool:
        """Whether a person should not be kept waiting for more."""
        return time.perf_counter() - self._began > WHOLE_S

    @property
    def found(self) -> dict[str, str]:
        """What `auto` came to, for another run of the same: measured again it might differ."""
        known = self.setting is not None and self.setting.precision in precisions.NAMES
        return {"precision": self.setting.precision} if self.setting and known else {}

    def grow(self) -> int | None:
        """Begin to look at larger steps, where small ones are taken up by what does not depend on
        their size; return how large, None where that is not worth it."""
        setting, whole = self.setting, [look for look in self.timed if len(look.sizes) == 1]
        if setting is None or not setting.grows or not whole or not self.cut:
            return None
        size, small = whole[-1].sizes[0], min(self.cut, key=lambda look: look.sizes[0])
        seconds = min(map(_seconds, whole))
        flat = seconds < FLAT * min(map(_seconds, self._like(small))) * size / small.sizes[0]
        if not flat or self.late or self.stopped:
            return None
        self.over, self._asked, self._pieces = False, None, None
        self._plan = self._growing(GROWN * size)
        return GROWN * size

    def _like(self, look: Look) -> list[Look]:
        return [other for other in self.cut if other.sizes == look.sizes]

    def _growing(self, size: int) -> Iterator[str]:
        yield "pass"
        grown: list[Look] = []
        for _ in range(4):
            yield "time"
            assert self._look is not None
            if self._look.sizes == [size]:
                grown.append(self._look)
        self.cut += grown
        if grown:
            yield from self._writing(grown)

    def _writing(self, timed: list[Look]) -> Iterator[str]:
        """Write a ledger of a step like those `timed`: not of an epoch's short last batch."""
        usual = Counter(tuple(look.sizes) for look in timed).most_common(1)[0][0]
        for _ in range(3):
            yield "ledger"
            assert self._look is not None
            if tuple(self._look.sizes) == usual:
                self.ledgers.append(self._look)
                return

    def _cutting(self) -> Iterator[str]:
        """Cut steps smaller; where that is not done within three steps, and those that the loader's
        workers have drawn ahead, it cannot be."""
        loader = self.lens.task.loader if self.lens is not None else None
        ahead = getattr(loader, "num_workers", 0) * (getattr(loader, "prefetch_factor", 0) or 0)
        for pieces in CUTS:
            if self.late:
                self.notes.append("steps are slow: fewer micro-batch sizes were tried")
                return
            self._pieces = pieces
            self.control.set("accum", pieces)
            for _ in range(3 + ahead):
                yield "pass"
                assert self._look is not None
                if len(self._look.sizes) == pieces:
                    break
            else:
                return
            yield "pass"
            smaller, began = list[Look](), time.perf_counter()
            for _ in range(8):
                yield "time"
                assert self._look is not None
                smaller.append(self._look)
                if time.perf_counter() - began > CUT_S:
                    break
            self.cut += smaller
            yield from self._writing(smaller)

    # -- beside the steps --

    def trace(self, begins: bool) -> None:
        """A traced step begins, or ends."""
        if self._tracer is not None:
            self._tracer(begins)

    def _poll(self) -> None:
        self.stopped |= hand_on(self._outer, self.control)

    def close(self) -> None:
        """End what is open."""
        self._plan.close()  # type: ignore[attr-defined]
        if self._tracer is not None:
            self._tracer.close()


def _seconds(look: Look) -> float:
    """Return the host's seconds of a step's first micro-batch, forward and backward."""
    start, _, end = look.spans[0]
    return end.host - start.host
