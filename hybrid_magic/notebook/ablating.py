"""`%%hybrid_ablate`: the cell of `%%hybrid_train`, trained several ways and compared.

A step, or none, goes through the engine's `ablate`. A loop is a whole cell: it runs once a trial,
from the names, models and optimizers that the notebook held before. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from IPython.utils.capture import CapturedIO, capture_output

from ..ablation import Ablation
from ..adopt.names import bound
from ..config import AblateConfig, TrainConfig
from ..engine.ablate import ablate
from ..engine.compare import compare
from ..engine.control import RunControl
from ..engine.device import probe_for
from ..engine.drawing import Own, generators_of
from ..engine.randomness import seed_everything
from ..engine.rewind import PutBack, beginning
from ..errors import HybridMagicError
from ..records import Sink
from ..run import Run
from . import arguments, capture
from .adopted import Loops, Stopped
from .cell import Cell, read_cell
from .loopform import form_of

_GENERATORS = (torch.Generator, Own)
_OURS = ("variants", "seeds", "restore", "log", "o", "plain")  # not what a loop is refused for


def ablation_of(
    shell: Any, read: arguments.Line, config: AblateConfig, cell: Cell, loops: Loops, view: Any
) -> Ablation:
    """Return the ablation of a cell, shown by `view` as it goes on."""
    __tracebackhide__ = True
    subject = loop_of(shell, read, cell, loops, config.log, _OURS)
    if subject is not None:
        made = compare(subject, config, probe_for(device_here()), view, view.control)
        if subject.kept is not None and not config.restore:
            view.after = subject.kept.show
        return made
    step, taken = capture.step_and_capture(shell, read, cell, config.log or ())
    return taken.hand_to(ablate, step, read, view)


def loop_of(
    shell: Any,
    read: arguments.Line,
    cell: Cell,
    loops: Loops,
    log: Iterable[str] | None,
    ours: Iterable[str],
) -> CellLoop | None:
    """Return the loop that a cell holds, None where it is a step; `ours` are options that a loop is
    not refused for."""
    own = {name: value for name, value in read.options.items() if name not in ours}
    line = arguments.Line(read.model, read.loader, own)
    if form_of(shell, cell, line) is None:
        return None
    return CellLoop(shell, cell, line, loops, log or ())


class CellLoop:
    """A cell that holds its loop; what it prints is kept, that of the hybrid for the end."""

    def __init__(
        self, shell: Any, cell: Cell, line: arguments.Line, loops: Loops, log: Iterable[str]
    ) -> None:
        self._shell, self._cell, self._line, self._loops = shell, cell, line, loops
        names = dict.fromkeys(("accuracy", "acc", *log))
        self._judged = [name for name in names if name in bound(cell.tree)]
        self._printed: CapturedIO | None = None
        self.kept: CapturedIO | None = None  # what the run printed whose end is kept

    def train(
        self, options: dict[str, Any], sink: Sink, control: RunControl
    ) -> tuple[Run, float, dict[str, float]]:
        __tracebackhide__ = True
        shell, cell = self._shell, self._cell
        config = TrainConfig.from_options(options)
        form = form_of(shell, read_cell(shell, cell.raw, cell.head), self._line)
        assert form is not None
        self._loops.begin_afresh(lambda **_: _Unseen(sink, control))
        ended: BaseException | None = None
        try:
            with capture_output() as printed:
                form.run(config, self._loops)
        except Stopped:
            pass
        except BaseException as error:
            ended = error
            raise
        finally:
            run = self._loops.end(ended)
            ended = None
        if run is None:
            raise HybridMagicError(
                "the cell ended without a training step; wanted one that trains; call the function "
                "that it defines in it"
            )
        self._printed = printed
        return run, run.opening_seconds + run.seconds, self._found()

    def _found(self) -> dict[str, float]:
        """Return the numbers that the cell leaves in names of an accuracy."""
        found = {}
        for name in self._judged:
            value = self._shell.user_ns.get(name)
            if isinstance(value, (int, float)) or getattr(value, "ndim", None) == 0:
                found[name] = float(value)
        return found

    def beginning(self) -> PutBack:
        """Return what puts back the notebook's names, what the lists and dicts in them hold, and
        what its models, optimizers, schedulers and objects are."""
        self.kept = self._printed
        namespace = self._shell.user_ns
        names = {name: value for name, value in namespace.items() if not name.startswith("_")}
        held = [(value, value.copy()) for value in _containers(names.values())]
        things = list(_things(names.values()))
        put_back_things = beginning(things, device_here())

        def put_back() -> None:
            for name in [name for name in namespace if not name.startswith("_")]:
                if name not in names:
                    del namespace[name]
            namespace.update(names)
            for value, found in held:
                value.clear()
                value.extend(found) if isinstance(value, list) else value.update(found)
            put_back_things()

        return put_back

    def reseed(self, seed: int) -> None:
        for thing in _things(self._shell.user_ns.values()):
            if isinstance(thing, _GENERATORS):
                thing.manual_seed(seed)
        seed_everything(seed)


class _Unseen:
    """The view of one trial's run: its records go on, its result is shown by nobody."""

    def __init__(self, sink: Sink, control: RunControl) -> None:
        self._sink, self.control = sink, control

    def __call__(self, record: Any) -> None:
        self._sink(record)

    def close(self, run: Run | None) -> None:
        """Show nothing."""


def device_here() -> torch.device:
    """Return the current GPU, by its number, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _containers(values: Iterable[Any]) -> Iterator[Any]:
    """Yield the lists, dicts and sets in `values` and in the notebook's own objects, each once."""
    seen: set[int] = set()
    for value in _opened(values):
        if type(value) in (list, dict, set) and id(value) not in seen:
            seen.add(id(value))
            yield value


def _things(values: Iterable[Any]) -> Iterator[Any]:
    """Yield what can be put back, each once: models, optimizers, schedulers, generators."""
    seen: set[int] = set()
    for value in _opened(values):
        found = generators_of(value) if hasattr(value, "sampler") else [value]
        for thing in found:
            known = isinstance(thing, _GENERATORS) or hasattr(thing, "load_state_dict")
            itself = id(getattr(thing, "drawn", thing))
            if known and not isinstance(thing, type) and itself not in seen:
                seen.add(itself)
                yield thing


def _opened(values: Iterable[Any]) -> Iterator[Any]:
    """Yield values, what lists, tuples and dicts of them hold, and attributes of objects whose
    classes the notebook defines."""
    for value in list(values):
        yield value
        if isinstance(value, (list, tuple)) and len(value) < 100:
            yield from value
        elif isinstance(value, dict) and len(value) < 100:
            yield from value.values()
        elif type(value).__module__ == "__main__" and hasattr(value, "__dict__"):
            yield vars(value)
            yield from vars(value).values()
