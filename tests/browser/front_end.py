"""A Jupyter server with its own folders, and notebooks of it open in headless Chromium.

For the browser tests, the README's screenshots and the benchmark of the panel alike. Knows what
front ends look like (JupyterLab 4, Notebook 7, the classic notebook), and nothing of training.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
KINDS = ("lab", "notebook7", "classic")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
START_S, ACT_MS = 90, 100_000
KERNEL = "hybrid-magic-test"
NO_NEWS = {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}
CONNECTED = (
    "window.Jupyter && Jupyter.notebook && Jupyter.notebook.kernel"
    " && Jupyter.notebook.kernel.is_connected() && !Jupyter.notebook.kernel_busy"
)


class Server:
    """A server of one `kind` at `address`, whose notebooks lie in `folder`."""

    def __init__(self, kind: str, address: str, folder: pathlib.Path) -> None:
        self.kind, self.address, self.folder = kind, address, folder
        self._made = 0

    def write(self, cells: list[str]) -> str:
        """Write `cells` as a new notebook, and return its name."""
        self._made += 1
        name = f"t{self._made}.ipynb"
        (self.folder / name).write_text(json.dumps(_notebook_of(cells)))
        return name

    def end_kernels(self) -> None:
        """End every kernel, so that none takes time from what is run next."""
        with urllib.request.urlopen(f"{self.address}/api/kernels") as answer:
            kernels = json.load(answer)
        for kernel in kernels:
            path = f"{self.address}/api/kernels/{kernel['id']}"
            urllib.request.urlopen(urllib.request.Request(path, method="DELETE")).close()


class Notebook:
    """A notebook open in a page: runs its cells, moves its controls, reads what stands there."""

    def __init__(self, page: Any, server: Server, name: str) -> None:
        self.page, self.kind = page, server.kind
        place = "/doc/tree/" if self.kind == "lab" else "/notebooks/"
        self._url = server.address + place + name + ("?reset" if self.kind == "lab" else "")

    def open(self) -> None:
        self.page.goto(self._url)
        if self.kind == "classic":
            self.page.wait_for_function(CONNECTED, timeout=ACT_MS)
            self.page.wait_for_timeout(3000)  # sooner, the classic notebook drops the view
        else:
            self.page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=ACT_MS)
            self.page.wait_for_timeout(1500)

    def open_again(self) -> None:
        """Save, close the tab in the middle of whatever runs, and open it in a new one."""
        if self.kind == "classic":
            self.page.evaluate("Jupyter.notebook.save_notebook()")
        else:
            self.page.keyboard.press("Control+S")
        self.page.wait_for_timeout(1500)
        context = self.page.context
        self.page.close()
        self.page = context.new_page()
        self.page.goto(self._url)
        found = "#notebook .cell" if self.kind == "classic" else ".jp-Notebook .jp-Cell"
        self.page.locator(found).first.wait_for(timeout=ACT_MS)

    def run_all(self) -> None:
        if self.kind == "classic":
            self.page.evaluate("Jupyter.notebook.execute_all_cells()")
        else:
            self._menu("Run", "Run All Cells")

    def run(self, at: int) -> None:
        """Run cell `at` alone."""
        if self.kind == "classic":
            self.page.evaluate(f"Jupyter.notebook.execute_cells([{at}])")
        else:
            self.cell(at).locator(".jp-InputArea-editor").click()
            self.page.keyboard.press("Shift+Enter")

    def interrupt(self) -> None:
        """Press the toolbar's button that interrupts the kernel."""
        if self.kind == "classic":
            self.page.locator("button[data-jupyter-action$=':interrupt-kernel']").click()
        else:
            item = "[data-jp-item-name=interrupt], [data-command='notebook:interrupt-kernel']"
            self.page.locator(item).first.click()

    def _menu(self, menu: str, item: str) -> None:
        self.page.get_by_role("menuitem", name=menu, exact=True).click()
        self.page.get_by_role("menuitem", name=item, exact=True).click()

    @property
    def status(self) -> Any:
        """The line of the panel that says what the run is doing."""
        return self.page.locator("[data-hybrid-magic=status]").last

    def step(self) -> int:
        return int(re.search(r"step ([\d,]+)", self.status.inner_text())[1].replace(",", ""))

    def wait_for_training(self) -> None:
        """Wait until the newest panel says that steps are taken."""
        self.page.wait_for_function(
            "() => /Training[^]*step/.test("
            "[...document.querySelectorAll('[data-hybrid-magic=status]')].pop()?.innerText || '')",
            timeout=ACT_MS,
        )

    def wait_for_step_after(self, step: int) -> None:
        """Wait until the newest panel shows a later step than `step`: it is live."""
        end = time.monotonic() + ACT_MS / 1000
        while self.step() <= step:
            assert time.monotonic() < end, f"the panel stands still at step {step}"
            self.page.wait_for_timeout(100)

    def button(self, name: str) -> Any:
        buttons = self.page.locator("button.jupyter-button, button.widget-button")
        return buttons.filter(has_text=name)

    def drag(self, label: str, share: float) -> None:
        """Drag the handle of a slider to `share` of its track."""
        row = self._row(label)
        row.scroll_into_view_if_needed()
        handle = row.locator(".noUi-handle, .ui-slider-handle").first.bounding_box()
        track = row.locator(".noUi-target, .ui-slider").first.bounding_box()
        height = handle["y"] + handle["height"] / 2
        mouse = self.page.mouse
        mouse.move(handle["x"] + handle["width"] / 2, height)
        mouse.down()
        mouse.move(track["x"] + share * track["width"], height, steps=8)
        mouse.up()

    def type_value(self, label: str, value: str) -> None:
        self._row(label).locator(".widget-readout").first.click()
        self.page.keyboard.press("Control+A")
        self.page.keyboard.type(value)
        self.page.keyboard.press("Enter")

    def _row(self, label: str) -> Any:
        rows = self.page.locator(".widget-inline-hbox, .widget-hslider")
        return rows.filter(has_text=label).last

    def cell(self, at: int) -> Any:
        """The code cell number `at`, counted from 0, with its output."""
        return self.page.locator(".jp-Notebook .jp-CodeCell, #notebook .code_cell").nth(at)

    def printed(self, at: int, start: str) -> str:
        """Wait until cell `at` has printed a line that starts with `start`; return its rest."""
        outputs = self.cell(at).locator(".jp-OutputArea-output pre, .output_stdout pre")
        found = outputs.filter(has_text=start).last
        found.wait_for(timeout=ACT_MS)
        return found.inner_text().split(start, 1)[1]

    def screenshot(self, name: str) -> None:
        """Keep a picture of the page in HYBRID_MAGIC_SCREENSHOTS, where that is a folder."""
        folder = os.environ.get("HYBRID_MAGIC_SCREENSHOTS")
        if folder:
            self.page.screenshot(path=str(pathlib.Path(folder) / f"{self.kind}-{name}.png"))


@contextlib.contextmanager
def served(
    kind: str, folder: pathlib.Path, programs: pathlib.Path, python: str, dark: bool = False
) -> Iterator[Server]:
    """Serve notebooks from `folder`, on a free port of this machine, for as long as the block.

    Args:
        kind: one of KINDS.
        folder: empty; everything that the server and its kernels write stays in it.
        programs: the `bin` folder of the environment that has the front end.
        python: of the environment that the kernel runs in.
        dark: JupyterLab in its dark theme.
    """
    _write_settings(folder, python, dark)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(programs / ("jupyter-lab" if kind == "lab" else "jupyter-notebook"))]
    command += ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    if kind == "classic":
        command += ["--NotebookApp.token=", "--NotebookApp.password="]
        command += ["--NotebookApp.disable_check_xsrf=True", f"--notebook-dir={folder}"]
    else:
        command += ["--IdentityProvider.token=", "--ServerApp.password="]
        command += ["--ServerApp.disable_check_xsrf=True", f"--ServerApp.root_dir={folder}"]
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(
            command, env=_surroundings(folder, programs), cwd=folder, stdout=log, stderr=log
        )
    server = Server(kind, f"http://127.0.0.1:{port}", folder)
    try:
        _wait_for(server.address + "/api", process, folder / "server.log")
        yield server
        server.end_kernels()
    finally:
        process.terminate()
        process.wait(20)


def _write_settings(folder: pathlib.Path, python: str, dark: bool) -> None:
    """Write the kernel's entry, and what keeps JupyterLab from asking questions."""
    spec = {"display_name": "Python 3", "language": "python"}
    spec["argv"] = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    theme = {"theme": "JupyterLab Dark" if dark else "JupyterLab Light"}
    settings = "config/lab/user-settings/@jupyterlab/apputils-extension"
    for place, content in {
        f"data/kernels/{KERNEL}/kernel.json": spec,
        f"{settings}/notification.jupyterlab-settings": NO_NEWS,
        f"{settings}/themes.jupyterlab-settings": theme,
    }.items():
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


def _surroundings(folder: pathlib.Path, programs: pathlib.Path) -> dict[str, str]:
    own = {"HOME": "", "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data"}
    own |= {"JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython"}
    env = {**os.environ, **{name: str(folder / place) for name, place in own.items()}}
    env["PATH"] = f"{programs}{os.pathsep}{env['PATH']}"
    env["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    return env


def _wait_for(address: str, server: subprocess.Popen, log: pathlib.Path) -> None:
    end = time.monotonic() + START_S
    while True:
        try:
            urllib.request.urlopen(address, timeout=2).close()
            return
        except OSError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)


def _notebook_of(cells: list[str]) -> dict[str, Any]:
    spec = {"name": KERNEL, "display_name": "Python 3", "language": "python"}
    return {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {"kernelspec": spec},
        "cells": [
            {
                "cell_type": "code",
                "id": f"cell-{at}",
                "metadata": {},
                "execution_count": None,
                "outputs": [],
                "source": source.strip(),
            }
            for at, source in enumerate(cells)
        ],
    }
