"""Two front ends that run a notebook's cells and watch the panel as a person does.

The light one talks to the kernel directly and answers as a widget manager does, at next to no CPU
time; the other is JupyterLab in headless Chromium, whose server and browser need a core of their
own. Both type a value into the panel every ten seconds. Knows nothing of what is measured.
"""

from __future__ import annotations

import contextlib
import pathlib
import queue
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

from tests.browser.front_end import QUIET, Notebook, served
from tests.kernel_client import FrontEnd, parent, state

TYPED, TYPED_EVERY_S = "Growth factor", 10.0
SILENT_S = 120.0  # the kernel is given up after as long without a word
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDGET = "application/vnd.jupyter.widget-view+json"


def in_client(cells: Sequence[str], folder: pathlib.Path, result: pathlib.Path) -> None:
    """Run `cells` in a kernel that works in `folder`, until `result` is there."""
    front_end = FrontEnd(folder)
    try:
        for cell in (f"import os; os.chdir({str(folder)!r})", *cells):
            _attend(front_end, front_end.send(cell))
    finally:
        front_end.close()
    assert result.exists(), f"the cells have left no {result.name}"


def _attend(front_end: FrontEnd, cell: str) -> None:
    """Answer what the kernel publishes until `cell` has run."""
    panel, hand, typed = None, None, 0
    due, heard = float("inf"), time.monotonic()
    while True:
        now = time.monotonic()
        if hand is not None and now >= due:
            typed, due = typed + 1, now + TYPED_EVERY_S
            front_end.move(hand, 1.5 + typed % 2)
        try:
            message = front_end.client.get_iopub_msg(timeout=1.0)
        except queue.Empty:
            if now - heard > SILENT_S:
                raise SystemExit(f"the kernel has said nothing for {SILENT_S:g} s") from None
            continue
        heard, kind, content = now, message["msg_type"], message["content"]
        if kind == "error":
            raise SystemExit("\n".join(content["traceback"]))
        if kind == "comm_open":
            if content["data"]["state"].get("description") == TYPED:
                hand, due = content["comm_id"], now + TYPED_EVERY_S
        elif kind == "comm_close" and content["comm_id"] == hand:
            hand = None
        elif kind == "display_data" and panel is None and WIDGET in content["data"]:
            panel = content["data"][WIDGET]["model_id"]
            shown = {"method": "update", "state": {"_view_count": 1}, "buffer_paths": []}
            front_end.comm(panel, shown)
        if parent(message) == cell and state(message) == "idle":
            return


def in_browser(cells: Sequence[str], folder: pathlib.Path, result: pathlib.Path) -> None:
    """Run `cells` in JupyterLab, served from `folder`, until `result` is there."""
    from playwright.sync_api import sync_playwright

    programs = pathlib.Path(sys.executable).parent
    with (
        served("lab", folder, programs, sys.executable) as server,
        sync_playwright() as player,
    ):
        browser = player.chromium.launch(executable_path=_chromium(), args=list(QUIET))
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        notebook = Notebook(page, server, server.write([*cells]))
        notebook.open()
        notebook.run_all()
        _watch(notebook, result)
        browser.close()


def _watch(notebook: Notebook, result: pathlib.Path) -> None:
    """Type a value into the panel now and then, until `result` is there."""
    from playwright.sync_api import TimeoutError as NotThere

    typed = 0
    notebook.page.set_default_timeout(1000 * TYPED_EVERY_S)
    while not result.exists():
        errors = notebook.page.locator(".jp-RenderedText[data-mime-type*=error]")
        if errors.count():
            raise SystemExit(errors.first.inner_text())
        if notebook.page.locator(".widget-slider").count():
            typed += 1
            with contextlib.suppress(NotThere):  # the run has ended under the hand
                notebook.type_value(TYPED, f"{1.5 + typed % 2}")
        notebook.page.wait_for_timeout(1000 * TYPED_EVERY_S)


def browser_version() -> str:
    told = subprocess.check_output([_chromium(), "--version", "--no-sandbox"], text=True)
    return " ".join(told.split()[:2])


def _chromium() -> str:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        raise SystemExit(f"no browser is installed; wanted one of {', '.join(BROWSERS)}")
    return path


FRONT_ENDS = {"client": in_client, "browser": in_browser}
