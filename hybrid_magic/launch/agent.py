"""torchrun's elastic agent, run in a thread of the notebook.

It starts the workers as new processes, each the leader of a session of its own, with torchrun's
environment. It never restarts one: a run that failed is told, and goes on from its checkpoint.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import signal
import sys
import threading
import types
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing import api as starting
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, launch_agent

MONITOR_S = 1.0  # when one is gone it ends the others: they shall have gone back a step by then
# In place of `-m`: the package may be where only the notebook's own sys.path finds it. What a
# worker prints goes to files of its own: the agent would leave its ends of them open.
_BOOT = """
import json, os, sys
folder = sys.argv[1]
for number, name in (1, "stdout"), (2, "stderr"):
    file = os.open(folder + "/" + name + os.environ["RANK"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, number)
with open(folder + "/begin.json", encoding="utf-8") as file:
    begin = json.load(file)
sys.path[:] = begin["path"]
from hybrid_magic.launch.worker import main
main(folder, begin)
"""
_NOISY = ("torch.distributed.elastic", "torch.distributed.launcher", "torchelastic")
_EVENTS = "torchelastic-events-null"  # made when it is first used
_SIGNALS = "TORCHELASTIC_SIGNALS_TO_HANDLE"
_ONE_AT_A_TIME = threading.Lock()
_LATE_S = 10.0  # an agent sees a second late that its workers are gone; one that hangs keeps nobody


class Agent:
    """Workers that train what is in `folder`.

    Once `over`, `exit_codes` has the code of each rank that failed (negative: a signal), and
    `error` what the agent itself met.
    """

    def __init__(self, folder: str, processes: int) -> None:
        self.exit_codes: dict[int, int] = {}
        self.error: BaseException | None = None
        self._folder = folder
        wanted: dict[str, Any] = {
            "min_nodes": 1,
            "max_nodes": 1,
            "nproc_per_node": processes,
            "run_id": uuid.uuid4().hex,
            "rdzv_backend": "c10d",
            "rdzv_endpoint": "127.0.0.1:0",
            "local_addr": "127.0.0.1",
            "max_restarts": 0,
            "monitor_interval": MONITOR_S,
            "logs_specs": DefaultLogsSpecs(os.path.join(folder, "logs")),
            "shutdown_timeout": 1,
        }
        known = {item.name for item in dataclasses.fields(LaunchConfig)}  # grows with torch
        self._config = LaunchConfig(**{k: v for k, v in wanted.items() if k in known})
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Start the workers."""
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether no worker is left."""
        return not self._thread.is_alive()

    def join(self, timeout_s: float) -> None:
        """Wait until no worker is left, at most `timeout_s`."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def printed(self, rank: int) -> str:
        """Return what a worker has written to its standard error."""
        path = pathlib.Path(self._folder, f"stderr{rank}")
        return path.read_text(errors="replace") if path.exists() else ""

    def _run(self) -> None:
        try:
            with _after_others(), _quiet(), _without_handlers():
                launch_agent(self._config, sys.executable, ["-c", _BOOT, self._folder])
        except ChildFailedError as error:
            self.exit_codes = {rank: failed.exitcode for rank, failed in error.failures.items()}
        except BaseException as error:  # noqa: BLE001 - told by the main thread
            self.error = error


@contextmanager
def _after_others() -> Iterator[None]:
    """Wait until no other agent is left: they share the process's loggers and environment."""
    alone = _ONE_AT_A_TIME.acquire(timeout=_LATE_S)
    try:
        yield
    finally:
        if alone:
            _ONE_AT_A_TIME.release()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the agent's log out of the notebook, and its settings out of the environment."""
    logging.getLogger(_EVENTS)
    loggers = [
        logger
        for name, logger in list(logging.root.manager.loggerDict.items())  # others may add one
        if name.startswith(_NOISY) and isinstance(logger, logging.Logger) and not logger.disabled
    ]
    found = os.environ.get(_SIGNALS)
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger in loggers:
            logger.disabled = False
        if found is None:
            os.environ.pop(_SIGNALS, None)
        else:
            os.environ[_SIGNALS] = found


@contextmanager
def _without_handlers() -> Iterator[None]:
    """Have the agent set no signal handlers: before torch 2.6 it does, which no thread may."""
    if hasattr(starting, "threading"):  # it looks which thread it is in
        yield
        return
    found: Any = starting.signal
    kept = {**vars(signal), "signal": lambda *_: None}
    starting.signal = types.SimpleNamespace(**kept)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        starting.signal = found
