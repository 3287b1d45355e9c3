"""The loop form of a cell: rewritten and run, with the functions of earlier cells that it calls.

The text keeps its own lines. Trains nothing itself.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from IPython.display import display

from ..adopt.names import reads
from ..adopt.plan import Loop, Plan, plan_of, told
from ..adopt.rewriting import RUNTIME, rewritten
from ..adopt.roles import holds_training
from ..config import TrainConfig
from ..engine.randomness import seed_everything
from ..errors import HybridMagicError
from .adopted import Loops
from .arguments import Line
from .cell import Cell
from .cellrun import Site
from .planned import explain, plan_of_function, refusal_at_call, trainers

_MINE = "_hybrid_"
_OF_A_STEP = ("epochs", "val", "optimizer", "lr", "loss", "scheduler", "log", "device")


def form_of(shell: Any, cell: Cell, line: Line) -> Form | None:
    """Return a cell's loop form, None where the cell trains nothing by itself.

    Raises:
        HybridMagicError: the loop is refused, or an option is for a step.
    """
    called = trainers(cell.tree, shell.user_ns)
    if not called and not holds_training(cell.tree):
        return None
    return Form(shell, cell, line, called)


def explained(shell: Any, cell: Cell) -> Plan:
    """Return the plan of a cell, shown in its place."""
    source = f"{cell.head}\n{cell.raw}"
    return explain(source, shell.user_ns)


class Form:
    """A cell in the loop form; `called` are functions of earlier cells that it trains with."""

    def __init__(self, shell: Any, cell: Cell, line: Line, called: dict[str, FunctionType]) -> None:
        self._shell, self._cell, self.called = shell, cell, called
        tree = ast.increment_lineno(cell.tree, 1)  # below the magic's line
        self.plan = plan_of(tree, shell.user_ns, calls_training=bool(called))
        self._functions = {
            name: plan
            for name, function in called.items()
            if (plan := plan_of_function(function, shell.user_ns)) is not None
        }
        for name, plan in self._functions.items():
            self.plan.refusal = self.plan.refusal or refusal_at_call(tree, name, plan)
        if (refusal := self.plan.refusal) is not None:
            raise HybridMagicError(f"line {refusal.line}: {refusal.text}")
        _check_options(line, cell.text)

    def run(self, config: TrainConfig, loops: Loops) -> Any:
        """Run the cell and return the value of its last expression."""
        __tracebackhide__ = True
        shell, cell = self._shell, self._cell
        name = cell.named(shell, f"{cell.head}\n{cell.text}")
        tree = self._rewritten(self.plan, config, loops)
        if config.seed is not None:
            seed_everything(config.seed)
        setattr(builtins, RUNTIME, loops)  # found from every function, and in no namespace
        swapped = list(self._swap(config, loops))
        try:
            result = _execute(tree, name, shell.user_ns)
            if self.plan.loops and not (loops.cell is not None and loops.cell.trained):
                _say(shell, f"taken over, to train whenever it is called\n{self.plan}\n")
            return result
        finally:
            for function, code in swapped:
                function.__code__ = code
            for key in [key for key in shell.user_ns if key.startswith(_MINE)]:
                del shell.user_ns[key]

    def _rewritten(self, plan: Plan, config: TrainConfig, loops: Loops) -> ast.Module:
        sites = {}
        for loop in plan.loops:
            sites[loop.line] = len(loops.sites)
            loops.sites.append(_site(loop, config))
        return rewritten(plan.tree, plan.loops, sites, set(self.called))

    def _swap(self, config: TrainConfig, loops: Loops) -> Iterator[tuple[FunctionType, CodeType]]:
        """Give the functions of earlier cells their rewritten code, and yield what they had."""
        for name, plan in self._functions.items():
            function = self.called[name]
            made = self._rewritten(plan, config, loops)
            code = compile(made, function.__code__.co_filename, "exec")
            inner = next(const for const in code.co_consts if isinstance(const, CodeType))
            found, function.__code__ = function.__code__, inner
            yield function, found


def _say(shell: Any, text: str) -> None:
    """Show a text beside what the cell itself prints."""
    if hasattr(shell, "kernel"):
        display({"text/plain": text}, raw=True)
    else:
        sys.stderr.write(text)


def _site(loop: Loop, config: TrainConfig) -> Site:
    lines = told(loop).splitlines()
    note = "; ".join(row.strip() for row in (lines[0], *lines[2:]))
    work = loop.split.work if loop.split else []
    return Site(
        line=loop.line,
        kind=loop.unit.kind,
        optimizer=loop.optimizer,
        scaler=loop.unit.roles.scaler,
        loader=loop.loader,
        grows=loop.grows,
        in_pieces=loop.divides and loop.mode == "verbatim",
        own_precision=loop.own_precision,
        reads=frozenset().union(*map(reads, work)),
        notes=(note,),
        config=config,
    )


def _check_options(line: Line, text: str) -> None:
    if line.options.get("processes", "1") != "1":
        raise HybridMagicError(
            f"--processes {line.options['processes']} is for a step, and this cell holds a "
            "training loop of its own, whose other statements run in this notebook; wanted the "
            "lines that compute loss from batch; write them alone, or leave --processes out"
        )
    for name in _OF_A_STEP:
        if name in line.options:
            raise HybridMagicError(
                f"--{name} is for a step, and this cell holds a "
                "training loop of its own, which says that itself; leave it out"
            )
    for name in filter(None, (line.model, line.loader)):
        if name not in text:
            raise HybridMagicError(
                f"{name} is not in this cell's training loop; wanted names that it uses; leave "
                "it out, the loop names its own model and loader"
            )


def _execute(tree: ast.Module, name: str, namespace: dict[str, Any]) -> Any:
    """Run a program in `namespace`; return the value of its last expression, None without one."""
    __tracebackhide__ = True
    body, last = tree.body, None
    if body and isinstance(body[-1], ast.Expr):
        body, last = body[:-1], ast.Expression(body[-1].value)
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    programs: list[Any] = [ast.Module(body, [])] + ([last] if last is not None else [])
    value = None
    for program, mode in zip(programs, ("exec", "eval"), strict=False):
        code = compile(program, name, mode, flags=flags, dont_inherit=True)
        value = eval(code, namespace)
        if code.co_flags & inspect.CO_COROUTINE:
            value = _awaited(value)
    return value if last is not None else None


def _awaited(coroutine: Any) -> Any:
    """Return what a coroutine comes to, also while the kernel's own event loop is running."""
    import asyncio

    running = asyncio._get_running_loop()
    asyncio._set_running_loop(None)
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()
        asyncio._set_running_loop(running)
