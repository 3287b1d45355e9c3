"""A real kernel to talk to as a front end does, without a browser.

HYBRID_MAGIC_KERNEL may name the Python of another environment, so that one test run drives an old
kernel from a new client.
"""

from __future__ import annotations

import os
import pathlib
import queue
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
PATIENCE_S = 60.0


class FrontEnd:
    """A kernel and its client: runs cells, sends widget messages, interrupts, collects replies."""

    def __init__(self, folder: pathlib.Path) -> None:
        from jupyter_client.manager import KernelManager

        self.manager = KernelManager()
        self.manager.kernel_spec.argv[0] = os.environ.get("HYBRID_MAGIC_KERNEL", sys.executable)
        paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        env = {**os.environ, "PYTHONPATH": paths, "IPYTHONDIR": str(folder), "MPLBACKEND": "agg"}
        self.manager.start_kernel(env=env)
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=PATIENCE_S)

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def send(self, code: str) -> str:
        """Send a cell and return at once, with its message id."""
        return self.client.execute(code)

    def run(self, code: str) -> list[dict]:
        return self.until_idle(self.send(code))

    def until_idle(self, message_id: str) -> list[dict]:
        """Return what was published until the cell's own idle."""
        seen, end = [], time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            try:
                message = self.client.get_iopub_msg(timeout=0.5)
            except queue.Empty:
                continue
            seen.append(message)
            if parent(message) == message_id and state(message) == "idle":
                return seen
        raise AssertionError(f"the kernel never became idle after cell {message_id}: it hangs")

    def text(self, code: str) -> str:
        """Run a cell and return what it printed."""
        return printed(self.run(code))

    def move(self, model_id: str, value: float) -> str:
        """Send what a front end sends when a slider is moved."""
        data = {"method": "update", "state": {"value": value}, "buffer_paths": []}
        return self.comm(model_id, data)

    def comm(self, model_id: str, data: dict) -> str:
        content = {"comm_id": model_id, "data": data}
        message = self.client.session.msg("comm_msg", content)
        self.client.shell_channel.send(message)
        return message["header"]["msg_id"]

    def replies(self, message_ids: list[str]) -> dict[str, str]:
        """Return the status of the reply to each cell, waiting until all are there."""
        found, end = {}, time.monotonic() + PATIENCE_S
        while not all(one in found for one in message_ids) and time.monotonic() < end:
            try:
                message = self.client.get_shell_msg(timeout=0.5)
            except queue.Empty:
                continue
            found[parent(message)] = message["content"].get("status")
        return {one: found.get(one, "no reply") for one in message_ids}


def parent(message: dict) -> str:
    return message["parent_header"].get("msg_id", "")


def state(message: dict) -> str | None:
    return message["content"].get("execution_state") if message["msg_type"] == "status" else None


def printed(messages: list[dict], of: str | None = None) -> str:
    return "".join(
        message["content"]["text"]
        for message in messages
        if message["msg_type"] == "stream" and of in (None, parent(message))
    )
