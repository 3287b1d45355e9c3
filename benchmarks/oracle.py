"""What one who knows a simulated world would reach: the yardsticks of the simulator.

Knows the world's own numbers and no measurement; the rules that bind it are arguments.
"""

from __future__ import annotations

from benchmarks.worlds import Trace, World
from hybrid_magic.policy import growth
from hybrid_magic.policy.facts import Settings


def usable(world: World, settings: Settings, share: float) -> float:
    """Bytes that a step may always use at this point of the run, within the budget."""
    free = world.capacity(share) * (1 - world.fragments)
    return free if settings.budget_bytes is None else min(free, settings.budget_bytes)


def best_share(world: World, settings: Settings, trace: Trace, first: int, last: int) -> float:
    """The time that the best micro-batches would have taken for the steps' batches over the time of
    those taken, from the world's own seconds."""
    taken = best = 0.0
    least = settings.base if settings.batch_statistics else 1
    for step in range(first, min(last, len(trace.sizes))):
        taken += world.step_s(trace.sizes[step])
        most = world.most(
            usable(world, settings, step / trace.asked), world.length(step / trace.asked)
        )
        best += world.best_step_s(trace.batches[step], most, least)
    return best / taken if taken else 0.0


def oracle_goodput(world: World, settings: Settings, steps: int, *, bound: bool = True) -> float:
    """The goodput of one who knows the world and cuts in the best micro-batches that always fit.

    `bound`: under the same rules of growth, from the base batch: not before 24 probes (one in four
    steps), 40 steps between changes, by the growth factor at most. Else the best batch at any time.
    Both keep to the largest batch and to the least efficiency that were asked for.
    """
    batch, progress, seconds = settings.base, 0.0, 0.0
    least = settings.base if settings.batch_statistics else 1
    for step in range(0, steps, 8):
        share = step / steps
        noise, length = world.noise_at(share), world.mean_length(share)
        most = world.most(usable(world, settings, share), world.length(share))
        if not bound or (step >= 96 and (step - 96) % growth.SPACING == 0):
            reach = settings.max_batch if not bound else batch * settings.growth_factor
            cap = growth.largest_efficient(settings.base, noise, settings.efficiency)
            batch = max(
                _rungs(settings, most, int(min(reach, cap, settings.max_batch))),
                key=lambda b: (
                    b
                    * growth.efficiency(b, settings.base, noise)
                    / world.best_step_s(b, most, least, length)
                ),
            )
        seconds += world.best_step_s(batch, most, least, length) * (1 + 2 * world.spikes)
        progress += batch * growth.efficiency(batch, settings.base, noise)
    return progress / seconds


def _rungs(settings: Settings, most: int, highest: int) -> list[int]:
    """The batches worth comparing: the base, and those rounded for kernels; for batch statistics
    only what is cut no smaller than the base batch has to be."""
    base = settings.base
    rungs = [base, *(b for b in range(base + 1, highest + 1) if b <= 16 or b % 8 == 0)]
    least = base // -(-base // max(1, most)) if settings.batch_statistics else 1
    return [b for b in rungs if b // -(-b // max(1, most)) >= least]
