"""The magics: parse, capture, call, show. No decisions.

A person's mistake is one line without a traceback (IPython's own UsageError); an error in their
code keeps its traceback, at the line of their cell.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError

from .. import run as runs
from ..errors import HybridMagicError
from . import arguments, export_memory, free

if TYPE_CHECKING:
    from ..config import TrainConfig
    from .adopted import Loops
    from .cell import Cell

_NAMES = ("train", "ablate", "profile", "free", "device", "export")
MAGICS = tuple(f"hybrid_{name}" for name in _NAMES)
_KEPT = "the open run was undone; hm.last_ablation holds what was done"
_PUT_BACK = "everything was put back as it was"
_ENDED = "the run ended at a whole step; hm.last_run holds it"
_PACKAGE = os.path.join(pathlib.Path(__file__).parent.parent, "")


class Interrupted(KeyboardInterrupt):
    """An interrupt that has ended the run at a whole step; shown without a traceback of ours."""

    def _render_traceback_(self) -> list[str]:
        return [f"KeyboardInterrupt: {self}"]


Interrupted.__name__ = Interrupted.__qualname__ = "KeyboardInterrupt"  # what front ends are told


def register(shell: Any) -> None:
    """Register the magics and their completions with an InteractiveShell."""
    training = (arguments.TRAIN, train), (arguments.ABLATE, ablate), (arguments.PROFILE, profile)
    for magic, run in training:
        _register_training(shell, magic, run)

    def hybrid_free(line: str) -> None:
        free.free(shell, line)

    def hybrid_device(line: str) -> None:
        from . import device_page

        device_page.show(shell, line)

    def hybrid_export(line: str) -> None:
        from . import exporting

        _or_one_line(lambda: exporting.export(shell, line))

    hybrid_free.__doc__, hybrid_device.__doc__ = free.HELP, arguments.DEVICE_HELP
    hybrid_export.__doc__ = arguments.EXPORT_HELP
    for line_magic in (hybrid_free, hybrid_device, hybrid_export):
        shell.register_magic_function(line_magic, "line")
    export_memory.watch(shell)
    if _empty_cell_as_line not in shell.input_transformers_cleanup:
        shell.input_transformers_cleanup.append(_empty_cell_as_line)


def _register_training(shell: Any, magic: arguments.Magic, run: Callable[..., Any]) -> None:
    def train_or_ablate(line: str, cell: str | None = None) -> Any:
        __tracebackhide__ = True
        return run(shell, line, cell)

    def complete(_: Any, event: Any) -> list[str]:
        text = event.text_until_cursor.split(magic.name, 1)[-1]
        return arguments.complete(text, shell.user_ns, magic)

    train_or_ablate.__doc__ = arguments.help_text(magic)
    shell.register_magic_function(train_or_ablate, "line_cell", magic.name)
    for mark in ("%", "%%"):
        shell.set_hook("complete_command", complete, str_key=mark + magic.name)


def _empty_cell_as_line(lines: list[str]) -> list[str]:
    """Return a cell of nothing but our `%%magic` line as `%magic`; IPython would refuse it."""
    words = lines[0].split() if len(lines) == 1 else []
    return [lines[0][1:]] if words and words[0] in {"%%" + name for name in MAGICS} else lines


def train(shell: Any, line: str, cell: str | None) -> Any:
    """Run `%%hybrid_train`: read the line, take what the cell names, train, and show the run.

    Returns the value of the cell's last expression, None where the cell is a step.
    """
    __tracebackhide__ = True  # IPython leaves such frames out of what it shows
    from .loopform import explained, form_of

    explain, read, config, text = _read(shell, arguments.TRAIN, line, cell)
    if explain:
        return explained(shell, text)
    form = _or_one_line(lambda: form_of(shell, text, read))
    if form is not None:
        loops = _loops(shell)
        loops.begin()
        end = lambda error: export_memory.remember(shell, text, config, None, loops.end(error))
        return _trained(shell, lambda: form.run(config, loops), end, config.o)
    return _train_step(shell, read, config, text)


def ablate(shell: Any, line: str, cell: str | None) -> Any:
    """Run `%%hybrid_ablate`: read the line, train what the cell says several ways, and compare."""
    __tracebackhide__ = True
    from .. import ablation as ablations
    from .ablating import ablation_of
    from .ablation_view import open_view
    from .loopform import explained

    explain, read, config, text = _read(shell, arguments.ABLATE, line, cell)
    if explain:
        return explained(shell, text)
    before = ablations.last_ablation
    view = open_view(shell, plain=config.plain)

    def newest() -> Any:
        made = ablations.last_ablation
        return made if made is not before else None

    loops = _loops(shell)
    _trained(
        shell,
        lambda: ablation_of(shell, read, config, text, loops, view),
        lambda _: view.close(newest()),
        config.o,
        newest,
        _KEPT,
    )
    return None


def profile(shell: Any, line: str, cell: str | None) -> Any:
    """Run `%%hybrid_profile`: read the line, look at a few steps of what the cell trains."""
    __tracebackhide__ = True
    from .loopform import explained
    from .profiling import ProfileView, profile_of

    explain, read, config, text = _read(shell, arguments.PROFILE, line, cell)
    if explain:
        return explained(shell, text)
    view, loops = ProfileView(shell, plain=config.plain), _loops(shell)
    made: list[Any] = []
    _trained(
        shell,
        lambda: made.append(profile_of(shell, read, config, text, loops, view)),
        lambda _: view.close(made[0] if made else None),
        config.o,
        lambda: made[0] if made else None,
        _PUT_BACK,
    )
    return None


def _read(
    shell: Any, magic: arguments.Magic, line: str, cell: str | None
) -> tuple[bool, arguments.Line, Any, Cell]:
    """Return whether only to explain, the line as read, its config, and the cell."""
    from .cell import read_cell

    explain, line = arguments.without_explain(line)
    read = _or_one_line(lambda: arguments.read(line, magic))
    config = _or_one_line(lambda: magic.config.from_options(read.options))
    text = _or_one_line(lambda: read_cell(shell, cell or "", f"%%{magic.name} {line}"))
    return explain, read, config, text


def _train_step(shell: Any, read: arguments.Line, config: TrainConfig, cell: Cell) -> Any:
    """Train with the step that a cell writes, or with the one that is inferred."""
    __tracebackhide__ = True
    from ..launch.train import train as run_training
    from . import capture, live

    step, taken = _or_one_line(
        lambda: capture.step_and_capture(shell, read, cell, config.log or ())
    )
    before = runs.last_run
    view = live.open_view(plain=config.plain)

    def close(error: BaseException | None) -> None:
        run = runs.last_run if runs.last_run is not before else None
        export_memory.remember(shell, cell, config, taken.names, run)
        mistaken = isinstance(error, HybridMagicError)
        view.close(run if not mistaken or (run is not None and run.steps) else None)

    def work() -> None:
        __tracebackhide__ = True
        taken.hand_to(run_training, step, read, view)

    return _trained(shell, work, close, config.o)


def _trained(
    shell: Any,
    work: Callable[[], Any],
    close: Callable[[BaseException | None], object],
    name: str | None,
    newest: Callable[[], Any] | None = None,
    kept: str = _ENDED,
) -> Any:
    """Return what `work` returns; whatever ends it, `close` it and put its result into `name`: what
    `newest` returns, else the Run. An interrupt says what was `kept`."""
    __tracebackhide__ = True
    before = runs.last_run
    ended: BaseException | None = None
    mistake: str | None = None
    result = None
    try:
        result = work()
    except KeyboardInterrupt as error:
        ended = error
    except HybridMagicError as error:
        ended, mistake = error, str(error)
    except Exception as error:  # noqa: BLE001 - goes on, less our frames (a bare raise keeps them)
        ended = error
        raise _theirs(error)  # noqa: B904
    finally:
        close(ended)
        made = runs.last_run if runs.last_run is not before else None
        made = made if newest is None else newest()
        if name is not None and made is not None:
            shell.user_ns[name] = made
        interrupted = isinstance(ended, KeyboardInterrupt) and not _is_stop(ended)
        ended = None  # it holds this frame
    if mistake is not None:
        raise UsageError(mistake)
    if interrupted:
        nothing = made is None and kept is not _PUT_BACK
        raise Interrupted("nothing had been trained" if nothing else kept)
    return result


def _is_stop(error: BaseException) -> bool:
    """Return whether training that was stopped by hand was asked to go on."""
    from .adopted import Stopped

    return isinstance(error, Stopped)


def _loops(shell: Any) -> Loops:
    """Return the loops of this notebook that were taken over."""
    from .adopted import Loops

    def ended(end: Callable[[BaseException | None], Any]) -> None:
        def after_cell(result: Any = None) -> None:
            shell.events.unregister("post_run_cell", after_cell)
            end(getattr(result, "error_in_exec", None))

        shell.events.register("post_run_cell", after_cell)

    if not hasattr(shell, "_hybrid_loops"):
        shell._hybrid_loops = Loops(ended)
    return shell._hybrid_loops


def _or_one_line(work: Callable[[], Any]) -> Any:
    """Return what `work` returns; a person's mistake becomes one line without a traceback."""
    __tracebackhide__ = True
    try:
        return work()
    except HybridMagicError as error:
        message = str(error)
    except SyntaxError as error:
        error.__traceback__ = None
        raise
    raise UsageError(message)


def _theirs(error: BaseException) -> BaseException:
    """Return `error`, its tracebacks and those of the errors before it without our own frames."""
    each, seen = error, set[int]()
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        entries = list(_entries(each.__traceback__))
        theirs = [entry for entry in entries if not _is_ours(entry)] or entries
        for entry, following in zip(theirs, [*theirs[1:], None], strict=False):
            entry.tb_next = following
        each.__traceback__ = theirs[0] if theirs else None
        each = each.__cause__ or each.__context__
    return error


def _entries(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _is_ours(entry: TracebackType) -> bool:
    return entry.tb_frame.f_code.co_filename.startswith(_PACKAGE)
