"""What a session has learned, for the next one of the same optimizer to go on with.

Holds no tensor of a model.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from ..config import TrainConfig
from ..policy import steering
from . import rehearse
from .data import StepData
from .precision import Precision
from .reduction import Reduction
from .sizing import Sizing
from .step_state import StepState


@dataclass(slots=True)
class Memory:
    """`precision` was chosen for the `--precision` that was `asked`; `guess` is what the criterion
    told of the loss, `settled` what came of trying it. `uncut`: batches cannot be cut."""

    settings: steering.Settings | None = None
    learned: steering.State | None = None
    asked: str = ""
    precision: Precision | None = None
    guess: Reduction | None = None
    settled: Reduction | None = None
    uncut: bool = False

    def lend(self, settings: steering.Settings, sizing: Sizing) -> None:
        """Have `sizing` go on where this ended, unless it has to follow other settings; the memory
        that others hold may have changed."""
        if self.settings is not None and self.learned is not None:
            same = dataclasses.replace(settings, budget_bytes=self.settings.budget_bytes)
            if same == self.settings:
                sizing.go_on(self.learned)

    def learn(self, sizing: Sizing, precision: Precision, asked: str, *, uncut: bool) -> None:
        """Keep what a session has come to; a person's own precision is theirs to choose."""
        self.settings, self.learned, self.uncut = sizing.settings, sizing.learned, uncut
        if precision.ours:
            self.asked, self.precision = asked, precision

    def settle(self, state: StepState, data: StepData, found: Reduction) -> Reduction:
        """Return how a loss is reduced whose criterion does not tell; tried once for each guess."""
        told = None if self.guess is None else (self.guess.kind, self.guess.why, self.guess.path)
        if self.settled is None or told != (found.kind, found.why, found.path):
            self.guess, self.settled = found, rehearse.settle_reduction(state, data, found)
        return self.settled


def remembered_precision(
    before: Memory | None, config: TrainConfig, device: torch.device, own: bool, scaler: Any
) -> Precision | None:
    """Return the precision of a session, None where it is to be chosen."""
    if own:
        enabled = scaler is not None and scaler.is_enabled()
        return Precision("own", device, scaler if enabled else None)
    if before is not None and before.asked == config.precision:
        return before.precision
    return None
