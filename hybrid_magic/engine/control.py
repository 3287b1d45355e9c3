"""RunControl: what a person may ask of a run while it runs.

Any thread may ask; only the loop, once per step, reads. A control can ask and never act: it holds
no tensor and calls nothing of the engine. Standard library only.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from ..errors import ConfigError

# name -> (what it is, least value, most value); a value of None gives the choice back to the policy
SETTINGS: dict[str, tuple[str, float, float]] = {
    "accum": ("accumulation steps", 1, math.inf),
    "memory": ("memory high-water mark, a fraction of the device's memory", 0.05, 1.0),
    "stability_threshold": (
        "relative spread of the loss under which it counts as stable",
        0.0,
        10.0,
    ),
    "growth_factor": ("most that the global batch grows by at once", 1.0, 4.0),
    "max_batch": ("largest global batch", 1, math.inf),
    "lr_multiplier": ("learning-rate multiplier", 0.0, 100.0),
}
ACTIONS = ("grow", "shrink", "pause", "resume", "stop")


class RunControl:
    """A mailbox of requests. `poll` is called by the loop, on its own thread, once per step and
    while paused; a notebook puts its pump there.
    """

    def __init__(self, poll: Callable[[], None] | None = None) -> None:
        self.mail: deque[tuple[str, float | None]] = deque()
        self.poll = poll

    def set(self, name: str, value: float | None) -> None:
        """Ask for a setting; `None` gives the choice back (accum: auto; others: their default).

        Raises:
            ConfigError: no such setting, or a value outside its range.
        """
        if name not in SETTINGS:
            raise ConfigError(f"there is no control {name}; the controls are {', '.join(SETTINGS)}")
        what, least, most = SETTINGS[name]
        if value is not None and not least <= value <= most:
            raise ConfigError(f"{name} is {value}; wanted {what} from {least:g} to {most:g}")
        self.mail.append((name, value))

    def ask(self, action: str) -> None:
        """Ask for an action: grow, shrink, pause, resume or stop.

        Raises:
            ConfigError: no such action.
        """
        if action not in ACTIONS:
            raise ConfigError(f"there is no action {action}; the actions are {', '.join(ACTIONS)}")
        self.mail.append((action, None))


def hand_on(outer: RunControl | None, inner: RunControl) -> bool:
    """Hand what a person asks of a whole on to the run in it: stop, pause and resume; return
    whether to stop. What would change how it trains is not asked of a run that is compared."""
    stop = False
    if outer is not None:
        if outer.poll is not None:
            outer.poll()
        while outer.mail:
            name, value = outer.mail.popleft()
            stop |= name == "stop"
            if name in ("stop", "pause", "resume"):
                inner.mail.append((name, value))
    return stop
