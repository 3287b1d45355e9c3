"""What the policy is told of a step.

Of several processes that train, the slowest and the fullest: all decide alike, from the same facts.
"""

from __future__ import annotations

from ..policy.facts import StepFacts
from .reading import Reading
from .step_state import StepResult
from .together import Together

Memory = tuple[int | None, int | None, bool]  # peaks, allocated and reserved; was it pressed


def facts_of(
    step: int,
    result: StepResult,
    seen: Reading,
    loss: float,
    memory: Memory,
    together: Together | None,
) -> StepFacts:
    """Return the facts of a step that is read.

    Raises:
        PeerLost: another process is gone.
    """
    times, peaks, peak, pressed = seen.micro_s, result.peaks, memory[0], memory[2]
    if together is not None:
        times, peaks, peak, pressed = together.worst(seen, result, peak, pressed)
    return StepFacts(
        step=step,
        sizes=tuple(result.sizes),
        loss=loss,
        grad_norm=seen.norm,
        skipped=seen.skipped,
        micro_seconds=times,
        optimizer_seconds=seen.optimizer_s,
        peaks=None if peaks is None else tuple(peaks),
        peak_bytes=peak,
        pressure=pressed,
        noise=seen.noise,
    )
