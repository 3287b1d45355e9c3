"""`%hybrid_free`: gives back what an error or a stopped cell left held, and says what that freed,
and what still holds memory that a person might not think of.

Knows where Python and IPython keep errors. Changes nothing that a person named: the notebook's
variables and outputs stay.
"""

from __future__ import annotations

import gc
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from types import FrameType, FunctionType, ModuleType
from typing import Any

from IPython.core.error import UsageError

from ..report.quantities import size

HELP = """%hybrid_free

Give back the memory that the notebook's last error, or a stopped cell, still holds.

IPython keeps the last error and, with it, every variable of every function that the error passed:
after an out-of-memory error the very tensors that took the memory. They are let go of, what nothing
refers to any more is collected, and the accelerator's cache is emptied. The error itself stays, so
%debug and %tb still work; where a tensor was they show a few words about it. The notebook's own
variables and outputs are left alone; an output that still holds memory is named.

Takes no arguments. An error inside %%hybrid_train needs none of this: it holds no tensor."""

_WORTH_TELLING_BYTES = 2**20  # that an output still holds
_MOST_LOOKED_AT = 10_000  # objects, within one value
_OPAQUE = (type, ModuleType, FrameType, FunctionType)  # what these reach is not theirs alone

Storages = dict[tuple[str, int], int]  # (device, address) -> bytes
Taken = dict[str, tuple[int, int]]  # accelerator -> bytes (allocated, reserved)


def free(shell: Any, line: str) -> None:
    """Run `%hybrid_free` in `shell`, and print what it gave back.

    Raises:
        UsageError: it was given an argument.
    """
    if line.strip():
        raise UsageError(
            f"%hybrid_free takes no arguments, but has {line.strip()}; write just %hybrid_free"
        )
    lines = _free(shell) if "torch" in sys.modules else ["nothing to give back: no torch is loaded"]
    sys.stdout.write("\n".join(lines) + "\n")


def _free(shell: Any) -> Iterator[str]:
    tensors, taken = _host_tensors(), _taken()
    _forget_dropped_outputs(shell)
    errors = _let_go_of_errors(shell)
    failed = _empty_caches(taken)
    left, now = _host_tensors(), _taken()
    gone = [count for key, count in tensors.items() if key not in left]
    told = [
        f"{name} allocated {size(before[0])} -> {size(now.get(name, (0, 0))[0])}, "
        f"reserved {size(before[1])} -> {size(now.get(name, (0, 0))[1])}"
        for name, before in taken.items()
        if now.get(name) != before
    ]
    if gone:
        several = "s" if len(gone) > 1 else ""
        told.append(f"{len(gone)} tensor{several} of {size(sum(gone))} on the host")
    held = f"held by {' and '.join(errors)}" if errors else "which nothing referred to any more"
    if told:
        yield f"gave back {'; '.join(told)}; {held}"
    else:
        used = [f"{size(allocated)} on {name} is in use" for name, (allocated, _) in now.items()]
        yield "; ".join(["nothing to give back: no error holds a tensor", *used])
    yield from failed
    yield from _still_held(shell)


def _forget_dropped_outputs(shell: Any) -> None:
    """Let go of outputs that were dropped: IPython remembers them, to know its names from others'.

    What it remembers stays different from what the name stands for now, and tells it the same.
    """
    remembered: dict[str, Any] = getattr(shell, "user_ns_hidden", {})
    for name, value in list(remembered.items()):
        if name.startswith("_") and shell.user_ns.get(name) is not value:
            remembered[name] = None


def _let_go_of_errors(shell: Any) -> list[str]:
    """Let go of what Python and IPython keep of errors; return the names of those that held some.

    While a magic runs these are of earlier cells.
    """
    from ..engine.letting_go import let_go

    result = getattr(shell, "last_execution_result", None)
    kept = (
        getattr(sys, "last_exc", None),  # from Python 3.12 on
        getattr(sys, "last_value", None),
        getattr(result, "error_in_exec", None),
        getattr(result, "error_before_exec", None),
    )
    errors = {id(error): error for error in kept if isinstance(error, BaseException)}.values()
    names = [type(error).__name__ for error in errors if let_go(error)]
    # of an error that is gone itself; called in any case, since it collects what is garbage
    shown = getattr(getattr(shell, "InteractiveTB", None), "tb", None)
    if let_go(getattr(sys, "last_traceback", None), shown):
        names.append("the traceback of an earlier error")
    return names


def _taken() -> Taken:
    """Return what each accelerator has given to this process, leaving out those it does not use."""
    import torch

    found: Taken = {}
    if torch.cuda.is_initialized():
        for number in range(torch.cuda.device_count()):
            found[f"cuda:{number}"] = (
                torch.cuda.memory_allocated(number),
                torch.cuda.memory_reserved(number),
            )
    if torch.backends.mps.is_available():
        found["mps"] = (torch.mps.current_allocated_memory(), torch.mps.driver_allocated_memory())
    return {name: read for name, read in found.items() if read[1]}


def _empty_caches(names: Iterable[str]) -> list[str]:
    """Empty the caches of accelerators; return a line for each that has failed."""
    import torch

    from ..engine.device import probe_for

    failed = []
    for name in names:
        try:
            probe_for(torch.device(name)).release()
        except RuntimeError as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            failed.append(f"{name} no longer works ({why}); restart the kernel")
    return failed


def _host_tensors() -> Storages:
    """Return the memory of every tensor on the host that Python knows of."""
    import torch

    objects = gc.get_objects()
    tensors = (each for each in objects if issubclass(type(each), torch.Tensor))
    return {key: count for key, count in map(_storage, tensors) if key[0] == "cpu"}


def _storage(tensor: Any) -> tuple[tuple[str, int], int]:
    """Return a tensor's device, address and bytes."""
    try:
        storage = tensor.untyped_storage()
        return (str(storage.device), storage.data_ptr()), storage.nbytes()
    except Exception:  # noqa: BLE001 - a tensor of a strange kind, without memory that can be told
        return ("", 0), 0


def _still_held(shell: Any) -> list[str]:
    """Return a line on the outputs that hold memory which no variable of the notebook holds."""
    names: dict[str, Any] = shell.user_ns
    outputs = {f"Out[{number}]": value for number, value in dict(names.get("_oh", {})).items()}
    known = set(map(id, outputs.values()))
    last = {name: names[name] for name in ("_", "__", "___") if name in names}
    outputs.update((name, value) for name, value in last.items() if id(value) not in known)
    if not outputs:
        return []
    aside = {id(shell), id(names), *map(id, (names.get("_oh"), names.get("Out")))}
    named: Storages = {}
    for name, value in list(names.items()):
        if not name.startswith("_") and id(value) not in aside:
            named.update(_reached(value, aside)[0])
    told = []
    for name, value in outputs.items():
        storages, graph = _reached(value, aside)
        count = {key: storages[key] for key in storages.keys() - named.keys()}
        if sum(count.values()) >= _WORTH_TELLING_BYTES or (graph and count):
            where = sorted({device for device, _ in count})
            more = ", and the graph it was computed by" if graph else ""
            told.append(f"{name} holds {size(sum(count.values()))} on {' and '.join(where)}{more}")
    drop = "%reset -f out and then %hybrid_free drop all outputs"
    return [f"still held: {'; '.join(told)}; {drop}"] if told else []


def _reached(value: Any, aside: set[int]) -> tuple[Storages, bool]:
    """Return the memory of the tensors that `value` reaches, and whether one holds its graph."""
    import torch

    found: Storages = {}
    graph = False
    seen, waiting = set(aside), deque([value])
    while waiting and len(seen) < _MOST_LOOKED_AT:
        each = waiting.popleft()
        if id(each) in seen or issubclass(type(each), _OPAQUE):
            continue
        seen.add(id(each))
        if issubclass(type(each), torch.Tensor):
            key, count = _storage(each)
            found[key] = count
            if each.grad_fn is not None:
                graph = True
            elif each.grad is not None:
                waiting.append(each.grad)
        else:
            waiting += gc.get_referents(each)
    return found, graph
