"""ablate(): the same training several ways, each from the same beginning, and what differs.

Every run goes through `train`; `compare` puts them in order. Prints nothing and draws nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ablation import Ablation
from ..config import AblateConfig
from ..errors import HybridMagicError
from ..records import Sink
from ..run import Run
from .checks import check_model
from .compare import compare
from .control import RunControl
from .device import probe_for
from .drawing import generators_of, places_of
from .placement import choose_device
from .rewind import PutBack, beginning
from .step_state import Compute
from .train import train


def ablate(
    model: torch.nn.Module,
    loader: Any,
    step: Compute | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    val: Any = None,
    loss: Any = None,
    scheduler: Any = None,
    sink: Sink | None = None,
    control: RunControl | None = None,
    names: Mapping[str, str] | None = None,
    found: Sequence[str] = (),
    **options: Any,
) -> Ablation:
    """Train `model` several ways from the same beginning and return the Ablation.

    Every variant of a seed starts from the weights, optimizer, scheduler and random state that are
    there now, seeded alike, so that all see the same samples in the same order. The model ends as
    the last `hybrid` run left it; where none was done, or with `restore`, as it was. A DataLoader's
    own generator is seeded for each run and put back. `fp32` gives the plain loop's weights bit for
    bit; it is run by this engine, whose own cost it bears like the others.

    Args:
        model, loader, step, optimizer, val, loss, scheduler: as for `train`; `val` gives the
            accuracy, outside the clock.
        sink: called with the records of every run, and with a TrialStartRecord and a TrialRecord
            around each.
        control: `stop` ends the ablation and keeps what is done; pause and resume work too.
        names, found: as for `train`.
        options: the fields of AblateConfig: variants, seeds, restore, and those of TrainConfig.
    Raises:
        HybridMagicError: a mistake that can be known before training; nothing was changed.
        KeyboardInterrupt: the open run is undone; `hybrid_magic.last_ablation` holds what was done.
        Whatever the person's own code raises, with the model put back as said above.
    """
    if hasattr(loader, "__next__"):
        raise HybridMagicError(
            "the loader can be read only once; wanted something that every variant can read; make "
            "it a list or a DataLoader"
        )
    said = dict(optimizer=optimizer, val=val, loss=loss, scheduler=scheduler)
    config = AblateConfig.from_options(
        options | {name: type(value).__name__ for name, value in said.items() if value is not None}
    )
    subject = Training(model, loader, step, said, names, found)
    probe = probe_for(choose_device(config.device, model))
    return compare(subject, config, probe, sink, control)


@dataclass(frozen=True)
class Training:
    """A model that `train` trains."""

    model: torch.nn.Module
    loader: Any
    step: Compute | None
    given: dict[str, Any]
    names: Mapping[str, str] | None
    found: Sequence[str]

    def train(
        self, options: dict[str, Any], sink: Sink, control: RunControl
    ) -> tuple[Run, float, dict[str, float]]:
        options = {name: value for name, value in options.items() if name not in self.given}
        began = time.perf_counter()
        run = train(
            self.model, self.loader, self.step, **self.given, sink=sink, control=control,
            names=self.names, found=self.found, **options,
        )  # fmt: skip
        seconds = time.perf_counter() - began - run.validation_seconds
        return run, seconds, run.metrics[-1] if run.metrics else {}

    def beginning(self) -> PutBack:
        check_model(self.model, (self.names or {}).get("model", "the model"))
        device = next(self.model.parameters()).device
        given = (self.given[name] for name in ("optimizer", "scheduler", "loss"))
        drawn = (*places_of(self.loader), *generators_of(self.loader))
        return beginning([self.model, *given, *drawn], device)

    def reseed(self, seed: int) -> None:
        for generator in generators_of(self.loader):
            generator.manual_seed(seed)
