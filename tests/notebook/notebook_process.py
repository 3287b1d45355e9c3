"""A notebook without a front end: IPython in a process of its own, told over a pipe what to run.

The tests' side is `Notebook`; run as a program, this file is the other side. One process serves
many tests, each of which starts with `fresh`: importing torch costs seconds, a namespace nothing.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass
class Ran:
    """What a cell left: what it printed, and the error that ended it (None: none)."""

    out: str
    err: str
    error: str | None
    message: str


class Notebook:
    """Runs cells in the other process, one after the other."""

    def __init__(self, folder: pathlib.Path) -> None:
        env = {**os.environ, "IPYTHONDIR": str(folder), "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = os.pathsep.join((str(ROOT), env.get("PYTHONPATH", "")))
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            cwd=folder,
        )

    def run(self, cell: str) -> Ran:
        """Run a cell as a person does."""
        return Ran(**self._ask("run", cell))

    def value(self, expression: str) -> Any:
        """Return what `expression` is in the notebook, as JSON carries it."""
        answer = self._ask("value", expression)
        assert answer["error"] is None, f"{expression}: {answer['error']}"
        return answer["value"]

    def fresh(self) -> None:
        """Empty the namespace and forget the last run."""
        self._ask("fresh", "")

    def close(self) -> None:
        """End it, also where a loader's worker that was forked meanwhile holds its line open."""
        try:
            self._process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def _ask(self, what: str, text: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([what, text]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the notebook's process ended ({self._process.wait()}) in: {text}"
        return json.loads(answer)


def serve() -> None:
    """Answer requests until the pipe is closed; what cells write to descriptor 1 goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from IPython.core.interactiveshell import InteractiveShell

    InteractiveShell.history_load_length = 0
    shell = InteractiveShell.instance()
    shell.history_manager.enabled = False
    shell.run_line_magic("load_ext", "hybrid_magic")
    for request in sys.stdin:
        what, text = json.loads(request)
        if what == "run":
            answer = run_cell(shell, text)
        elif what == "value":
            answer = evaluate(shell, text)
        else:
            import hybrid_magic.run

            for name in set(shell.user_ns) - set(shell.user_ns_hidden):  # reset() collects garbage
                del shell.user_ns[name]
            shell.user_ns["_oh"].clear()
            shell.execution_count = len(shell.history_manager.input_hist_parsed)
            hybrid_magic.run.last_run = answer = None
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # taking torch down politely costs seconds


def evaluate(shell: Any, expression: str) -> dict[str, Any]:
    try:
        value = eval(expression, shell.user_ns)
        json.dumps(value)
    except Exception as error:  # noqa: BLE001 - told to the test, which fails by it
        return {"value": None, "error": f"{type(error).__name__}: {error}"}
    return {"value": value, "error": None}


def run_cell(shell: Any, cell: str) -> dict[str, Any]:
    from IPython.utils.capture import capture_output

    with capture_output() as printed:
        result = shell.run_cell(cell, store_history=True)
    error = result.error_before_exec or result.error_in_exec
    return {
        "out": _COLOURS.sub("", printed.stdout),
        "err": _COLOURS.sub("", printed.stderr),
        "error": None if error is None else type(error).__name__,
        "message": "" if error is None else str(error),
    }


if __name__ == "__main__":
    serve()
