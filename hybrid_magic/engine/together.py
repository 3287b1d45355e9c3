"""A step of several processes: each has its passes, then they meet, and their gradients are summed.

Nothing is summed before all have said that their passes went well, so that one which runs out of
memory lets nobody wait: all take the step back and cut it smaller. From the sum on every process
computes the same, the noise scale too: how far each one's gradient is from the sum says it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import HybridMagicError, OutOfMemoryError
from ..policy.facts import Settings
from . import sharing
from .data import StepData
from .device import attempt, is_out_of_memory
from .gradients import stacked
from .precision import Precision
from .ranks import Agreed, PeerLost, Ranks, Wishes, current
from .reading import Reading
from .step_state import Gathered, StepResult, StepState
from .summing import Sum, same_buffers, same_start
from .task import Task

if TYPE_CHECKING:
    from .keeper import Keeper
    from .progress import TrainState

_KINDS = ("mean", "sum", "targets")
_WELL, _NO_MEMORY, _FAILED = range(3)
_CODE, _STEP, _SIZE, _COUNT, _KIND, _LACKING, _NAMES, _PIECES = range(8)  # of a row that is told


class Together:
    """What a run of several processes does where one process does nothing."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._sum = Sum(ranks)
        self._names: tuple[str, ...] = ()  # of what the step logs
        self._part = 0.0  # of the step's mean loss that is this process's

    def passes(
        self, state: StepState, data: StepData, gathered: Gathered, work: Callable[[], None]
    ) -> None:
        """Have `work` do this process's passes, and make the gradients the sum of all processes'.

        Raises:
            Whatever the person's step raises; where another process runs out of memory, torch's
            error for that, in all of them; PeerLost where another one has failed.
        """
        failure: Exception | None = None
        try:
            work()
            self._weigh(state, data, gathered)
        except Exception as error:  # noqa: BLE001 - raised below, when the others know
            failure = error
        try:
            rows = self.ranks.meet(self._row(state, data, gathered, failure))
            if any(row[_CODE] != _WELL for row in rows):
                self._fail(state, rows, failure)
        finally:
            failure = None
        self._check(rows)
        self.sure(self._join, state, data, gathered, rows)

    def _weigh(self, state: StepState, data: StepData, gathered: Gathered) -> None:
        """Find what this process's samples count for in the mean; keep its gradients, where the
        noise is measured, while there being no memory for it can still be told."""
        found = gathered.reduction
        if found is not None:
            gathered.count = sum(found.counts(data.batches, data.sizes))
            gathered.shared &= found.kind != "sum"
        if gathered.shared and gathered.count and gathered.losses:
            state.noise.keep()

    def _row(
        self, state: StepState, data: StepData, gathered: Gathered, failure: Exception | None
    ) -> list[float]:
        """Return what this process has to tell of its passes."""
        row = [0.0] * 8
        row[_STEP] = state.steps
        alike = len(data.sizes) == len(data.everyones)
        if failure is not None:
            row[_CODE] = _NO_MEMORY if is_out_of_memory(failure) else _FAILED
            known = alike and state.running in data.sizes
            at = data.sizes.index(state.running) if known else None
            row[_SIZE] = max(data.everyones) if at is None else data.everyones[at]
            return row
        found = gathered.reduction
        row[_COUNT] = gathered.count
        row[_KIND] = -1 if found is None else _KINDS.index(found.kind)
        row[_LACKING] = any(param.grad is None for param in state.params)
        row[_NAMES] = len(gathered.logged) if data.sizes else -1
        row[_PIECES] = alike
        return row

    def _fail(self, state: StepState, rows: list[list[float]], failure: Exception | None) -> None:
        """Raise what this process or another one has met."""
        short = [row[_SIZE] for row in rows if row[_CODE] == _NO_MEMORY]
        if short:
            state.running = int(min(short))  # the same everywhere
        failed = [number for number, row in enumerate(rows) if row[_CODE] == _FAILED]
        try:
            if failure is not None and (not failed or rows[self.ranks.rank][_CODE] == _FAILED):
                raise failure
            if failed:
                self.ranks.leave()
                raise PeerLost(f"process {failed[0]} failed in this step; its own error says why")
            number = next(n for n, row in enumerate(rows) if row[_CODE] == _NO_MEMORY)
            raise torch.OutOfMemoryError(f"process {number} ran out of memory")
        finally:
            failure = None

    def _check(self, rows: list[list[float]]) -> None:
        """Raise where the processes' steps are not of one kind."""
        if len({row[_STEP] for row in rows}) > 1:
            raise HybridMagicError(
                "the processes are at different steps; wanted all at the same; start them anew"
            )
        kinds = {int(row[_KIND]) for row in rows if row[_KIND] >= 0}
        if len(kinds) > 1:
            told = " and ".join(_KINDS[kind] for kind in sorted(kinds))
            raise HybridMagicError(
                f"the processes took the loss for different things ({told}); wanted one; say it "
                "with --reduction mean or sum"
            )
        if len({row[_NAMES] for row in rows if row[_NAMES] >= 0}) > 1:
            raise HybridMagicError(
                "the step logs other names in one process than in another; wanted the same in "
                "every step; log them always"
            )

    def _join(
        self, state: StepState, data: StepData, gathered: Gathered, rows: list[list[float]]
    ) -> None:
        """Sum gradients, losses and what is logged; afterwards they are the whole step's."""
        total, kinds = sum(row[_COUNT] for row in rows), [row[_KIND] for row in rows]
        summed = max(kinds) == _KINDS.index("sum")
        self._part = 1.0 if summed else gathered.count / total if total else 0.0
        if not data.batches:
            self._stand_by(state, gathered)
        elif total and not gathered.count and not summed:  # its mean, 0/0, is no part of the step's
            gathered.losses, gathered.weights = [], []
            for param in state.params:
                param.grad = None
        gathered.aligned = all(row[_PIECES] for row in rows)
        gathered.shared &= not summed
        if gathered.logged:
            self._names = tuple(gathered.logged)
        head = self._head(state, data, gathered)
        lacking = any(row[_LACKING] or not row[_COUNT] for row in rows)
        head = self._sum.gradients(state.params, self._part, head, lacking=lacking)
        loss, *logged = head.unbind()
        gathered.losses, gathered.weights = [loss], [1.0]
        gathered.logged = dict(zip(self._names, logged, strict=True))

    def _stand_by(self, state: StepState, gathered: Gathered) -> None:
        """Make what passes would have made, where this process has no sample in the step."""
        gathered.since = state.device.mark()
        if state.precision.scaler is not None:  # it makes its scale when it is first asked
            state.precision.scaler.scale(torch.zeros((), device=state.device.device))

    def _head(self, state: StepState, data: StepData, gathered: Gathered) -> Tensor:
        """Return this process's part of the step's loss and of each logged value, [1 + names]."""
        n = sum(data.sizes)
        losses = gathered.losses or [torch.zeros((), device=state.device.device)]
        weights = gathered.weights or [0.0]
        one = sum(loss * weight for loss, weight in zip(losses, weights, strict=True))
        values: list[Any] = [one * self._part]
        if not data.sizes:
            values += [torch.zeros_like(values[0])] * len(self._names)
        values += [part * (n / sum(data.everyones)) for part in gathered.logged.values()]
        dtype = torch.float64 if state.params[0].dtype == torch.float64 else torch.float32
        return stacked(values).to(dtype)

    def noise(self, state: StepState, factor: float | Tensor) -> list[Tensor]:
        """Return the norms of a noise measurement: how far the processes' gradients, each times its
        `factor`, are from the sum, on average, and the sum's."""
        found = torch.zeros(2, device=state.device.device)
        if state.noise.holds:
            norms = state.noise.cut(factor)
            found = torch.stack([norm.float() for norm in norms]).square() * self._part
        self.ranks.done(self.ranks.add_up(found))
        return list(found.sqrt().unbind())

    def of_first(
        self, precision: Precision, reason: str, device: torch.device
    ) -> tuple[Precision, str]:
        """Return the precision that the first process has chosen, and why."""
        name, reason = self.ranks.of_first((precision.name, reason))
        if name != precision.name:
            precision = Precision(name, device)
        return precision, reason

    def sure(self, work: Callable[..., Any], *args: Any) -> Any:
        """Return what `work` returns, where all processes do it and none can take it back alone.

        Raises:
            OutOfMemoryError: there was no memory for it.
        """
        result, found = attempt(work, *args)
        if found is not None:
            self.ranks.leave()
            raise OutOfMemoryError(
                f"process {self.ranks.rank} ran out of memory when the others had gone on "
                f"({found}); wanted room for the sum of the gradients and the optimizer; use a "
                "lower --memory, or an optimizer with less state"
            )
        return result

    def worst(
        self, seen: Reading, result: StepResult, peak: int | None, pressed: bool
    ) -> tuple[tuple[float, ...] | None, list[int | None] | None, int | None, bool]:
        """Return what the slowest and fullest process saw of a step: seconds of its micro-batches
        and their peaks (None where they were not cut alike), the highest peak, and the pressure.
        The optimizer's seconds are written into `seen`."""
        if self.ranks.broken:
            return None, None, None, False
        n, peaks = len(result.sizes) if result.aligned else 0, result.peaks
        known = [-1 if each is None else each for each in peaks or [None] * n][:n]
        row = [seen.optimizer_s, -1 if peak is None else peak, float(pressed), *seen.micro_s[:n]]
        found = self.ranks.most([*row, *known])
        seen.optimizer_s = found[0]
        times, highest = found[3 : 3 + n], found[3 + n :]
        fullest = [_known(each) for each in highest] if peaks and n else None
        return tuple(times) if n else None, fullest, _known(found[1]), bool(found[2])


def _known(value: float) -> int | None:
    """Return a reading that went as a number, below 0 where there was none."""
    return int(value) if value >= 0 else None


def begin(
    ranks: Ranks | None, task: Task, optimizer: torch.optim.Optimizer, found: Settings
) -> Settings:
    """Have all processes begin with the same model, and return what the policy may do.

    Raises:
        HybridMagicError: models or data that are not alike, or a batch that is too small.
    """
    if ranks is None:
        return found
    sharing.check_sampler(task.val, task.names["val"])
    settings = sharing.settings(found, ranks, task.feed.samples, task.names["loader"])
    same_start(ranks, task.model, optimizer)
    note = f"{ranks.size} processes train, each its share of every step's samples"
    if settings.batch_statistics:
        note += "; batch statistics are of a share, and what is learned of them is averaged"
    task.notes.append(note)
    return settings


def attach(ranks: Ranks | None, state: TrainState, keeper: Keeper | None) -> None:
    """Have this process heard in what all are to do."""
    if ranks is None:
        return
    state.obeyed = ranks.hear(state.obeyed)
    state.shares, ranks.agreed = ranks.size, Agreed()
    ranks.wishes = Wishes(
        lambda: state.interrupts.hit,
        lambda: state.late,
        lambda: keeper is not None and keeper.is_due,
    )


def ended_by(error: BaseException | None) -> None:
    """Let this process end by itself where it is ended by what the others do not know of."""
    ranks = current()
    agreed = ranks is None or (isinstance(error, KeyboardInterrupt) and ranks.agreed.ended)
    if ranks is not None and error is not None and not agreed:
        ranks.leave()


def end(model: nn.Module, error: BaseException | None) -> None:
    """Have all processes end with the same buffers, unless this one is ended by an error."""
    ranks = current()
    if ranks is not None:
        ended_by(error)
        ranks.wishes = Wishes()
        if not ranks.broken:
            same_buffers(ranks, model)
