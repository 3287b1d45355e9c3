"""A person's learning-rate scheduler, advanced by the samples seen.

Their own loop would have called `scheduler.step()` once per loader batch, or once per epoch. Which
of the two is read off the scheduler. A step of one and a half loader batches advances it by one and
a half batches' worth, so the curve over samples is the one they asked for. Knows no policy.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import lr_scheduler

from ..errors import HybridMagicError
from .data import Feed

_HORIZONS = ("total_steps", "T_max", "total_iters", "T_0", "step_size")
_BATCH_WORDS = ("step", "iter", "batch", "update")


class ScheduleClock:
    """Calls `scheduler.step()` as often as the plain loop would have by the same sample.

    A scheduler whose `interval` is "batch" (or "step") or "epoch" counts that; of others it is read
    off what they are. `note` says which it was.

    Args:
        scheduler: any scheduler of torch.optim, or an object with `step()`.
        feed: tells the loader's batches.
        epochs, steps: the ends that the run was asked for, None where not asked.
        say: called with a sentence for the person, once, when the scheduler cannot go on.
    """

    def __init__(
        self,
        scheduler: Any,
        feed: Feed,
        epochs: int | None,
        steps: int | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.scheduler = scheduler
        self._feed, self._say = feed, say
        self._said = self._begun = False
        self._in_epoch = 0  # loader batches of this epoch that the scheduler was told of
        stated = _stated(scheduler)
        self.per, why = stated or _guessed(scheduler, feed.batches, epochs, steps)
        self.note = f"scheduler: one step per {self.per} ({why})"
        if not stated:
            other, many = ("batch", "batches") if self.per == "epoch" else ("epoch", "epochs")
            self.note += f"; if it counts {many} say so: scheduler.interval = '{other}'"

    @property
    def judges(self) -> bool:
        """Whether the scheduler goes by what an epoch has reached."""
        return isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau)

    def check(self, epochs: int | None, validated: bool) -> None:
        """Raise HybridMagicError when a OneCycleLR would end before `epochs` epochs do (None: other
        ends come first), or a plateau is looked for in an accuracy that nothing measures."""
        scheduler, batches = self.scheduler, self._feed.batches
        if self.judges and scheduler.mode == "max" and not validated:
            raise HybridMagicError(
                "the scheduler is a ReduceLROnPlateau with mode='max', which judges an accuracy, "
                "and there is no validation; wanted something to judge; give --val, or make it "
                "with mode='min', which judges the loss"
            )
        left = _left(scheduler)
        if left is None or epochs is None or batches is None:
            return
        if epochs * batches - self._in_epoch > left:
            raise HybridMagicError(
                f"the scheduler has {left} of its {scheduler.total_steps} steps left, and "
                f"{epochs} epochs of {batches} batches need {epochs * batches}; wanted as many; "
                "make it (and its optimizer) anew"
            )

    def state(self) -> dict[str, Any]:
        """Return where the scheduler and its clock stand, for `go_on`."""
        return {
            "kind": type(self.scheduler).__name__,
            "scheduler": self.scheduler.state_dict(),
            "per": self.per,
            "in_epoch": self._in_epoch,
            "begun": self._begun,
        }

    def go_on(self, state: dict[str, Any]) -> None:
        """Go on where the clock of another run stood, whose `state` this was."""
        load(self.scheduler, state["scheduler"])
        self.per, self._in_epoch, self._begun = state["per"], state["in_epoch"], state["begun"]

    def advance(self, samples_in_epoch: int) -> None:
        """Catch up with `samples_in_epoch` samples of this epoch."""
        if self.per == "batch":
            self._catch_up(self._feed.ended(samples_in_epoch))

    def end_epoch(
        self, samples_in_epoch: int, loss: float | None, metrics: Mapping[str, float] | None = None
    ) -> None:
        """End the epoch after `samples_in_epoch` samples.

        Args:
            loss: mean training loss of the epoch, by which a plateau is judged without `metrics`.
            metrics: what the validation measured, None without one.
        """
        if self.per == "batch":
            self._catch_up(self._feed.ended(samples_in_epoch, over=True))
        elif self.judges:
            found = loss if metrics is None else _judged(metrics, self.scheduler.mode)
            if found is None:
                self._tell("scheduler: the learning rate stays, as nothing that it judges was seen")
            else:
                self.scheduler.step(found)
        else:
            self._step()
        self._in_epoch = 0

    def _catch_up(self, batches: int) -> None:
        for _ in range(batches - self._in_epoch):
            self._step()
        self._in_epoch = max(self._in_epoch, batches)

    def _step(self) -> None:
        if _left(self.scheduler) == 0:
            total = self.scheduler.total_steps
            self._tell(f"scheduler: its {total} steps are over; the learning rate stays as it is")
            return
        if self._begun:
            self.scheduler.step()
            return
        self._begun = True
        with warnings.catch_warnings():  # torch misses an optimizer step where the first is skipped
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()

    def _tell(self, sentence: str) -> None:
        if not self._said:
            self._say(sentence)
        self._said = True


def load(scheduler: Any, state: dict[str, Any]) -> None:
    """Give a scheduler a `state_dict` that has gone through a file."""
    scheduler.load_state_dict(_kinds_kept(state, scheduler.state_dict()))


def _kinds_kept(value: Any, now: Any) -> Any:
    """Return `value` with its dicts of the kinds that they are of `now`: MultiStepLR counts its
    milestones in a Counter."""
    if isinstance(value, dict):
        found = now if isinstance(now, dict) else {}
        made = {key: _kinds_kept(inner, found.get(key)) for key, inner in value.items()}
        return type(found)(made)
    if isinstance(value, list) and isinstance(now, list) and len(value) == len(now):
        return [_kinds_kept(*pair) for pair in zip(value, now, strict=True)]
    return value


def _left(scheduler: Any) -> int | None:
    """Return the steps after which a OneCycleLR refuses to go on, None for what never does."""
    if not isinstance(scheduler, lr_scheduler.OneCycleLR):
        return None
    return max(0, scheduler.total_steps - scheduler.last_epoch)


def _judged(metrics: Mapping[str, float], mode: str) -> float | None:
    """Return what a plateau is looked for in: the loss, or the accuracy where more is better."""
    if mode == "min":
        return metrics.get("loss")
    named = [name for name in metrics if name not in ("epoch", "loss")]
    name = next((name for name in ("accuracy", "acc", *named) if name in metrics), None)
    return None if name is None else metrics[name]


def _stated(scheduler: Any) -> tuple[str, str] | None:
    """Return "batch" or "epoch" and why, where the scheduler leaves no doubt."""
    name, interval = type(scheduler).__name__, getattr(scheduler, "interval", None)
    if interval in ("batch", "step", "epoch"):
        return "epoch" if interval == "epoch" else "batch", f"its interval is {interval}"
    if isinstance(scheduler, (lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR)):
        return "batch", f"{name} counts batches"
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        return "epoch", f"{name} judges epochs"
    for function in getattr(scheduler, "lr_lambdas", ()):  # LambdaLR, MultiplicativeLR
        word = _argument(function)
        if "epoch" in word:
            return "epoch", f"{name} of a function of {word}"
        if any(part in word for part in _BATCH_WORDS):
            return "batch", f"{name} of a function of {word}"
    parts = getattr(scheduler, "_schedulers", ())  # SequentialLR, ChainedScheduler
    return next(filter(None, map(_stated, parts)), None)


def _argument(function: Any) -> str:
    """Return the name of a function's first argument, "" where it cannot be told."""
    try:
        return next(iter(inspect.signature(function).parameters), "").lower()
    except (TypeError, ValueError):
        return ""


def _guessed(
    scheduler: Any, batches: int | None, epochs: int | None, steps: int | None
) -> tuple[str, str]:
    """Return "batch" or "epoch" and why, by the length of the curve."""
    name, horizon = type(scheduler).__name__, _horizon(scheduler)
    if horizon is None:
        return "epoch", f"{name} names no number of steps"
    if steps is not None and abs(horizon - steps) <= steps / 10:
        return "batch", f"{name} spans {horizon} steps, the run {steps}"
    if batches is None:
        return "epoch", f"{name} spans {horizon} steps"
    # Only a curve that is too long for the epochs, and not for the batches, can mean batches.
    passes = min(epochs or 10**9, -(-steps // batches)) if steps else epochs or 1
    if 2 * passes < horizon and batches <= horizon <= 2.2 * batches * passes:
        return "batch", f"{name} spans {horizon} steps, an epoch has {batches} batches"
    return "epoch", f"{name} spans {horizon} steps"


def _horizon(scheduler: Any) -> int | None:
    """Return how many of its own steps the scheduler's curve spans, None when it has no end."""
    parts = getattr(scheduler, "_schedulers", None)
    if parts:  # SequentialLR, ChainedScheduler
        spans = [span for span in map(_horizon, parts) if span is not None]
        milestones = getattr(scheduler, "_milestones", [])
        return max([*spans, *milestones], default=None)
    milestones = getattr(scheduler, "milestones", None)
    if milestones:
        return int(max(milestones))
    for name in _HORIZONS:
        if isinstance(value := getattr(scheduler, name, None), (int, float)):
            return int(value)
    return None
